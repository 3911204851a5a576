"""The comparison of heads: what is held out trains nothing, and each head learns what it can."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from benchmarks.prior.heads import Hidden, folds, heads_at
from common.prior.whitening import unit


@pytest.fixture(scope="module")
def quarters() -> tuple[Tensor, Tensor]:
    """Two classes in four quarters, as in exclusive or: no linear head tells them apart."""
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(1500, 2, generator=generator) - 0.5
    points += 0.1 * points.sign()
    return unit(points), (points[:, 0] * points[:, 1] > 0).long()


def test_folds_are_disjoint_and_hold_out_a_fifth_each(quarters: tuple[Tensor, Tensor]) -> None:
    numbered = torch.arange(1500.0)[:, None], quarters[1]
    held = []
    for train, out in folds(numbered):
        assert len(out[1]) == 300 and len(train[1]) == 1200
        assert not set(train[0].flatten().tolist()) & set(out[0].flatten().tolist())
        held += out[0].flatten().tolist()
    assert len(set(held)) == 900


@pytest.mark.slow  # ten heads are fitted
def test_what_is_not_linear_is_learnt_by_those_heads_alone_that_can(
    quarters: tuple[Tensor, Tensor],
) -> None:
    split = next(folds(quarters))
    found = {name: head(*split, 0) for name, head in heads_at(20.0, 1e-3).items()}
    # A line has at most three of the four quarters, which are not quite equal here.
    assert found["linear"] < 0.8 and found["linear, ε = 20"] < 0.8
    assert found["Gaussian kernel"] > 0.95
    assert found["512 hidden units"] > 0.95
    assert found["256 hidden units, ε = 20"] > 0.85


def test_a_hidden_layers_clipped_sums_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(20, 5, generator=generator), torch.arange(20) % 3
    weights = [torch.randn(7, 5, generator=generator), torch.randn(3, 7, generator=generator)]
    head = Hidden(units=7)
    expected = [torch.zeros_like(w) for w in weights]
    for i in range(20):
        own = [w.clone().requires_grad_() for w in weights]
        loss = nn.functional.cross_entropy(head._logits(x[i : i + 1], own)[1], labels[i : i + 1])
        gradients = torch.autograd.grad(loss, own)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        assert norm > 0
        for total, g in zip(expected, gradients, strict=True):
            total += g * min(1.0, head.plan.clip / norm)
    for found, right in zip(head._gradient_sums(x, labels, weights), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)

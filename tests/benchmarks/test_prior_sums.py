"""Sums that a head is tuned with: bounds, packing, whitening, descent."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from benchmarks.prior import sums
from common.errors import PrivacyError
from common.prior.whitening import moment_matrix, unit, whitening


def _features(n: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2, d)
    return unit(torch.randn(n, d, generator=generator) * scale + 0.3)


def test_one_picture_moves_no_sum_by_more_than_its_bound() -> None:
    x, labels = _features(40, 7), torch.arange(40) % 3
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)) * 5
    for i in range(40):
        rest = torch.arange(40) != i
        for clip in (0.1, 0.7):
            moved = sums.gradient_sum(x, labels, weights, clip)
            moved = moved - sums.gradient_sum(x[rest], labels[rest], weights, clip)
            assert float(moved.norm()) <= clip * (1 + 1e-4)
        for whole, part in (
            (sums.feature_sum(x), sums.feature_sum(x[rest])),
            (sums.moment_sum(x), sums.moment_sum(x[rest])),
        ):
            assert float((whole - part).norm()) == pytest.approx(1, abs=1e-4)


def test_a_feature_above_norm_one_or_not_a_number_is_refused() -> None:
    for bad in (torch.full((2, 4), 0.6), torch.tensor([[math.nan, 0.0]])):
        for total in (sums.feature_sum, sums.moment_sum):
            with pytest.raises(PrivacyError):
                total(bad)


def test_packing_a_moment_can_be_undone() -> None:
    x = _features(30, 6)
    torch.testing.assert_close(moment_matrix(sums.moment_sum(x), 6), x.T @ x)


def test_gradients_that_are_not_clipped_are_those_of_cross_entropy() -> None:
    x, labels = _features(25, 5), torch.arange(25) % 4
    weights = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    loss = torch.nn.functional.cross_entropy(x @ weights.T, labels, reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    got = sums.gradient_sum(x, labels, weights.detach(), clip=10.0)
    torch.testing.assert_close(got, weights.grad, rtol=1e-4, atol=1e-5)


def test_whitened_features_have_norm_one_and_an_even_spread() -> None:
    x = _features(4000, 8)
    mean = sums.feature_sum(x) / 4000
    centred = unit(x - mean)
    made = whitening(mean, sums.moment_sum(centred), 4000, ridge=0.0, bias=0.5)
    out = made(x)
    assert out.shape == (4000, 9)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(4000))
    values = torch.linalg.eigvalsh(out[:, :8].T @ out[:, :8] / 4000)
    assert float(values.max() / values.min()) < 1.6
    before = torch.linalg.eigvalsh(centred.T @ centred / 4000)
    assert float(before.max() / before.min()) > 5


def test_an_empty_hospital_adds_nothing() -> None:
    none, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    weights = torch.ones(3, 4)
    assert not sums.feature_sum(none).any() and not sums.moment_sum(none).any()
    assert not sums.gradient_sum(none, labels, weights, 0.1).any()


def test_descent_learns_separable_classes_through_noise_and_averaging_calms_it() -> None:
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(600) % 3
    x = unit(torch.eye(6)[labels] + 0.3 * torch.randn(600, 6, generator=generator))
    descent = sums.Descent(torch.zeros(3, 6), rate=2.0, count=600, steps=60)
    for _ in range(60):
        total = sums.gradient_sum(x, labels, descent.weights, 0.5)
        descent.step(total + 10.0 * torch.randn(3, 6, generator=generator))
    assert float(((x @ descent.result().T).argmax(1) == labels).float().mean()) > 0.97
    assert descent.taken == 60


def test_weights_that_are_not_numbers_are_refused() -> None:
    x, labels = _features(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(PrivacyError):
        sums.gradient_sum(x, labels, torch.full((2, 3), math.nan), 0.1)

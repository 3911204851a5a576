"""Gradients of book-keeping beside those of Opacus' hooks."""

from __future__ import annotations

import copy

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from common.privacy.bookkeeping.factors import dense
from common.privacy.bookkeeping.module import BookKeeping


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def by_opacus(model: nn.Module, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Each image's gradients of (output · weights).sum(), contiguous input; in float64.

    In float32 Opacus' own rounding takes an activation to the other side of a ReLU now and then.
    """
    exact = copy.deepcopy(model).double()
    wrapped = GradSampleModule(exact, loss_reduction="sum")
    (wrapped(x.double()) * weights.double()).sum().backward()
    return [p.grad_sample.clone() for p in trained(exact)]


def by_books(
    model: nn.Module, x: Tensor, weights: Tensor, units: Tensor | None = None
) -> list[Tensor]:
    """The same from book-keeping, multiplied out."""
    books = BookKeeping(model)
    books.expect(units)
    (books(x) * weights).sum().backward()
    found = [dense(p.grad_sample) for p in trained(model)]
    assert all(p.grad is None for p in model.parameters())
    books.remove_hooks()
    books.cleanup()
    return found


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Over images and parameters: the norm of the difference / the norm of the right gradient."""
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        gap = (mine.detach() - theirs).flatten(1).norm(dim=1) / theirs.flatten(1).norm(dim=1)
        assert bool(torch.isfinite(gap).all())
        worst = max(worst, float(gap.max()))
    return worst

"""Clipping the gradients of privacy units and summing them, with rounding that is accounted for.

A unit (an image, or a patient with all images in the batch) adds g · f to the sum, where g is the
*sum* of its images' gradients and the factor f is, by the clipping rule,

* ``flat``: min(1, C / ‖g‖) (Abadi et al. 2016, §3.1, with a unit for an example);
* ``automatic``: C / (‖g‖ + γ), γ = 0.01 (Bu et al., *Automatic Clipping: Differentially Private
  Deep Learning Made Easier and Stronger*, 2022, AUTO-S). Every gradient is scaled to nearly C, so
  C only scales the sum, and with it the learning rate: there is none to tune.

However many images there are, and by either rule, the sum moves by at most C when the unit goes.

In plain float32 a norm over five million coordinates comes out 1e-4 too small, and what is
clipped by it exceeds C by as much; a float32 sum of B gradients moves by up to B²·2^−23·C of
rounding besides. Here norms are float32 over pieces of 256 coordinates only (error at most
130·2^−24 of the norm) and float64 beyond, and sums are float64 (B²·2^−52·C). C is taken 2^−16
smaller than it is, which covers both for up to 4096 units in a batch. Gradients in bfloat16 are no
different: each square of one is exact in float32, and each number in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import PrivacyError
from common.privacy.bookkeeping.factors import Factors, dense, full
from common.privacy.threads import one_thread

FLAT, AUTOMATIC = CLIPPINGS = ("flat", "automatic")
"""The clipping rules."""

STABILITY = 0.01
"""γ of automatic clipping."""

_MARGIN = 1.0 - 2.0**-16
_PIECE = 256
_SMALL = 1024
"""Parameters of up to so many numbers are taken together."""
_CELLS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Float64 numbers converted at once: 2 MB, which stays in a processor's cache (a quarter of that
takes twice as long: so many rows are read in short pieces); on a GPU 512 MB, since each piece is a
call of its own."""


def check_clipping(clipping: str) -> None:
    """PrivacyError unless ``clipping`` is one of :data:`CLIPPINGS`."""
    if clipping not in CLIPPINGS:
        raise PrivacyError(
            f"clipping '{clipping}' is not accounted for", f"use one of: {', '.join(CLIPPINGS)}"
        )


def unit_sums(gradient: Tensor, units: Tensor) -> Tensor:
    """Sum the rows of each unit: (n, *shape) float32 → (units, *shape) float32.

    ``units`` (n,) int64: the unit of each row, from 0 without gaps.
    """
    count = int(units.max()) + 1 if len(units) else 0
    if count == len(units):  # every unit has one row
        return gradient if bool((units.diff() == 1).all()) else gradient[units.argsort()]
    return gradient.new_zeros((count, *gradient.shape[1:])).index_add_(0, units, gradient)


def add_clipped(
    sums: Sequence[Tensor],
    gradients: Sequence[Tensor | Factors],
    clipping_norm: float,
    clipping: str = FLAT,
    *,
    kept: Tensor | None = None,
) -> None:
    """Add every unit's clipped gradient to ``sums``, in place.

    ``gradients`` holds for each parameter the units' gradients, (units, *shape) float32 or
    bfloat16 in any memory layout, or :class:`~common.privacy.bookkeeping.factors.Factors` of
    them; ``sums`` for each parameter a contiguous float64 tensor of ``shape``. A unit whose
    gradient is not finite adds nothing, like one that was not sampled. An error instead would
    tell, without noise, that there is such a unit: a server can craft a model that overflows on
    one image. Units that are not ``kept``, (units,) bool, add nothing either. On a GPU nothing
    here waits for it. Raises PrivacyError for a rule that is none of :data:`CLIPPINGS`.
    """
    check_clipping(clipping)
    if len(gradients[0]) == 0:
        return
    # Many parameters are a few numbers only, and each pass over one has a cost of its own.
    small = [
        i for i, s in enumerate(sums) if s.numel() <= _SMALL and isinstance(gradients[i], Tensor)
    ]
    large = [i for i in range(len(sums)) if i not in small]
    found: list[_Rows | Factors] = [
        g if isinstance(g, Factors) else _Rows(g) for g in (gradients[i] for i in large)
    ]
    targets = [sums[i] for i in large]
    if small:
        rows = [full(dense(gradients[i])).flatten(1) for i in small]
        found.append(_Rows(torch.cat(rows, 1)))
        targets.append(sums[0].new_zeros(sum(sums[i].numel() for i in small)))
    norms = torch.stack([g.square_norms() for g in found]).sum(0).sqrt_()
    if clipping == AUTOMATIC:
        factors = clipping_norm * _MARGIN / (norms + STABILITY)
    else:
        factors = (clipping_norm * _MARGIN / norms).clamp_(max=1.0)
    wrong = ~torch.isfinite(norms)
    left_out = wrong if kept is None else wrong | ~kept
    factors.masked_fill_(left_out, 0.0)
    # 0 · NaN is NaN. To ask a GPU whether there is any is to wait for it.
    masked = wrong if norms.is_cuda or bool(wrong.any()) else None
    for total, gradient in zip(targets, found, strict=True):
        gradient.add_weighted(total, factors, masked)
    if small:
        pieces = torch.split(targets[-1], [sums[i].numel() for i in small])
        for i, piece in zip(small, pieces, strict=True):
            sums[i] += piece.view_as(sums[i])


class _Rows:
    """Units' gradients by one parameter, flat: (units, d), in the order that they lie in memory."""

    def __init__(self, gradient: Tensor) -> None:
        # Norms and sums are the same in any order, and a copy would take longer than either.
        self._axes = sorted(range(1, gradient.dim()), key=gradient.stride, reverse=True)
        self._rows = gradient.permute(0, *self._axes).reshape(len(gradient), -1)

    def square_norms(self) -> Tensor:
        """(units,) float64: the squared L2 norms."""
        if self._rows.dtype != torch.bfloat16:
            return _square_norms(self._rows)
        n, d = self._rows.shape  # exact in float32, and quick in pieces that fit in a core's cache
        cells = _CELLS[self._rows.device.type]
        width = max(1, 2 * cells // (n * _PIECE)) * _PIECE
        space = torch.empty(n * min(width, d), device=self._rows.device)
        squares = torch.zeros(n, dtype=torch.float64, device=self._rows.device)
        for start in range(0, d, width):
            piece = self._rows[:, start : start + width]
            squares += _square_norms(space[: piece.numel()].view(piece.shape).copy_(piece))
        return squares

    def add_weighted(self, total: Tensor, factors: Tensor, wrong: Tensor | None = None) -> None:
        """Add Σ_i factors[i] · gradient_i to ``total``, in place; ``wrong`` units count as 0."""
        aligned = total.permute([axis - 1 for axis in self._axes])
        here = aligned.is_contiguous()
        flat = aligned.view(-1) if here else total.new_zeros(total.numel())
        n = len(factors)
        width = max(1, _CELLS[self._rows.device.type] // n)
        space = factors.new_empty(n * min(width, len(flat)))
        with one_thread():
            for start in range(0, len(flat), width):
                piece = self._rows[:, start : start + width]
                exact = space[: piece.numel()].view(piece.shape).copy_(piece)
                if wrong is not None:
                    exact.masked_fill_(wrong.unsqueeze(1), 0.0)
                flat[start : start + width].addmv_(exact.t(), factors)
        if not here:
            aligned += flat.view(aligned.shape)


def _square_norms(rows: Tensor) -> Tensor:
    """(units, d) → (units,) float64: the squared L2 norms."""
    units, d = rows.shape
    whole = d // _PIECE * _PIECE
    pieces = rows[:, :whole].reshape(units, d // _PIECE, _PIECE)
    norms = torch.linalg.vector_norm(pieces, dim=2).to(torch.float64)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1).to(torch.float64)
    squares: Tensor = norms.square_().sum(1).add_(rest.square_())
    return squares

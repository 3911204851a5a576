"""Clipping the gradients of privacy units and summing them, with rounding that is accounted for.

A unit (an image, or a patient with all images in the batch) adds g · f to the sum, where g is the
*sum* of its images' gradients and the factor f is, by the clipping rule,

* ``flat``: min(1, C / ‖g‖) (Abadi et al. 2016, §3.1, with a unit for an example);
* ``automatic``: C / (‖g‖ + γ), γ = 0.01 (Bu et al., *Automatic Clipping: Differentially Private
  Deep Learning Made Easier and Stronger*, 2022, AUTO-S). Every gradient is scaled to nearly C, so
  C only scales the sum, and with it the learning rate: there is none to tune.

However many images there are, and by either rule, the sum moves by at most C when the unit goes.

Norms are float64, of the very numbers that are summed: the square of a float32 number, however
small or large, neither vanishes in float64 nor overflows it, so the factor is at most C / ‖g‖ for
every C > 0 and every gradient, and a norm is off by less than d·2^−53 of itself. (In float32 a norm
over entries below 1e-23 is 0, and its unit would be taken for one that needs no clipping; over five
million coordinates it comes out 1e-4 too small.) Sums are float64, too: over B units they are off
by up to B²·2^−53·C. C is taken 2^−16 smaller than it is, which covers both for up to 2^17 units in
a batch. Gradients in bfloat16 are no different: each number of one is exact in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
"""Squares are summed over so many numbers first: the longer a sum, the less exact it is."""
_SMALL = 1024
"""Parameters of up to so many numbers are taken together."""
_CELLS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Float64 numbers converted at once: 2 MB, which stays in a processor's cache (a quarter of that
takes twice as long: so many rows are read in short pieces); on a GPU 512 MB, since each piece is a
call of its own."""

_HELD = 1 << 20
"""Up to so many are kept from the norm to the sum: on a CPU converting takes longer than either."""


def check_clipping(clipping: str) -> None:
    """PrivacyError unless ``clipping`` is one of :data:`CLIPPINGS`."""
    if clipping not in CLIPPINGS:
        raise PrivacyError(
            f"clipping '{clipping}' is not accounted for", f"use one of: {', '.join(CLIPPINGS)}"
        )


def unit_sums(gradient: Tensor, units: Tensor) -> Tensor:
    """Sum the rows of each unit: (n, *shape) float32 → (units, *shape) float32.

    ``units`` (n,) int64: the unit of each row, from 0 without gaps. A unit's rows are added in
    their order, whatever other rows there are.
    """
    count = int(units.max()) + 1 if len(units) else 0
    if count == len(units):  # every unit has one row
        return gradient if bool((units.diff() == 1).all()) else gradient[units.argsort()]
    total = gradient.new_zeros((count, *gradient.shape[1:]))
    add_by_unit(total, units, gradient)
    return total


def add_by_unit(total: Tensor, units: Tensor, rows: Tensor) -> None:
    """Add each of ``rows`` (n, *shape) to its unit's place in ``total`` (units, *shape), in order.

    ``index_add_`` does so on a CPU. On a GPU it adds in an order that hangs on the moment, and with
    it the last digits of a sum, which a crafted model amplifies: there the first rows of all units
    go first, then the second ones.
    """
    if not rows.is_cuda:
        total.index_add_(0, units, rows)
        return
    order = units.argsort(stable=True)
    grouped = units[order]
    first = torch.searchsorted(grouped, grouped)
    rank = torch.arange(len(units), device=units.device) - first
    for number in range(int(rank.max()) + 1 if len(units) else 0):
        chosen = order[rank == number]
        total.index_add_(0, units[chosen], rows[chosen])


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
        self._exact: Tensor | None = None

    def square_norms(self) -> Tensor:
        """(units,) float64: the squared L2 norms."""
        squares = self._rows.new_zeros(len(self._rows), dtype=torch.float64)
        for _, exact in self._in_float64():
            n, d = exact.shape
            whole = d // _PIECE * _PIECE
            pieces = exact[:, :whole].view(n, d // _PIECE, _PIECE)
            squares += torch.linalg.vector_norm(pieces, dim=2).square_().sum(1)
            squares += torch.linalg.vector_norm(exact[:, whole:], dim=1).square_()
        return squares

    def _in_float64(self) -> Iterator[tuple[slice, Tensor]]:
        """(columns, all units' numbers there), in memory that is used again for the next ones."""
        n, d = self._rows.shape
        if not self._rows.is_cuda and self._rows.numel() <= _HELD:
            if self._exact is None:
                self._exact = self._rows.to(torch.float64)
            yield slice(0, d), self._exact
            return
        width = max(1, _CELLS[self._rows.device.type] // (max(1, n) * _PIECE)) * _PIECE
        space = self._rows.new_empty(n * min(width, d), dtype=torch.float64)
        for start in range(0, d, width):
            piece = self._rows[:, start : start + width]
            exact = space[: piece.numel()].view(piece.shape).copy_(piece)
            yield slice(start, start + width), exact

    def add_weighted(self, total: Tensor, factors: Tensor, wrong: Tensor | None = None) -> None:
        """Add Σ_i factors[i] · gradient_i to ``total``, in place; ``wrong`` units count as 0."""
        aligned = total.permute([axis - 1 for axis in self._axes])
        here = aligned.is_contiguous()
        flat = aligned.view(-1) if here else total.new_zeros(total.numel())
        with one_thread():
            for columns, exact in self._in_float64():
                if wrong is not None:
                    exact.masked_fill_(wrong.unsqueeze(1), 0.0)
                flat[columns].addmv_(exact.t(), factors)
        if not here:
            aligned += flat.view(aligned.shape)

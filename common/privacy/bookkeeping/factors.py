"""Per-unit gradients that are kept as factors, and never multiplied out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_NUMBERS = 1 << 22
"""Float64 numbers at once: 32 MiB."""

MOST_POSITIONS = 128
"""Beyond so many, the Gram matrices cost more than they save, and rounding grows."""

_CANCELLED = 2.0**-20
"""A squared norm is never taken for less than this share of (Σ ‖left‖·‖right‖)²."""


@dataclass
class Factors:
    """Unit i's gradient of a weight is Σ_t left[i, t] ⊗ right[i, t].

    So it is for a linear layer (``left``: gradients by its outputs, ``right``: its inputs, t: the
    positions of one unit) and for a convolution (``right``: its input's patches). Norms come from
    the two Gram matrices, (T, T) each ("ghost norms": Goodfellow, *Efficient per-example gradient
    computations*, 2015; Li et al. 2021, §4; for convolutions Bu et al. 2022), the weighted sum
    from one matrix product over all units. T·(out + in) numbers a unit instead of out·in.

    **Guaranteed**: norms are those of what is summed. Both are computed in float64, where products
    of float32 numbers are exact. A norm² is taken for at least 2^−20·(Σ_t ‖left‖·‖right‖)², which
    only a unit falls short of whose terms cancel to a thousandth; it is clipped more than need be.
    So rounding is below (out + in + T²)·2^−34 of a norm, and in the sum, of n units at once, below
    n·T·2^−43·C for each unit: small beside the 2^−16 that :mod:`common.privacy.clipping` leaves.
    """

    left: Tensor
    """(n, T, out), float32 or bfloat16."""
    right: Tensor
    """(n, T, in), likewise."""
    shape: tuple[int, ...]
    """The weight's shape: (out, in), or (out, channels, height, width) of a kernel; then ``in``
    is (height, width, channels)."""

    def __len__(self) -> int:
        return len(self.left)

    def square_norms(self) -> Tensor:
        """(n,) float64: the squared L2 norms."""
        found = torch.zeros(len(self), dtype=torch.float64, device=self.left.device)
        for rows, left, right in self._pieces():
            one, other = torch.bmm(left, left.mT), torch.bmm(right, right.mT)
            lengths = one.diagonal(dim1=1, dim2=2) * other.diagonal(dim1=1, dim2=2)
            bound = lengths.sqrt().sum(1).square_()
            found[rows] = torch.maximum(one.mul_(other).sum((1, 2)), _CANCELLED * bound)
        return found

    def add_weighted(self, total: Tensor, factors: Tensor, wrong: Tensor | None = None) -> None:
        """Add Σ_i factors[i] · gradient_i to ``total``, (*shape) float64, in place.

        Units that are ``wrong``, (n,) bool, have the gradient 0, whatever they hold.
        """
        for rows, left, right in self._pieces():
            if wrong is not None:
                left.masked_fill_(wrong[rows, None, None], 0.0)
                right.masked_fill_(wrong[rows, None, None], 0.0)
            left *= factors[rows, None, None]
            summed = left.flatten(0, 1).mT @ right.flatten(0, 1)
            total += self._arranged(summed)

    def first(self, n: int) -> Factors:
        """Those of the first ``n`` units."""
        return Factors(self.left[:n], self.right[:n], self.shape)

    def dense(self) -> Tensor:
        """Multiplied out: (n, *shape), in float32 or better."""
        return self._arranged(torch.bmm(full(self.left).mT, full(self.right)))

    def _pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(units, their left, their right) in float64."""
        each = self.left[0].numel() + self.right[0].numel() if len(self) else 1
        step = max(1, _NUMBERS // each)
        for start in range(0, len(self), step):
            rows = slice(start, start + step)
            yield rows, self.left[rows].to(torch.float64), self.right[rows].to(torch.float64)

    def _arranged(self, product: Tensor) -> Tensor:
        """(..., out, in) → (..., *shape)."""
        if len(self.shape) == 2:
            return product
        _, channels, height, width = self.shape
        return product.view(*product.shape[:-1], height, width, channels).movedim(-1, -3)


def full(tensor: Tensor) -> Tensor:
    """In float32, or whatever better it is in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def dense(gradients: Tensor | Factors) -> Tensor:
    """``gradients``, multiplied out if they are factors."""
    return gradients.dense() if isinstance(gradients, Factors) else gradients

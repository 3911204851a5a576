"""Features made even: centred and whitened by what was released of them with noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.fixed_shape import linear

# Norms are kept this little below their bound, so that float32 rounding never carries one over it.
_INSIDE = 1 - 2**-20


def unit(features: Tensor) -> Tensor:
    """Scale each row (n, d) to norm 1, less one millionth (a row of zeros stays)."""
    return functional.normalize(features, dim=1) * _INSIDE


def moment_matrix(packed: Tensor, d: int) -> Tensor:
    """The symmetric (d, d) of a second moment's (d (d + 1) / 2,).

    Packed as by :func:`common.privacy.statistics.statistic_sum`.
    """
    rows, columns = torch.triu_indices(d, d)
    full = torch.zeros(d, d, dtype=packed.dtype)
    values = packed * torch.where(rows == columns, 1.0, math.sqrt(0.5)).to(packed)
    full[rows, columns] = values
    full[columns, rows] = values
    return full


@dataclass(frozen=True)
class Whitening:
    """A public map of unit features to whitened unit features, made from noisy sums alone.

    Centre by ``mean`` (d,), scale to norm 1, apply ``matrix`` (d, k), scale to norm 1, and append
    ``bias`` as one more feature, scaled so that the whole has norm 1 again.
    """

    mean: Tensor
    matrix: Tensor
    bias: float

    def centred(self, features: Tensor) -> Tensor:
        """(n, d) -> (n, d) of norm 1, what the second moment is taken of."""
        return unit(features - self.mean)

    def __call__(self, features: Tensor) -> Tensor:
        """(n, d) -> (n, k + 1) of norm 1."""
        # The matrix's columns as a linear layer's rows: aligned, so that no picture's place shows.
        x = unit(linear(self.centred(features), self.matrix.T, None))
        constant = torch.full((len(x), 1), self.bias, dtype=x.dtype)
        return unit(torch.cat((x, constant), 1))


def whitening(
    mean: Tensor, packed: Tensor, count: float, *, ridge: float, bias: float
) -> Whitening:
    """The map that a noisy, packed second moment of centred features gives.

    ``count``: the announced number of pictures, exact or not.

    Eigenvalue λ is scaled by (max(λ, 0) + ridge / d)^(-1/2): ridge 1 is the mean eigenvalue of
    unit features, and keeps directions that are all noise from being blown up.
    """
    d = len(mean)
    values, vectors = torch.linalg.eigh((moment_matrix(packed, d) / count).double())
    scale = (values.clamp(min=0) + ridge / d) ** -0.5
    return Whitening(mean, (vectors * scale).to(mean).contiguous(), bias)

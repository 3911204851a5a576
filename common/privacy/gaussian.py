"""The Gaussian mechanism for a sum of clipped vectors, on a grid: low-order bits tell nothing.

Why. Added in floating point, sum + noise is not the Gaussian mechanism: which floats can come
out, and how often, depends on the sum, and an observer of a released number's low-order bits
may learn more than ε says (Mironov, *On Significance of the Least Significant Bits*, 2012; for
Gaussian noise Jin et al., *Are We There Yet?*, 2022, and Holohan & Braghin 2021).

How. Let s be the sum of vectors of norm ≤ C in d dimensions, γ the grid's step (public, a power
of two), R rounding to the nearest multiple of γ, and N ideal Gaussian noise of deviation
σ·(C + γ√d). Released is R(s) + R(N), as integers (multiples of γ), added exactly.

1. Each coordinate's rounding moves a difference by at most γ: |R(a) − R(b)| ≤ |a − b| + γ. With
   one vector more or less ‖s − s'‖ ≤ C, so ‖R(s) − R(s')‖ ≤ C + γ√d: the sensitivity of R(s).
2. R(s) is on the grid, so R(s) + R(N) = R(R(s) + N) (a tie has probability zero): a
   post-processing of the Gaussian mechanism of noise multiplier σ. So are the conversion to
   float32 and all that follows.

γ is at most 2^−10·C/√d, so grid-safety costs at most 0.1 % more noise, at most 2^−10·σ·C, so
that rounding is small beside the noise, and no finer, for a reason that step 4 below gives.

Not closed here:

3. Whether the vectors are clipped and summed as they should be. :mod:`common.privacy.clipping`
   does both with rounding that it covers by clipping to C·(1 − 2^−16). That an image's own gradient
   does not depend on what goes with it is not proved but measured, in each process, on the
   processor that computes it (:mod:`common.fixed_shape`): all passes have one shape, in which a
   row's result was the same to the bit at every place; where it is not, rows go one by one.
4. N is Box–Muller in float64, not ideal: near a cell's edge it errs by a few ulp, so that the
   probability of one cell is off by a factor 1 ± about 2^−51·σC/γ (2^−29 for σ = 1 and five
   million coordinates; errors of both signs). |N| ends at 12.1 deviations (probability 10^−33),
   on a GPU at 10.2 (10^−23).
5. How long the computation takes, which depends on how many images a batch holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import PrivacyError
from common.privacy.chacha import key_tensor
from common.privacy.device_noise import normals
from common.privacy.randomness import LARGEST_CHUNK, SecureRandom
from common.privacy.threads import one_thread

_EXACT = 2.0**52
"""Integers below this, and the sum of two of them, are exact in float64."""

_REACH = 12.2
"""No normal of :class:`SecureRandom` is larger."""


@dataclass(frozen=True)
class GaussianSum:
    """The Gaussian mechanism for sums of vectors of L2 norm ≤ C in ``dimension`` coordinates.

    The release is that of one Gaussian mechanism of ``noise_multiplier`` σ under adding or
    removing one vector: account for it as such (:class:`common.privacy.accounting.Event`).
    Raises PrivacyError for a σ or C that is not positive and finite, or out of float64's range.
    """

    noise_multiplier: float
    clipping_norm: float
    dimension: int

    def __post_init__(self) -> None:
        sigma, clip, d = self.noise_multiplier, self.clipping_norm, self.dimension
        if not (sigma > 0 and clip > 0 and math.isfinite(sigma * clip) and d >= 1):
            raise PrivacyError(
                f"{self} is no Gaussian mechanism", "use σ > 0, C > 0, dimension ≥ 1"
            )
        if not (self.step >= 2.0**-1000 and _REACH * self.std / self.step < _EXACT):
            raise PrivacyError(
                f"the grid of {self} is too fine for float64",
                "use a σ between 1e-9 and 1e6 and a clipping norm near 1",
            )

    @property
    def step(self) -> float:
        """γ, the grid's step: a power of two."""
        finest = min(1.0 / math.sqrt(self.dimension), self.noise_multiplier)
        exponent = math.frexp(self.clipping_norm * finest)[1] - 1  # the power of two at or below
        return math.ldexp(1.0, exponent - 10)

    @property
    def std(self) -> float:
        """σ·(C + γ√d): the standard deviation of the noise on each coordinate."""
        return self.noise_multiplier * (self.clipping_norm + self.step * math.sqrt(self.dimension))

    def release(self, values: Tensor, random: SecureRandom) -> Tensor:
        """``values`` (float32 or float64, any shape) with noise, on the grid, as float32.

        ``values`` may be a part of the sum, such as one layer; all parts together must have
        ``dimension`` coordinates, each released once. Raises PrivacyError where ``values``
        holds NaN or infinity, to which noise adds nothing, or numbers too large for the grid.
        """
        out = torch.empty(values.numel(), dtype=torch.float32, device=values.device)
        for start, whole in self._integers(values, random):
            out[start : start + len(whole)] = whole.mul_(self.step)
        return out.reshape(values.shape)

    def release_integers(self, values: Tensor, random: SecureRandom) -> np.ndarray:
        """The same as the integers that multiply :attr:`step`: (n,) int64, ``values`` flattened."""
        out = np.empty(values.numel(), dtype=np.int64)
        for start, whole in self._integers(values, random):
            out[start : start + len(whole)] = whole.cpu().numpy()
        return out

    def _integers(self, values: Tensor, random: SecureRandom) -> Iterator[tuple[int, Tensor]]:
        """(first index, noisy multiples of the step in float64, exact), chunk by chunk."""
        flat = values.detach().reshape(-1)
        n, step, std = flat.numel(), self.step, self.std / self.step
        if n > self.dimension:
            raise PrivacyError(
                f"{n} values in a sum of {self.dimension} coordinates",
                "count every trainable parameter in the dimension",
            )
        if n:
            check_size(flat, self)
        if flat.is_cuda:
            noise = normals(key_tensor(random.stream_key(), flat.device), n)
            yield 0, noisy_integers(flat, noise, 1.0 / step, std)
            return
        space = torch.empty(min(n, LARGEST_CHUNK), dtype=torch.float64)
        with one_thread():
            for start, noise in random.normal_chunks(n):
                end = start + len(noise)
                whole = space[: len(noise)].copy_(flat[start:end]).mul_(1.0 / step).round_()
                yield start, noise.mul_(std).round_().add_(whole)  # integers: exact


def noisy_integers(
    values: Tensor, noise: Tensor, per_step: float | Tensor, std: float | Tensor
) -> Tensor:
    """``values`` in steps (times ``per_step``), rounded, plus ``noise`` · ``std``, rounded.

    Float64 of the values' shape, exact integers; ``noise`` (float64, standard normal) is used up.
    """
    whole = values.to(torch.float64).mul(per_step).round_()
    return noise.mul_(std).round_().add_(whole)


def check_size(flat: Tensor, mechanism: GaussianSum) -> None:
    """PrivacyError unless all of ``flat`` is finite and fits on the mechanism's grid."""
    limit = _EXACT * mechanism.step
    low, high = torch.aminmax(flat)  # NaN if any is
    if not (float(low) > -limit and float(high) < limit):
        raise PrivacyError(
            "the sum to be released holds NaN, infinity or a number far beyond the clipping norm",
            "lower the learning rate, or check the images; nothing was released",
        )

"""Distributed Gaussian noise: every hospital adds a share, and only a sum with enough is opened.

One round is one DP-SGD step over the union of the hospitals' images: each hospital draws a Poisson
batch at the same public rate, clips each image's gradient to C, sums them and releases, into
secure aggregation and nowhere else,

    y_i = R(s_i) + R(N_i),    N_i ~ Gauss(0, σ² (C + γ√d)² / (m − c)),

integers (multiples of the public step γ). R rounds to the nearest multiple; m is the fewest
hospitals whose sum secure aggregation opens (min-cohort, which every hospital enforces by itself:
common/secagg); c of them are taken to be known to whoever looks (colluders; a curious hospital
knows its own share). So every sum that is opened holds at least m − c shares that nobody knows.

1. An image is at one hospital, where it is in the batch or not: the R(s_i) change by at most
   C + γ√d in L2 norm, as in :mod:`common.privacy.gaussian`; their sum by as much.
2. Given the fractional parts N_i − R(N_i), each R(N_i) is a Gaussian on a shifted grid, and the sum
   of n of them is one, too, up to a relative error below 10·n·exp(−π² (σ_i/γ)²) (Kairouz, Liu,
   Steinke, *The Distributed Discrete Gaussian Mechanism*, 2021, on sums of discrete Gaussians; the
   step here keeps σ_i/γ at 2^10 or more, where this is 10^−4000000). A Gaussian on a grid that has
   the difference has at most the Rényi divergences of the continuous one (Canonne, Kamath,
   Steinke, *The Discrete Gaussian for Differential Privacy*, 2020). So the release counts as one
   Gaussian step of noise multiplier σ, subsampled at q: the accountants' Event(σ, q, T).
3. It is a promise of the sum alone. Against who sees one hospital's y_i (secure aggregation broken,
   or m − 1 others colluding) the noise is smaller by √(m − c): :meth:`NoiseShares.against_a_break`.

It holds for one step a round: after a second local step a hospital's vector is no clipped sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from common.errors import PrivacyError
from common.privacy.gaussian import GaussianSum
from common.privacy.randomness import SecureRandom

_REACH = 12.2
"""No normal of :class:`SecureRandom` is larger."""


@dataclass(frozen=True, kw_only=True)
class NoiseShares:
    """The mechanism of one round, from public figures alone: the same at all hospitals.

    PrivacyError for figures with which there is no such mechanism.
    """

    noise_multiplier: float
    """σ of the sum, in clipping norms: what is accounted for."""
    clipping_norm: float
    """C: the largest L2 norm of one privacy unit's gradient."""
    dimension: int
    """d: coordinates of the sum."""
    fewest: int
    """m: hospitals whose shares are in any sum that is opened, at least."""
    known: int = 1
    """c: of them, how many shares may be known to who looks."""

    def __post_init__(self) -> None:
        if not 0 <= self.known < self.fewest:
            raise PrivacyError(
                f"{self.known} known shares of {self.fewest} leave no noise that nobody knows",
                "set tolerated-colluders below min-cohort",
            )
        _ = self.share

    @property
    def share(self) -> GaussianSum:
        """One hospital's noise: a Gaussian of multiplier σ/√(m − c) on its own grid."""
        return GaussianSum(
            self.noise_multiplier / math.sqrt(self.fewest - self.known),
            self.clipping_norm, self.dimension,
        )  # fmt: skip

    @property
    def step(self) -> float:
        """γ, a power of two: what one in the released integers means."""
        return self.share.step

    @property
    def std(self) -> float:
        """Standard deviation of one hospital's noise on each coordinate."""
        return self.share.std

    def release(self, values: Tensor, random: SecureRandom) -> np.ndarray:
        """(d,) clipped sum of one hospital's batch → (d,) int64 with its share of the noise.

        PrivacyError for another length, NaN, infinity or a sum that is out of float64's range.
        """
        flat = values.detach().reshape(-1)
        if flat.numel() != self.dimension:
            raise PrivacyError(
                f"{flat.numel()} values in a sum of {self.dimension} coordinates",
                "release every trainable parameter, each once",
            )
        return self.share.release_integers(flat, random)

    def values(self, total: np.ndarray) -> np.ndarray:
        """(d,) float64: the noisy sum that the (d,) integers ``total`` stand for."""
        return np.asarray(total, dtype=np.float64) * self.step

    def largest(self, units: int, hospitals: int = 1) -> int:
        """Most that one integer of a sum over ``units`` and ``hospitals`` can be, in the ring."""
        noise = _REACH * self.std * math.sqrt(hospitals)
        return math.ceil((units * self.clipping_norm + noise) / self.step) + 2 * hospitals

    def in_sum(self, hospitals: int, known: int = 0) -> float:
        """Noise multiplier of a sum over ``hospitals``, of which ``known`` shares are known."""
        unknown = hospitals - known
        if unknown <= 0:
            return 0.0
        return self.noise_multiplier * math.sqrt(unknown / (self.fewest - self.known))

    def against_a_break(self) -> float:
        """Noise multiplier that is left where one hospital's vector is seen by itself."""
        return self.in_sum(1)

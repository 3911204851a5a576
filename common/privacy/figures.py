"""A model's validation figures as one Gaussian sum: nothing exact about an image is told.

Each privacy unit (a patient counts as the mean of their images) contributes the vector
(correct − ½, loss / L − ½), whose norm is at most 1/√2; centring halves the sensitivity. The sum
over units carries the noise, and the number of units is the one that the run's plan released. The
accuracy that comes out is off by about σ / (√2 n) of a hospital's n units, and the mean over many
hospitals by less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from common.privacy.gaussian import GaussianSum
from common.privacy.randomness import SecureRandom

LOSS_CLIP = 6.0
"""L: a larger cross-entropy (a probability below e^-6) counts as this."""

NORM = math.sqrt(0.5) * (1 + 2.0**-20)
"""Of one unit's vector; what is above 1/√2 covers the rounding of float64 sums over 2^20 units."""


@dataclass(frozen=True)
class Figures:
    """Sums over ``examples`` images (or privacy units): right answers, cross-entropy."""

    examples: int
    correct: float
    loss_sum: float


def noised(
    probabilities: np.ndarray,
    labels: np.ndarray,
    units: np.ndarray,
    *,
    count: int,
    noise_multiplier: float,
    random: SecureRandom | None = None,
) -> Figures:
    """The noised figures of class ``probabilities`` (N, K) for ``labels`` (N,).

    ``units`` (N,) numbers each image's privacy unit from 0; ``count`` is their released number.
    One release costs one Gaussian event at q = 1. An image whose probabilities are not finite
    counts as wrong with the largest loss: an error would tell, without noise, that it is there.
    """
    total = torch.from_numpy(exact_sums(probabilities, labels, units))
    mechanism = GaussianSum(noise_multiplier, NORM, 2)
    correct, losses = mechanism.release(total, random or SecureRandom()).tolist()
    return Figures(count, count / 2 + correct, LOSS_CLIP * (count / 2 + losses))


def exact_sums(probabilities: np.ndarray, labels: np.ndarray, units: np.ndarray) -> np.ndarray:
    """(2,) float64: what :func:`noised` adds its noise to. A unit moves it by :data:`NORM` at most.

    Private: for the mechanism, and for who measures that it keeps its promise.
    """
    wrong = ~np.isfinite(probabilities).all(axis=1)
    right = ((probabilities.argmax(1) == labels) & ~wrong).astype(np.float64)
    chosen = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    chosen[wrong] = 0.0
    loss = np.minimum(-np.log(np.maximum(chosen, math.exp(-LOSS_CLIP))), LOSS_CLIP)
    each = np.stack([right, np.maximum(loss, 0.0) / LOSS_CLIP], axis=1)
    sizes = np.bincount(units)
    means = np.stack([np.bincount(units, weights=column) / sizes for column in each.T])
    total: np.ndarray = (means - 0.5).sum(axis=1)
    return total

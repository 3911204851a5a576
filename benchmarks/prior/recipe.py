"""The whole recipe of a private head in one place: what is released, in which order, at which cost.

The same steps serve distributed noise (one share of noise in all, multiplier σ) and local noise
(each of n hospitals adds its own: √n times as much on the total): only the noise callable differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor

from benchmarks.prior import sums
from common.errors import PrivacyError
from common.prior.whitening import Whitening, unit, whitening

AddNoise = Callable[[Tensor, float], Tensor]
"""(exact total, standard deviation σ × bound) -> noisy total. The callable may scale the noise up
(local noise); it must never scale it down."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class HeadPlan:
    """Hyperparameters of a private head; the noise of the gradients follows from μ.

    ``mean_noise`` and ``moment_noise`` are noise multipliers of the one release each. What is left
    of μ is spread evenly over ``steps`` gradient releases, each picture clipped to ``clip``.
    """

    mean_noise: float = 20.0
    moment_noise: float = 1.5
    ridge: float = 1.0
    bias: float = 0.1
    steps: int = 120
    rate: float = 64.0
    clip: float = 0.25
    momentum: float = 0.9
    decay: float = 1e-5
    average_from: float = 0.5

    def gradient_noise(self, mu: float) -> float:
        """The noise multiplier of each gradient release, for ``mu`` over everything.

        Raises :class:`PrivacyError` if mean and second moment alone cost that much.
        """
        left = mu**2 - self.mean_noise**-2 - self.moment_noise**-2
        if left <= 0:
            raise PrivacyError(
                f"Mean and second moment alone spend more than the whole budget (μ = {mu:.3g}).",
                "Raise epsilon, or the noise multipliers of the mean and the second moment.",
            )
        return math.sqrt(self.steps / left)

    def at(self, mu: float, tuned: float) -> HeadPlan:
        """The same shares of ``mu``; settings were ``tuned`` for that μ."""
        ratio = tuned / mu
        return replace(
            self, mean_noise=self.mean_noise * ratio, moment_noise=self.moment_noise * ratio
        )

    def multipliers(self, mu: float) -> list[float]:
        """Every release's noise multiplier, in order, for an accountant."""
        return [self.mean_noise, self.moment_noise, *[self.gradient_noise(mu)] * self.steps]


# Both were chosen by accuracy on BloodMNIST's validation split, for epsilon 6 and ten hospitals;
# clip and decay of shared noise later on held-out training images (benchmarks/README.md).
DISTRIBUTED = HeadPlan()
LOCAL = HeadPlan(moment_noise=4.0, ridge=4.0, steps=100, clip=0.2, decay=0.0)


@dataclass(frozen=True)
class LinearHead:
    """What training gives: the public whitening, and weights (classes, k + 1) for its features."""

    whitening: Whitening
    weights: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(n, d) unit features -> (n, classes)."""
        return self.whitening(features) @ self.weights.T


def fit_head(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    plan: HeadPlan,
    mu: float,
    count: float,
    add_noise: AddNoise,
) -> LinearHead:
    """Run the recipe over pictures that lie in one place (a simulation, or a central trainer).

    ``features`` (n, d) of norm at most 1; ``count`` is the announced number of pictures. All that
    depends on pictures passes through ``add_noise``.
    """
    mean = add_noise(sums.feature_sum(features), plan.mean_noise) / count
    packed = add_noise(sums.moment_sum(unit(features - mean)), plan.moment_noise)
    found = whitening(mean, packed, count, ridge=plan.ridge, bias=plan.bias)
    white = found(features)
    descent = sums.Descent(
        torch.zeros(classes, white.shape[1]),
        rate=plan.rate,
        count=count,
        steps=plan.steps,
        momentum=plan.momentum,
        decay=plan.decay,
        average_from=plan.average_from,
    )
    deviation = plan.gradient_noise(mu) * plan.clip
    for _ in range(plan.steps):
        total = sums.gradient_sum(white, labels, descent.weights, plan.clip)
        descent.step(add_noise(total, deviation))
    return LinearHead(found, descent.result())


def total_mu(multipliers: list[float]) -> float:
    """μ of all releases together, from each one's noise multiplier."""
    return math.sqrt(sum(1 / sigma**2 for sigma in multipliers))


def delta_of(mu: float, epsilon: float) -> float:
    """The smallest δ of a Gaussian mechanism with ``mu`` (Balle and Wang 2018, theorem 8)."""
    lower = _NORMAL.cdf(-epsilon / mu - mu / 2)
    return _NORMAL.cdf(-epsilon / mu + mu / 2) - (math.exp(epsilon) * lower if lower else 0.0)


def largest_mu(epsilon: float, delta: float) -> float:
    """The largest μ that is (``epsilon``, ``delta``)-differentially private, to 1e-9, from below.

    A planning aid: what is *reported* comes from the accountants of :mod:`common.privacy`.
    """
    if not (0 < epsilon <= 100 and 0 < delta < 1):
        raise PrivacyError(
            f"epsilon {epsilon} with delta {delta}.",
            "Use an epsilon above 0 and up to 100, and a delta between 0 and 1.",
        )
    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, epsilon) <= delta else (low, middle)
    return low

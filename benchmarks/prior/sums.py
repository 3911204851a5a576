"""Sums over pictures as hospitals make them, in one place and without the federation: to tune with.

Each picture's share is bounded in L2 norm; Gaussian noise is added to the total by whoever calls.
Three sums: :func:`feature_sum` (bound 1), :func:`moment_sum` (bound 1), :func:`gradient_sum`
(bound C). Each release at noise multiplier σ is a Gaussian mechanism with μ = 1/σ, and with all
pictures in every release μ composes exactly: μ² = Σ 1/σᵢ² (Dong, Roth and Su 2019, *Gaussian
Differential Privacy*, corollary 3.3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.errors import PrivacyError

_INSIDE = 1 - 2**-20
"""Clipped norms are kept this little below their bound: float32 never carries one over it."""


def _bounded(features: Tensor) -> Tensor:
    norms = features.double().norm(dim=1)
    if not bool((norms <= 1).all()):  # NaN fails too
        raise PrivacyError(
            "A feature vector has a norm above 1 or is not a number.",
            "Scale features with common.prior.whitening.unit first; the privacy bound rests on it.",
        )
    return features


def feature_sum(features: Tensor) -> Tensor:
    """(n, d) of norm at most 1 -> (d,): each picture moves the sum by at most 1."""
    return _bounded(features).sum(0)


def moment_sum(features: Tensor) -> Tensor:
    """(n, d) of norm at most 1 -> (d (d + 1) / 2,): the second moment's upper triangle, summed.

    Off-diagonal entries are scaled by √2, so that one picture's L2 norm is exactly its squared
    norm, at most 1.
    """
    d = features.shape[1]
    x = _bounded(features)
    rows, columns = torch.triu_indices(d, d)
    scale = torch.where(rows == columns, 1.0, math.sqrt(2)).to(x)
    return (x.T @ x)[rows, columns] * scale


def gradient_sum(features: Tensor, labels: Tensor, weights: Tensor, clip: float) -> Tensor:
    """Sum of per-picture softmax gradients, each clipped to L2 norm ``clip``.

    ``features`` (n, d), ``labels`` (n,), ``weights`` (classes, d); the result is like ``weights``.
    One picture's gradient is (p - y) xᵀ, of norm ‖p - y‖ ‖x‖, so none is ever built.
    """
    error: Tensor = torch.softmax(_bounded(features) @ weights.T, 1)
    error[torch.arange(len(labels)), labels] -= 1
    if not bool(torch.isfinite(error).all()):
        raise PrivacyError(
            "The head's weights hold NaN or infinity.",
            "Stop this run; lower the learning rate in the next.",
        )
    norms = error.norm(dim=1) * features.norm(dim=1)
    error = error * (clip * _INSIDE / norms.clamp(min=clip))[:, None]
    total: Tensor = error.T @ features
    return total


class Descent:
    """Gradient descent with momentum from noisy sums, and an average of the later iterates."""

    def __init__(
        self,
        start: Tensor,
        *,
        rate: float,
        count: float,
        steps: int,
        momentum: float = 0.9,
        decay: float = 0.0,
        average_from: float = 0.5,
    ) -> None:
        """``average_from`` is the fraction of ``steps`` after which iterates are averaged."""
        self.weights = start.clone()
        self._velocity = torch.zeros_like(start)
        self._average, self._averaged = torch.zeros_like(start), 0
        self._rate, self._momentum, self._count, self._decay = rate, momentum, count, decay
        self._from, self.taken = average_from * steps, 0

    def step(self, noisy_gradient_sum: Tensor) -> None:
        """Go one step along a noisy :func:`gradient_sum` taken at ``weights``."""
        gradient = noisy_gradient_sum / self._count + self._decay * self.weights
        self._velocity = self._momentum * self._velocity + gradient
        self.weights = self.weights - self._rate * self._velocity
        self.taken += 1
        if self.taken > self._from:
            self._averaged += 1
            self._average += (self.weights - self._average) / self._averaged

    def result(self) -> Tensor:
        """The average of the later iterates (the last one, if none was averaged yet)."""
        return self._average if self._averaged else self.weights

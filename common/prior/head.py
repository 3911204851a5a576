"""The mathematics of a private linear head on frozen features; no network, no protocol, no noise.

A hospital computes *sums over its pictures*, each picture's share bounded in L2 norm; somebody adds
Gaussian noise to the total; the coordinator goes on with the noisy total alone. Three sums:

1. :func:`feature_sum` (bound 1): the mean, to centre features with;
2. :func:`moment_sum` (bound 1): the second moment, to whiten them with;
3. :func:`gradient_sum` (bound C): softmax gradients, once a step, of every picture (q = 1).

Each release at noise multiplier σ is a Gaussian mechanism with μ = 1/σ; with all pictures in every
release, μ composes exactly: μ² = Σ 1/σᵢ² (Dong, Roth and Su 2019, "Gaussian Differential Privacy",
corollary 3.3). Bounds are for adding or removing one picture. The number of pictures is private:
every ``count`` below is an *announced* number, exact or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from common.errors import PrivacyError

# Norms are kept this little below their bound, so that float32 rounding never carries one over it.
_INSIDE = 1 - 2**-20


def unit(features: Tensor) -> Tensor:
    """Scale each row (n, d) to norm 1, less one millionth (a row of zeros stays)."""
    return functional.normalize(features, dim=1) * _INSIDE


def _bounded(features: Tensor) -> Tensor:
    norms = features.double().norm(dim=1)
    if not bool((norms <= 1).all()):  # NaN fails too
        raise PrivacyError(
            "A feature vector has a norm above 1 or is not a number.",
            "Scale features with common.prior.head.unit first; the privacy bound rests on it.",
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


def moment_matrix(packed: Tensor, d: int) -> Tensor:
    """Undo the packing of :func:`moment_sum`: (d (d + 1) / 2,) -> symmetric (d, d)."""
    rows, columns = torch.triu_indices(d, d)
    full = torch.zeros(d, d, dtype=packed.dtype)
    values = packed * torch.where(rows == columns, 1.0, math.sqrt(0.5)).to(packed)
    full[rows, columns] = values
    full[columns, rows] = values
    return full


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
        """(n, d) -> (n, d) of norm 1, what :func:`moment_sum` is taken of."""
        return unit(features - self.mean)

    def __call__(self, features: Tensor) -> Tensor:
        """(n, d) -> (n, k + 1) of norm 1."""
        x = unit(self.centred(features) @ self.matrix)
        constant = torch.full((len(x), 1), self.bias, dtype=x.dtype)
        return unit(torch.cat((x, constant), 1))


def noisy_mean(total: Tensor, count: float) -> Tensor:
    """The mean (d,) from a noisy :func:`feature_sum` and the announced count."""
    return total / count


def whitening(
    mean: Tensor, packed: Tensor, count: float, *, ridge: float, bias: float
) -> Whitening:
    """Make the map from a noisy :func:`moment_sum` of centred features.

    Eigenvalue λ is scaled by (max(λ, 0) + ridge / d)^(-1/2): ridge 1 is the mean eigenvalue of
    unit features, and keeps directions that are all noise from being blown up.
    """
    d = len(mean)
    values, vectors = torch.linalg.eigh((moment_matrix(packed, d) / count).double())
    scale = (values.clamp(min=0) + ridge / d) ** -0.5
    return Whitening(mean, (vectors * scale).to(mean).contiguous(), bias)


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

"""Auditing in one run: many canaries, each in or out by a coin (Steinke, Nasr, Jagielski 2023).

One training of DPResNet through the real trainer; the auditor sees the weights before and after
and guesses the coins of those canaries of which it is surest. A bound from one run is loose: even
with the best possible scores it reaches a fraction of ε.

Canaries are patients, of eight pictures with the eight labels: the part of a gradient that all
images share, most of it, then cancels, and what is left of two canaries is nearly orthogonal.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.audit.statistics import Floats, one_run_bound
from benchmarks.audit.trainers import Trainer, flat
from common.model import Weights, set_weights
from common.privacy.randomness import SecureRandom
from common.training import PrivateStep, TrainSettings

PICTURES = 8
"""Of a canary: one for each label."""


@dataclass(frozen=True)
class Canaries:
    """``images`` (m·8, C, H, W) and ``labels``: eight pictures each, one after the other."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels) // PICTURES

    @property
    def units(self) -> Tensor:
        """(m·8,) int64: which canary each picture is of."""
        return torch.arange(len(self)).repeat_interleave(PICTURES)


def from_pictures(images: Tensor, rng: np.random.Generator) -> Canaries:
    """Canaries from given pictures (their number a multiple of eight), labels shuffled."""
    labels = [rng.permutation(PICTURES) for _ in range(len(images) // PICTURES)]
    return Canaries(images, torch.from_numpy(np.concatenate(labels)))


def striped(count: int, rng: np.random.Generator, size: int = 28) -> Canaries:
    """``count`` canaries of stripes, each of its own frequency, direction and colour."""
    y, x = np.mgrid[:size, :size] / size
    images = np.empty((count * PICTURES, 3, size, size), dtype=np.float32)
    colours = np.array([c for c in np.ndindex(3, 3, 3) if c != (1, 1, 1)]) - 1.0
    for image in images:
        down, across = rng.uniform(-size / 2, size / 2, 2)
        stripes = np.sign(np.sin(2 * np.pi * (down * y + across * x) + rng.uniform(0, 2 * np.pi)))
        image[:] = colours[rng.integers(len(colours))][:, None, None] * stripes
    return from_pictures(torch.from_numpy(images), rng)


def gradients(model: nn.Module, start: Weights, canaries: Canaries) -> Floats:
    """(m, d) float64: each canary's summed gradient at ``start``, by autograd alone."""
    set_weights(model, start)
    parameters = list(model.parameters())
    rows = []
    for x, y in zip(
        *(torch.split(t, PICTURES) for t in (canaries.images, canaries.labels)), strict=True
    ):
        loss = F.cross_entropy(model(x), y, reduction="sum")
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows).double().numpy()


@dataclass(frozen=True)
class Guesses:
    """How the auditor did, and the bound that follows."""

    canaries: int
    guesses: int
    correct: int
    bound: float


def audit_in_one_run(
    trainer: Trainer,
    model: nn.Module,
    start: Weights,
    canaries: Canaries,
    step: PrivateStep,
    *,
    learning_rate: float,
    guesses: int,
    delta: float,
    confidence: float,
    random: SecureRandom | None = None,
) -> Guesses:
    """Train once with about half of the canaries and guess ``guesses`` of the coins.

    Half of the guesses say "in", for the largest scores, half "out". The scores are a ridge
    regression of the update on the canaries' clipped gradients at the start, which undoes what
    one canary's gradient has in common with the others'. Coins and noise are the operating
    system's, or those of ``random``.
    """
    random = random or SecureRandom()
    coins = random.bernoulli(len(canaries), 0.5)
    rows = torch.from_numpy(np.repeat(coins, PICTURES))
    settings = TrainSettings(
        epochs=1, batch_size=1, learning_rate=learning_rate, optimizer="sgd", privacy=step
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus: a full backward hook without inputs' gradients
        update = trainer.update(
            model,
            start,
            canaries.images[rows],
            canaries.labels[rows],
            settings,
            units=canaries.units[rows],
            random=random,
        )
    scores = _scores(gradients(model, start, canaries), flat(update), step, learning_rate)
    order = np.argsort(scores)
    half = guesses // 2
    correct = int((~coins[order[:half]]).sum() + coins[order[-half:]].sum())
    bound = one_run_bound(len(canaries), 2 * half, correct, delta=delta, confidence=confidence)
    return Guesses(len(canaries), 2 * half, correct, bound)


def _scores(gradients: Floats, update: Floats, step: PrivateStep, learning_rate: float) -> Floats:
    """The expected coins, each less a half, given the update and a first-order model of it."""
    norms = np.linalg.norm(gradients, axis=1)
    unit = gradients * np.minimum(1.0 / step.clipping_norm, 1.0 / norms)[:, None]
    # Under SGD with momentum 0.9 step t of T counts (1 − 0.9^(T − t + 1)) / 0.1 in the update.
    weights = (1 - 0.9 ** np.arange(1, step.steps + 1)) / 0.1
    moved_by_one = learning_rate * step.clipping_norm / step.expected_batch_size
    moved = -update / (moved_by_one * step.sampling_rate * weights.sum()) - 0.5 * unit.sum(0)
    inner = unit @ unit.T
    projected = unit @ moved
    # What no canary can explain is noise, whatever the trainer claims of it.
    explained = projected @ np.linalg.lstsq(inner, projected, rcond=None)[0]
    noise = max(float(moved @ moved - explained), 0.0) / (len(update) - len(unit))
    penalty = 4.0 * noise + 1e-9  # a coin's variance is a quarter
    solved = np.linalg.solve(inner + penalty * np.eye(len(unit)), projected)
    return np.asarray(solved, dtype=np.float64)

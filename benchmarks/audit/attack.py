"""The white-box canary attack: is one canary in the update that leaves the hospital?

The auditor is as strong as the guarantee allows: it knows the weights at the start, all other
images, the canary, and every setting; only batches and noise are hidden from it. It runs the
trainer many times with and without the canary and scores each run by the update's projection on
the direction in which the canary moves it (Nasr et al. 2021, 2023).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.audit.statistics import Floats
from benchmarks.audit.trainers import Trainer, flat
from common.model import Weights, get_weights
from common.privacy.randomness import SecureRandom
from common.training import PrivateStep, TrainSettings

SIZE = 7
"""Height and width of the tiny network's images."""
CLASSES = 4
PICTURES = 8
"""Of a canary that is a patient."""


@dataclass(frozen=True)
class Canary:
    """One privacy unit that may be there or not: ``images`` (k, C, H, W), ``labels`` (k,)."""

    name: str
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Case:
    """What the trainer is run on: a network with its start, the other images, the canaries."""

    model: nn.Module
    start: Weights
    images: Tensor
    labels: Tensor
    canaries: tuple[Canary, ...]
    settings: TrainSettings

    def with_step(self, **changes: Any) -> Case:
        """The same with other figures of the private step."""
        assert self.settings.privacy is not None
        step = replace(self.settings.privacy, **changes)
        return replace(self, settings=replace(self.settings, privacy=step))


def tiny_network() -> nn.Module:
    """Unpadded convolution, group norm, pooling, linear: 140 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES),
    )  # fmt: skip


def tiny_case(pictures: Tensor, *, sigma: float, steps: int = 1, rate: float = 1.0) -> Case:
    """``pictures`` (N, 3, H, W), shrunk to 7×7, faint and of class 0; canaries from the last one.

    The guarantee holds for every start and all data, so both are chosen to show what breaks it:
    a convolution that is small before its group norm, so that its gradient is most of the whole,
    a large head, so that logits differ widely, and faint images of one class, so that their
    gradients point the same way and do not cancel when a canary moves them all.
    """
    small = F.adaptive_avg_pool2d(pictures, SIZE)
    others, spare = 0.1 * small[:-1], small[-1:].clone()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = tiny_network()
    start = get_weights(model)
    start["0.weight"], start["0.bias"] = 0.05 * start["0.weight"], 0.05 * start["0.bias"]
    start["5.weight"] = 20.0 * start["5.weight"]
    settings = TrainSettings(
        epochs=1, batch_size=1, learning_rate=0.01, optimizer="sgd",
        privacy=PrivateStep(
            noise_multiplier=sigma, clipping_norm=1.0, sampling_rate=rate, steps=steps,
            expected_batch_size=len(others) * rate,
        ),
    )  # fmt: skip
    labels = torch.zeros(len(others), dtype=torch.int64)
    return Case(model, start, others, labels, _canaries(spare), settings)


def _canaries(spare: Tensor) -> tuple[Canary, ...]:
    """An ordinary picture and four odd ones, each under every label."""
    board = torch.ones_like(spare)
    board[..., ::2, ::2] = -1.0
    red = -torch.ones_like(spare)
    red[:, 0] = 1.0
    above, yellow = spare.clone(), red.clone()
    yellow[:, 1] = 1.0
    for image in (above, yellow):
        image[..., : SIZE // 2, :] = 0.0
    kinds = {
        "ordinary": spare, "checkerboard": board, "red": red, "blank above": above,
        "blank above, yellow below": yellow,
    }  # fmt: skip
    return tuple(
        Canary(f"{name}, label {label}", image, torch.tensor([label]))
        for name, image in kinds.items()
        for label in range(CLASSES)
    )


def patient(canary: Canary, pictures: int = PICTURES) -> Canary:
    """A patient with so many copies of the canary's picture."""
    return Canary(
        f"patient, {canary.name}", canary.images.repeat(pictures, 1, 1, 1),
        canary.labels.repeat(pictures),
    )  # fmt: skip


def run(
    trainer: Trainer, case: Case, canary: Canary | None, random: SecureRandom | None = None
) -> Floats:
    """One run's update, flat; None: without a canary."""
    images, labels = case.images, case.labels
    units = None
    if canary is not None:
        images = torch.cat([images, canary.images])
        labels = torch.cat([labels, canary.labels])
        if len(canary.labels) > 1:
            units = torch.arange(len(labels)).clamp(max=len(case.labels))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus: a full backward hook without inputs' gradients
        update = trainer.update(
            case.model, case.start, images, labels, case.settings, units=units, random=random
        )
    return flat(update)


@dataclass(frozen=True)
class Attack:
    """A canary and the direction in which it moves the update."""

    canary: Canary
    direction: Floats
    """Of norm 1."""
    shift: float
    """By how much it moves the update, in standard deviations of a single coordinate's noise."""


def strongest(trainer: Trainer, case: Case, canaries: Iterable[Canary]) -> Attack:
    """The canary that moves the update farthest, found with next to no noise and all images in.

    With a sampling rate below 1 this is the direction at rate 1, which needs no averaging.
    """
    step = case.settings.privacy
    assert step is not None
    calm = case.with_step(noise_multiplier=1e-6, sampling_rate=1.0)
    best: Attack | None = None
    without = run(trainer, calm, None)
    for canary in canaries:
        moved = run(trainer, calm, canary) - without
        length = float(np.linalg.norm(moved))
        noise = step.noise_multiplier * step.clipping_norm * _weight(case.settings, step)
        if length > 0 and (best is None or length / noise > best.shift):
            best = Attack(canary, moved / length, length / noise)
    assert best is not None
    return best


def _weight(settings: TrainSettings, step: PrivateStep) -> float:
    """Deviation of an update's coordinate for noise of deviation 1, under SGD, momentum 0.9."""
    per_step = [(1 - 0.9**left) / 0.1 for left in range(1, step.steps + 1)]
    return settings.learning_rate / step.expected_batch_size * float(np.linalg.norm(per_step))


def scores(
    trainer: Trainer, case: Case, attack: Attack, runs: int, *, seed: int | None = None
) -> tuple[Floats, Floats]:
    """Projections of ``runs`` updates without and ``runs`` with the canary, taken in turn.

    The noise comes from the operating system; with ``seed`` from keys made of it, so that a
    test does not depend on luck.
    """
    both: list[list[float]] = [[], []]
    for number in range(2 * runs):
        canary = attack.canary if number % 2 else None
        random = None if seed is None else SecureRandom(key_for_tests=_key(seed, number))
        both[number % 2].append(float(run(trainer, case, canary, random) @ attack.direction))
    return np.array(both[0]), np.array(both[1])


def _key(seed: int, number: int) -> bytes:
    return hashlib.sha256(f"audit/{seed}/{number}".encode()).digest()

"""The methods that are compared, each from the same base and with the same total compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.vectors.clock import Asynchronous, Hospital
from benchmarks.vectors.world import (
    EVERYBODY,
    HOSPITALS,
    PUBLIC,
    Figures,
    Task,
    Workers,
    first_weights,
    measure,
    of_probabilities,
    settings_of,
    sizes,
)
from common.config import RunConfig
from common.model import Weights
from common.vectors import SCALES, Contribution, Rule, bucket_of, candidate

BASES = ("public", "none")
RULES = {
    "merged: mean": "mean",
    "merged: sum, λ = 1/n": f"sum lambda={1 / HOSPITALS}",
    "merged: sum, λ = 1 (the paper's)": "sum lambda=1",
    "merged: norm-equalised": "norm-equalised",
    "merged: TIES 20 %": "ties keep=0.2",
    "merged: DARE 50 %": "dare drop=0.5",
}
VECTORS_OF_ASYNCHRONOUS = 5
"""Vectors that a hospital makes of its compute in the repeated, asynchronous method."""


def base_of(workers: Workers, config: RunConfig, base: str, epochs: int) -> Weights:
    """The weights that everything starts from: ``public`` or ``none`` (random ones)."""
    start = first_weights(config)
    if base == "none":
        return start
    task = Task(config, PUBLIC, start, settings_of(config, epochs), draw=0)
    return moved(start, workers.updates([task])[0])


def moved(start: Weights, update: Weights) -> Weights:
    """``start`` + ``update`` in float32."""
    return {k: (start[k].astype(np.float64) + update[k]).astype(np.float32) for k in start}


def contributions(config: RunConfig, updates: Sequence[Weights]) -> list[Contribution]:
    """One vector of each hospital, weighted as in a run: by its images' power of two."""
    return [
        Contribution(f"{i:032x}", f"hospital-{i:02d}", update, float(bucket_of(n)))
        for i, (update, n) in enumerate(zip(updates, sizes(config), strict=True))
    ]


def merged(workers: Workers, config: RunConfig, base: Weights, epochs: int) -> dict[str, Any]:
    """Base, single hospitals, every merge rule and the ensemble, of one vector a hospital."""
    settings = settings_of(config, epochs)
    updates = workers.updates([Task(config, i, base, settings, 1) for i in range(HOSPITALS)])
    given = contributions(config, updates)
    models = {name: candidate(base, given, Rule.from_text(text)) for name, text in RULES.items()}
    scaled = {s: candidate(base, given, Rule.from_text(f"mean scale={s}")) for s in SCALES}
    singles = [moved(base, update) for update in updates]
    found = workers.measures(config, [base, *singles, *models.values(), *scaled.values()])
    single = found[1 : 1 + HOSPITALS]
    rules = found[1 + HOSPITALS : 1 + HOSPITALS + len(models)]
    at_scale = dict(zip(scaled, found[-len(scaled) :], strict=True))
    scale = max(SCALES, key=lambda s: at_scale[s].val_accuracy)
    weights = np.array([c.weight for c in given])
    mean = np.average([f.probabilities for f in single], axis=0, weights=weights)
    return {
        "base": found[0].row(),
        "single hospitals, mean": {
            k: float(np.mean([f.row()[k] for f in single])) for k in found[0].row()
        },
        "single hospitals, best (on test)": max(single, key=lambda f: f.test_accuracy).row(),
        **{name: figures.row() for name, figures in zip(models, rules, strict=True)},
        "merged: mean, scale chosen on val": {**at_scale[scale].row(), "scale": scale},
        "ensemble (softmax mean)": {
            **of_probabilities(config, mean, 0.0).row(), "val_accuracy": None,
        },
    }  # fmt: skip


def federated(
    workers: Workers, config: RunConfig, base: Weights, rounds: int, among: Sequence[int] = ()
) -> list[Figures]:
    """FedAvg, one pass a round, the rate falling over the rounds: figures after each round.

    ``among``: the hospitals that take part; empty: all.
    """
    config, weights, found = replace(config, rounds=rounds), base, []
    names, count = list(among) or list(range(HOSPITALS)), sizes(config)
    for number in range(1, rounds + 1):
        settings = settings_of(
            config, 1, learning_rate=config.learning_rate_of(number), schedule="constant"
        )
        updates = workers.updates([Task(config, i, weights, settings, number) for i in names])
        total = sum(count[i] for i in names)
        shares = [count[i] / total for i in names]
        mean = {k: np.average([u[k] for u in updates], axis=0, weights=shares) for k in weights}
        weights = moved(weights, mean)
        found.append(workers.measures(config, [weights])[0])
    return found


def federated_last(workers: Workers, config: RunConfig, base: Weights, rounds: int) -> Figures:
    """The model after the last round of :func:`federated`."""
    return federated(workers, config, base, rounds)[-1]


def repeated(workers: Workers, config: RunConfig, base: Weights, epochs: int) -> Figures:
    """Task vectors again and again: each hospital makes some, a base comes after every five.

    The hospitals' clocks differ by up to a factor of two, so that some vectors come late.
    """
    passes = max(1, epochs // VECTORS_OF_ASYNCHRONOUS)
    rng = np.random.default_rng(config.seed)
    hospitals = [Hospital(i, slowness=float(rng.uniform(1, 2))) for i in range(HOSPITALS)]
    clock = Asynchronous(
        workers, config, hospitals, passes=passes, most_vectors=epochs // passes,
        publish_every=HOSPITALS // 2,
    )  # fmt: skip
    return [a.figures for a in clock.run(base)][-1]


def centralised(workers: Workers, config: RunConfig, base: Weights, epochs: int) -> Figures:
    """All images in one place."""
    task = Task(config, EVERYBODY, base, settings_of(config, epochs), draw=1)
    return measure(config, moved(base, workers.updates([task])[0]))

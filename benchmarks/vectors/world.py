"""Data, hospitals and training of the task-vector benchmarks, over a few processes.

What a hospital computes here is what it computes in a run: :func:`common.training.train` on the
train part of its share of the images, with the run config's settings. Neither secure aggregation
nor privacy takes part: the question is what merging reaches.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from common.config import RunConfig
from common.datasets import ImageSet
from common.evaluation import evaluate
from common.model import ModelSpec, Weights, build, get_weights
from common.simulation import hospital_splits, load_dataset
from common.training import TrainSettings, to_tensor, train
from server_app.evaluation import figures
from server_app.vectors.public import public_split

HOSPITALS = 10
EVERYBODY = -1
"""Number of the hospital that would have everybody's images: centralised training."""
PUBLIC = -2
"""Number of the coordinator, who has the public images."""


@dataclass(frozen=True)
class Task:
    """One training: of whom, from which weights, with which settings."""

    config: RunConfig
    hospital: int
    start: Weights
    settings: TrainSettings
    draw: int
    """Another order of batches for another number."""


@dataclass(frozen=True)
class Figures:
    """Of one model: accuracy on the hospitals' own validation images, figures on the test split.

    ``probabilities`` (N, classes): on the test split.
    """

    val_accuracy: float
    test_accuracy: float
    test_macro_f1: float
    probabilities: np.ndarray

    def row(self) -> dict[str, float]:
        """What is kept of it."""
        return {
            "test_accuracy": self.test_accuracy,
            "test_macro_f1": self.test_macro_f1,
            "val_accuracy": self.val_accuracy,
        }


def config_of(
    data: Path | None, partition: str, seed: int, **more: bool | float | str
) -> RunConfig:
    """The run config of one cell; synthetic cells where there is no file."""
    where: dict[str, str | int] = {"dataset": "synthetic", "synthetic-size": 3000}
    if data is not None:
        where = {"dataset": "npz", "data-path": str(data.resolve())}
    return RunConfig.parse(
        {**where, "partition": partition, "seed": seed, "privacy": "none", "secagg": False,
         "precision": "bfloat16", "allow-random-base": True, "mode": "vectors", **more}
    )  # fmt: skip


def spec_of(config: RunConfig) -> ModelSpec:
    """The model of a cell."""
    data = load_dataset(config)
    return ModelSpec(model=config.model, width=config.model_width, num_classes=data.num_classes,
                     channels=data.channels)  # fmt: skip


def images_of(config: RunConfig, hospital: int) -> ImageSet:
    """What ``hospital`` trains on."""
    data = load_dataset(config)
    if hospital == PUBLIC:
        return public_split(data.val)[0]
    parts = _splits(config)
    return _together([t for t, _ in parts]) if hospital == EVERYBODY else parts[hospital][0]


def settings_of(config: RunConfig, passes: int, **more: float | str) -> TrainSettings:
    """``passes`` over a hospital's images, the rate falling by the config's schedule."""
    settings = TrainSettings(
        epochs=passes, batch_size=config.batch_size, learning_rate=config.learning_rate,
        optimizer=config.optimizer, schedule=config.learning_rate_schedule,
        precision=config.precision,
    )  # fmt: skip
    return replace(settings, **more)  # type: ignore[arg-type]


def sizes(config: RunConfig) -> list[int]:
    """How many images each hospital trains on."""
    return [len(train_part) for train_part, _ in _splits(config)]


def run_task(task: Task) -> Weights:
    """The update that a training makes; one thread."""
    images = images_of(task.config, task.hospital)
    number = int(
        np.random.SeedSequence([task.config.seed, task.draw, task.hospital + 2]).generate_state(1)[
            0
        ]
    )
    result = train(
        build(spec_of(task.config)), task.start, to_tensor(images.images),
        torch.from_numpy(images.labels), task.settings, seed=number,
    )  # fmt: skip
    return result.update


def measure(config: RunConfig, weights: Mapping[str, np.ndarray]) -> Figures:
    """A model on the hospitals' validation images together, and on the test split."""
    data = load_dataset(config)
    held_out = _together([v for _, v in _splits(config)])
    model = build(spec_of(config))
    val = evaluate(model, weights, to_tensor(held_out.images), torch.from_numpy(held_out.labels))
    test = evaluate(
        model, weights, to_tensor(data.test.images), torch.from_numpy(data.test.labels)
    )  # fmt: skip
    return of_probabilities(config, test.probabilities, val.correct / val.examples)


@dataclass(frozen=True)
class Verdict:
    """Accuracy on ``count`` public images that no base was trained on."""

    accuracy: float
    count: int


def judged(config: RunConfig, weights: Mapping[str, np.ndarray]) -> Verdict:
    """A model on the public images by which a run judges."""
    images = public_split(load_dataset(config).val)[1]
    found = evaluate(build(spec_of(config)), weights, to_tensor(images.images),
                     torch.from_numpy(images.labels))  # fmt: skip
    return Verdict(found.correct / found.examples, found.examples)


def of_probabilities(config: RunConfig, probabilities: np.ndarray, val: float) -> Figures:
    """Figures of class probabilities on the test split."""
    data = load_dataset(config)
    found = figures(data.test.labels, probabilities, data.class_names)
    return Figures(val, found["accuracy"], found["macro_f1"], probabilities)


def first_weights(config: RunConfig) -> Weights:
    """Random ones, by the seed."""
    return get_weights(build(spec_of(config), seed=config.seed))


class Workers:
    """Trainings side by side, one thread each."""

    def __init__(self, number: int | None = None) -> None:
        self._pool = ProcessPoolExecutor(
            number or os.cpu_count(), mp_context=get_context("spawn"), initializer=_one_thread
        )

    def updates(self, tasks: Sequence[Task]) -> list[Weights]:
        """What each makes, in order; the longest are begun first."""
        order = sorted(range(len(tasks)), key=lambda i: -_cost(tasks[i]))
        running = {i: self._pool.submit(run_task, tasks[i]) for i in order}
        return [running[i].result() for i in range(len(tasks))]

    def measures(self, config: RunConfig, models: Sequence[Weights]) -> list[Figures]:
        """Figures of each model, in order."""
        running = [self._pool.submit(measure, config, weights) for weights in models]
        return [r.result() for r in running]

    def judged(self, config: RunConfig, models: Sequence[Weights]) -> list[Verdict]:
        """What the public images say of each model, in order."""
        running = [self._pool.submit(judged, config, weights) for weights in models]
        return [r.result() for r in running]

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _cost(task: Task) -> int:
    return len(images_of(task.config, task.hospital)) * task.settings.epochs


_known: dict[tuple[str, str, int], list[tuple[ImageSet, ImageSet]]] = {}


def _splits(config: RunConfig) -> list[tuple[ImageSet, ImageSet]]:
    key = (config.data_path, config.partition, config.seed)
    if key not in _known:
        _known.clear()
        _known[key] = hospital_splits(load_dataset(config), config, HOSPITALS)
    return _known[key]


def _together(parts: Sequence[ImageSet]) -> ImageSet:
    return ImageSet(
        np.concatenate([p.images for p in parts]), np.concatenate([p.labels for p in parts])
    )

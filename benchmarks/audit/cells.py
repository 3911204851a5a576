"""What is run, each cell by itself, and the rows that come of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.audit import membership
from benchmarks.audit.attack import Case, patient, scores, strongest, tiny_case
from benchmarks.audit.one_run import (
    PICTURES,
    Canaries,
    audit_in_one_run,
    from_pictures,
    striped,
)
from benchmarks.audit.statistics import advantage_limit, audit
from benchmarks.audit.trainers import BUGS, CHANNELS_LAST, NO_NOISE, REAL, TWO_PASSES, Trainer
from common.datasets import Dataset
from common.model import ModelSpec, build, get_weights
from common.privacy.accounting import Event, calibrate, epsilon_of
from common.training import PrivateStep, TrainSettings, to_tensor

Row = dict[str, Any]

CONFIDENCE = 0.95
DELTA = 1e-5
"""Of the canary audits."""
MEMBERSHIP_DELTA = 1.9e-4
"""Of the membership attacks: the run config's default."""

FIELDS = (
    "cell", "part", "trainer", "differs", "method", "claimed_epsilon", "audited_lower_bound",
    "refuted", "mia_advantage", "delta", "noise_multiplier", "sampling_rate", "steps",
    "privacy_unit", "claimed_mu", "audited_mu", "canary", "shift", "repetitions", "canaries",
    "guesses", "correct", "models", "mia_advantage_interval", "mia_advantage_limit", "mia_auc",
    "mia_auc_interval", "mia_tpr_at_1_fpr", "mia_tpr_at_1_fpr_interval", "mia_roc",
    "test_accuracy", "confidence", "network", "n", "source", "source_sha256", "seed", "wall_s",
)  # fmt: skip
"""Every row has these; null where one does not apply."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is run."""

    runs: int = 4000
    """Of each kind (with and without the canary), for the real trainer."""
    bug_runs: int = 1200
    """The same for the others."""
    canaries: int = 400
    guesses: int = 80
    models: int = 40
    pool: int = 400
    """Images of the membership attacks; half of them are in a model's training set."""
    epochs: int = 30
    """Of the model that is to learn its images by heart."""


@dataclass(frozen=True)
class Cell:
    """A piece of work by its name: some rows, or one, without the fields all rows share."""

    name: str
    work: Callable[[], list[Row]]


def cells(data: Dataset, effort: Effort, seed: int) -> list[Cell]:
    """Everything, cheap parts first."""
    rng = np.random.default_rng(seed)
    train = to_tensor(data.train.images[rng.choice(len(data.train), 17, replace=False)])
    one = tiny_case(train, sigma=1.2)
    four = tiny_case(train, sigma=2.4, steps=4)
    poisson = tiny_case(train, sigma=0.8, steps=4, rate=0.25)
    gross = tiny_case(train, sigma=2.0)
    listed = [
        _canary("real, one full batch", REAL, one, effort.runs),
        _canary("real, four full batches", REAL, four, effort.runs),
        _canary("real, four Poisson batches", REAL, poisson, effort.runs),
        _canary("real, patients", REAL, one, effort.runs, patients=True),
        _canary("half the noise", BUGS["half the noise"], one, effort.runs),
        _canary("two-pass clipping", TWO_PASSES, gross, effort.bug_runs),
        _canary("channels_last", CHANNELS_LAST, gross, effort.bug_runs),
    ]
    for name, bug in BUGS.items():
        if name != "half the noise":
            patients = not bug.knows_units
            listed.append(_canary(name, bug, gross, effort.bug_runs, patients=patients))
    listed += _one_run_cells(data, effort, seed)
    return listed + _membership_cells(data, effort, seed)


def run(cell: Cell, data: Dataset, seed: int) -> list[Row]:
    """The cell's rows, every field there."""
    started = time.monotonic()
    made = cell.work()
    shared = {
        "cell": cell.name, "confidence": CONFIDENCE, "seed": seed, "source": data.source,
        "source_sha256": data.sha256, "wall_s": round(time.monotonic() - started, 1),
    }  # fmt: skip
    rows = [{**dict.fromkeys(FIELDS), **shared, **row} for row in made]
    for row in rows:
        assert len(row) == len(FIELDS), sorted(set(row) - set(FIELDS))
        if row["audited_lower_bound"] is not None:
            row["refuted"] = row["audited_lower_bound"] > row["claimed_epsilon"]
    return rows


def _claim(step: PrivateStep, delta: float) -> Row:
    event = Event(step.noise_multiplier, step.sampling_rate, step.steps)
    return {
        "claimed_epsilon": epsilon_of([event], delta).value, "delta": delta,
        "noise_multiplier": step.noise_multiplier, "sampling_rate": step.sampling_rate,
        "steps": step.steps,
    }  # fmt: skip


def _canary(name: str, trainer: Trainer, case: Case, runs: int, *, patients: bool = False) -> Cell:
    def work() -> list[Row]:
        step = case.settings.privacy
        assert step is not None
        chosen = map(patient, case.canaries) if patients else case.canaries
        attack = strongest(trainer, case, chosen)
        found = audit(*scores(trainer, case, attack, runs), delta=DELTA, confidence=CONFIDENCE)
        row = {
            **_claim(step, DELTA), "part": "canary", "trainer": trainer.name,
            "differs": trainer.differs, "canary": attack.canary.name, "shift": attack.shift,
            "privacy_unit": "patient" if patients else "image", "repetitions": runs,
            "network": "convolution, group norm, linear: 140 parameters", "n": len(case.labels),
        }  # fmt: skip
        rows = [{**row, "method": "many runs, any mechanism", "audited_lower_bound": found.epsilon}]
        if step.sampling_rate == 1:
            gaussian: Row = {
                "method": "many runs, Gaussian mechanism", "audited_mu": found.mu,
                "claimed_mu": step.steps**0.5 / step.noise_multiplier,
                "audited_lower_bound": found.epsilon_gdp,
            }  # fmt: skip
            rows.append({**row, **gaussian})
        return rows

    return Cell(f"canary: {name}", work)


def _one_run_cells(data: Dataset, effort: Effort, seed: int) -> list[Cell]:
    count = effort.canaries

    def stripes() -> Canaries:
        return striped(count, np.random.default_rng([seed, 1]))

    def pictures() -> Canaries:
        rng = np.random.default_rng([seed, 2])
        chosen = rng.choice(len(data.train), count * PICTURES, replace=True)
        return from_pictures(to_tensor(data.train.images[chosen]), rng)

    def work(
        trainer: Trainer, make: Callable[[], Canaries], sigma: float, rate: float, steps: int
    ) -> list[Row]:
        canaries = make()
        model = build(ModelSpec(width=0.0625), seed=seed)
        start = get_weights(model)
        step = PrivateStep(
            noise_multiplier=sigma, clipping_norm=10.0, sampling_rate=rate, steps=steps,
            expected_batch_size=rate * count / 2,
        )  # fmt: skip
        found = audit_in_one_run(
            trainer, model, start, canaries, step, learning_rate=1e-3, guesses=effort.guesses,
            delta=DELTA, confidence=CONFIDENCE,
        )  # fmt: skip
        row = {
            **_claim(step, DELTA), "part": "one run", "trainer": trainer.name,
            "differs": trainer.differs, "method": "one run, many canaries",
            "audited_lower_bound": found.bound, "canaries": found.canaries,
            "guesses": found.guesses, "correct": found.correct, "repetitions": 1,
            "canary": f"eight {'striped' if make is stripes else 'real'} pictures, every label",
            "privacy_unit": "patient", "network": "DPResNet, width 1/16", "n": count * PICTURES,
        }  # fmt: skip
        return [row]

    planned = {
        "real, one full batch": (REAL, stripes, 0.6, 1.0, 1),
        "real, four Poisson batches": (REAL, stripes, 0.9, 0.5, 4),
        "real, pictures of the data set": (REAL, pictures, 0.6, 1.0, 1),
        "half the noise": (BUGS["half the noise"], stripes, 0.6, 1.0, 1),
        "real, much noise": (REAL, stripes, 2.0, 1.0, 1),
        "noise forgotten": (NO_NOISE, stripes, 2.0, 1.0, 1),
    }
    return [Cell(f"one run: {name}", partial(work, *plan)) for name, plan in planned.items()]


def _membership_cells(data: Dataset, effort: Effort, seed: int) -> list[Cell]:
    size, rate, steps = data.image_shape[0], 0.25, 40
    expected = rate * effort.pool / 2

    def network(number: int) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            return membership.small_network(data.num_classes, size)

    def private(sigma: float) -> TrainSettings:
        step = PrivateStep(
            noise_multiplier=sigma, clipping_norm=1.0, sampling_rate=rate, steps=steps,
            expected_batch_size=expected,
        )  # fmt: skip
        return TrainSettings(
            epochs=1, batch_size=1, learning_rate=4e-3, optimizer="adam", privacy=step
        )

    def calibrated(epsilon: float) -> TrainSettings:
        sigma = calibrate(epsilon=epsilon, delta=MEMBERSHIP_DELTA, sampling_rate=rate, steps=steps)
        return private(sigma)

    def memorising() -> TrainSettings:
        return TrainSettings(
            epochs=effort.epochs, batch_size=20, learning_rate=2e-3, optimizer="adam"
        )

    def work(trainer: str, make: Callable[[], TrainSettings]) -> list[Row]:
        settings = make()
        rng = np.random.default_rng([seed, 3])
        pool = rng.choice(len(data.train), effort.pool, replace=False)
        outside = rng.choice(len(data.test), min(500, len(data.test)), replace=False)
        shadows = membership.train_shadows(
            network,
            to_tensor(data.train.images[pool]), torch.from_numpy(data.train.labels[pool]),
            (to_tensor(data.test.images[outside]), torch.from_numpy(data.test.labels[outside])),
            settings, models=effort.models, seed=seed,
        )  # fmt: skip
        row: Row = {
            "part": "membership", "trainer": trainer, "differs": "nothing",
            "models": effort.models, "repetitions": effort.models, "n": effort.pool // 2,
            "test_accuracy": shadows.accuracy, "privacy_unit": "image",
            "network": "two convolutions, group norm, linear head on all positions",
            "mia_advantage_limit": 1.0,
        }  # fmt: skip
        if settings.privacy is not None:
            row |= _claim(settings.privacy, MEMBERSHIP_DELTA)
            row["mia_advantage_limit"] = advantage_limit(row["claimed_epsilon"], MEMBERSHIP_DELTA)
        else:
            row["steps"] = effort.epochs * -(-(effort.pool // 2) // settings.batch_size)
        attacks = {
            "membership, loss threshold": membership.loss_scores(shadows),
            "membership, likelihood ratio": membership.likelihood_ratio_scores(shadows),
        }
        rows = []
        for method, attack in attacks.items():
            found = membership.measure(attack, shadows.members, seed=seed)
            rows.append({
                **row, "method": method, "mia_advantage": found.advantage,
                "mia_advantage_interval": found.advantage_interval, "mia_auc": found.auc,
                "mia_auc_interval": found.auc_interval, "mia_tpr_at_1_fpr": found.tpr_at_1_fpr,
                "mia_tpr_at_1_fpr_interval": found.tpr_interval, "mia_roc": found.roc,
            })  # fmt: skip
        return rows

    planned: dict[str, tuple[str, Callable[[], TrainSettings]]] = {
        "no privacy": ("real, no privacy", memorising),
        "next to no noise": ("real", partial(private, 0.05)),
        "ε = 6": ("real", partial(calibrated, 6.0)),
        "ε = 1": ("real", partial(calibrated, 1.0)),
    }
    return [Cell(f"membership: {name}", partial(work, *plan)) for name, plan in planned.items()]

"""One round's aggregation in the clear: ask hospitals to train, average what they return.

FedAvg (McMahan et al. 2017) on updates: Σ nᵢ(θᵢ − θ) / Σ nᵢ. The secure variant gives the same
:class:`Outcome` from sums alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from common.errors import ProtocolError
from common.messages import Job, Report
from common.model import Weights, check_weights
from server_app.exchange import Absence, ask
from server_app.fixed import FixedParts


@dataclass
class Outcome:
    """What a round brought: a mean update or a sum, sums of figures, who was there and who not."""

    expected: list[str]
    contributed: list[str] = field(default_factory=list)
    absent: list[Absence] = field(default_factory=list)
    mean_update: Weights | None = None
    total: np.ndarray | None = None
    """Of a server step: the noisy sum over the union of the images, (d,) float64."""
    sums: dict[str, float] = field(default_factory=dict)
    failure: str | None = None
    """Why secure aggregation failed closed, or None."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Stage → how long it took."""

    def missing(self, quorum: float) -> str | None:
        """Why the round does not count, or None if it does."""
        if self.failure is not None:
            return self.failure
        if len(self.contributed) >= needed(len(self.expected), quorum):
            return None
        return (
            f"{len(self.contributed)} of {len(self.expected)} hospitals contributed, "
            f"fewer than the quorum of {quorum:.0%}"
        )

    def validation(self) -> dict[str, float] | None:
        """Mean loss and accuracy over the hospitals' validation images.

        Under differential privacy the sums carry noise, and so do these.
        """
        n = self.sums.get("val-examples", 0.0)
        if n <= 0:
            return None
        return {
            "accuracy": min(max(self.sums["val-correct"] / n, 0.0), 1.0),
            "loss": self.sums["val-loss-sum"] / n,
            "examples": int(n),
        }

    def training(self) -> dict[str, float] | None:
        """Mean loss over the hospitals' training images; None if they did not tell it."""
        n, loss = self.sums.get("examples", 0.0), self.sums.get("train-loss-sum")
        if n <= 0 or loss is None:  # under differential privacy hospitals tell no training loss
            return None
        return {"loss": loss / n, "examples": int(n)}

    def participation(self) -> dict[str, Any]:
        """Who was expected, who contributed, who dropped, where and why; JSON-ready."""
        return {
            "expected": self.expected,
            "contributed": self.contributed,
            "dropped": [a.as_dict() for a in self.absent],
            "stage_seconds": self.seconds,
        }


def needed(expected: int, quorum: float) -> int:
    """How many of ``expected`` hospitals must contribute for a round to count; at least one."""
    return max(1, math.ceil(quorum * expected - 1e-9))


def plain_round(
    grid: Grid,
    cohort: Mapping[str, int],
    job: Job,
    *,
    train: bool,
    timeout: float,
    parts: FixedParts | None = None,
) -> Outcome:
    """Let ``cohort`` (name → node) train (or only validate) ``job``'s model; average in the clear.

    The server sees each hospital's update and figures: without differential privacy that is
    next to seeing its images. A report that is malformed, of another round, or whose update
    does not fit the model makes its hospital absent, with the reason. ``parts``: who holds the
    model's fixed entries already.
    """
    shapes = {name: tuple(array.shape) for name, array in job.weights.items()}
    reports: dict[str, Report] = {}

    def take(name: str, content: RecordDict) -> None:
        report = Report.from_record(content, run=job.run, round=job.round)
        if report.hospital != name:
            raise ProtocolError(f"it answers as '{report.hospital}'", "update its node")
        if train:
            check_weights(shapes, report.update)
            if report.metrics.get("examples", 0.0) <= 0:
                raise ProtocolError("it reports no training images", "update its node")
        reports[name] = report

    parts = parts or FixedParts()
    messages = parts.messages(job, cohort)
    answers = ask(
        grid,
        {name: (node, messages[name]) for name, node in cohort.items()},
        message_type="train" if train else "evaluate",
        stage="train" if train else "validate",
        timeout=timeout,
        on_answer=take,
        instead=parts.again(job),
    )
    parts.answered(cohort, [a.hospital for a in answers.absent])
    # In the order of the names: sums of floats depend on it, and results must not on arrival.
    ordered = [reports[name] for name in sorted(reports)]
    outcome = Outcome(sorted(cohort), [r.hospital for r in ordered], answers.absent)
    for report in ordered:
        for key, value in report.metrics.items():
            outcome.sums[key] = outcome.sums.get(key, 0.0) + value
    if train and ordered:
        outcome.mean_update = _weighted_mean(ordered, outcome.sums["examples"])
    return outcome


def _weighted_mean(reports: list[Report], total: float) -> Weights:
    mean: dict[str, np.ndarray] = {}
    for report in reports:
        for name, array in report.update.items():
            term = array.astype(np.float64) * (report.metrics["examples"] / total)
            mean[name] = mean[name] + term if name in mean else term
    return mean


def add_update(weights: Mapping[str, np.ndarray], update: Mapping[str, np.ndarray]) -> Weights:
    """θ + Δ in float64, back in each entry's own dtype (counters of batch norm are rounded).

    Entries that ``update`` lacks stay as they are.
    """
    moved = dict(weights)
    for name, delta in update.items():
        array = weights[name]
        value = array.astype(np.float64) + delta
        whole = np.issubdtype(array.dtype, np.integer)
        moved[name] = (np.rint(value) if whole else value).astype(array.dtype)
    return moved


def with_momentum(
    update: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
    previous: Mapping[str, np.ndarray],
    momentum: float,
) -> Weights:
    """The step v = Δ + β·(θ − θ of the round before): FedAvgM (Hsu et al. 2019), step size 1."""
    if momentum == 0.0:
        return dict(update)
    return {
        name: delta + momentum * (weights[name].astype(np.float64) - previous[name])
        for name, delta in update.items()
    }

"""One round's aggregation in the clear: ask hospitals to train, average what they return.

FedAvg (McMahan et al. 2017) on updates: Σ nᵢ(θᵢ − θ) / Σ nᵢ. The secure variant gives the same
:class:`Outcome` from sums alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from common.errors import ProtocolError
from common.messages import Job, Report
from common.model import Weights, check_weights
from server_app.defence.updates import Sifted
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
    norms: dict[str, float] = field(default_factory=dict)
    """Of updates that were seen one by one: hospital → L2 norm."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Of those, which are not in the mean, and why."""
    lowered: dict[str, str] = field(default_factory=dict)
    """Which weigh less than they claimed, and why."""

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

    def scaled(self, share: float) -> Outcome:
        """The same with ``share`` of its mean update, or of its sum."""
        if share == 1.0:
            return self
        mean = self.mean_update
        return replace(
            self,
            mean_update=None if mean is None else {n: share * a for n, a in mean.items()},
            total=None if self.total is None else share * self.total,
        )


def merged(parts: Sequence[Outcome]) -> Outcome:
    """Several outcomes over disjoint hospitals as one: everybody, all sums, the mean over all.

    It failed if one of them did; then there is no mean.
    """
    if len(parts) == 1:
        return parts[0]
    whole = Outcome(
        expected=sorted(name for p in parts for name in p.expected),
        contributed=sorted(name for p in parts for name in p.contributed),
        absent=[absence for p in parts for absence in p.absent],
        failure=next((p.failure for p in parts if p.failure is not None), None),
    )
    for part in parts:
        for key, value in part.sums.items():
            whole.sums[key] = whole.sums.get(key, 0.0) + value
        for stage, seconds in part.seconds.items():
            whole.seconds[stage] = round(whole.seconds.get(stage, 0.0) + seconds, 3)
    if whole.failure is not None:
        return whole
    totals = [p.total for p in parts if p.total is not None]
    if totals:
        whole.total = np.sum(totals, axis=0)
    for part in parts:
        share = part.sums.get("examples", 0.0) / max(whole.sums.get("examples", 0.0), 1.0)
        for name, array in (part.mean_update or {}).items():
            whole.mean_update = whole.mean_update or {}
            before = whole.mean_update.get(name)
            whole.mean_update[name] = share * array if before is None else before + share * array
    return whole


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
    sifted: Callable[[Mapping[str, float], Mapping[str, float]], Sifted] | None = None,
) -> Outcome:
    """Let ``cohort`` (name → node) train (or only validate) ``job``'s model; average in the clear.

    The server sees each hospital's update and figures: without differential privacy that is
    next to seeing its images. A report that is malformed, of another round, or whose update
    does not fit the model makes its hospital absent, with the reason. ``parts``: who holds the
    model's fixed entries already. ``sifted``: from claimed images and norms by hospital, what each
    update weighs.
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
        weights = {r.hospital: r.metrics["examples"] for r in ordered}
        if sifted is not None:
            outcome.norms = {r.hospital: _norm(r.update) for r in ordered}
            found = sifted(weights, outcome.norms)
            weights = dict(found.weights)
            outcome.set_aside = dict(found.set_aside)
            outcome.lowered = dict(found.lowered)
        outcome.mean_update = _weighted_mean(ordered, weights)
    return outcome


def _norm(update: Mapping[str, np.ndarray]) -> float:
    squares = [float(np.sum(np.square(a, dtype=np.float64))) for a in update.values()]
    return float(np.sqrt(sum(squares)))


def _weighted_mean(reports: list[Report], weights: Mapping[str, float]) -> Weights:
    mean: dict[str, np.ndarray] = {}
    total = sum(weights.values())
    for report in reports:
        if report.hospital not in weights:
            continue
        for name, array in report.update.items():
            term = array.astype(np.float64) * (weights[report.hospital] / total)
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

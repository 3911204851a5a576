"""How far to go along a merged update, and whether to go at all: validation with a margin.

An accuracy measured on n images is uncertain by a standard error of √(p (1 − p) / n): 1.6 points
at 92 % of 300 images, 0.7 of 1,412. A difference below that is noise, and choosing the best of
several makes it look better than it is; so the better model must win by a margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from common.errors import ConfigError
from common.vectors.influence import Evaluate, checked
from common.vectors.tensors import Arrays

SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def margin(accuracy: float, count: int, errors: float = 1.0) -> float:
    """``errors`` standard errors of an ``accuracy`` (0 to 1) that was measured on ``count`` images.

    By Agresti and Coull (1998), with two successes and two failures added, so that it is not 0
    where the accuracy is 0 or 1. ConfigError for a count below 1 or negative ``errors``.
    """
    if count < 1 or not errors >= 0:
        raise ConfigError(
            f"a margin of {errors} standard errors over {count} images has no meaning",
            "give at least one validation image, and standard errors from 0",
        )
    p = (checked(accuracy) * count + 2) / (count + 4)
    return errors * math.sqrt(p * (1 - p) / (count + 4))


@dataclass(frozen=True)
class ScaleChoice:
    """The scale to use (0: do not merge), and what it was chosen from."""

    scale: float
    base_accuracy: float
    margin: float
    table: tuple[tuple[float, float], ...]
    """(scale, accuracy) of every candidate, by rising scale."""


def choose_scale(
    model_at: Callable[[float], Arrays],
    evaluate: Evaluate,
    *,
    base_accuracy: float,
    count: int,
    scales: Sequence[float] = SCALES,
    errors: float = 1.0,
) -> ScaleChoice:
    """:func:`pick_scale` of the accuracies that ``evaluate`` gives.

    ``model_at(s)``: the weights of the candidate at scale s.
    """
    found = {s: evaluate(model_at(s)) for s in scales}
    return pick_scale(found, base_accuracy=base_accuracy, count=count, errors=errors)


def pick_scale(
    accuracies: Mapping[float, float], *, base_accuracy: float, count: int, errors: float = 1.0
) -> ScaleChoice:
    """The scale of the best accuracy, or 0 unless it beats the base by more than the margin.

    ``accuracies``: of the candidate, by scale; ``base_accuracy``: of the current base, on the
    same ``count`` validation images; the margin is :func:`margin` of it. Of equally good scales
    the smallest. ConfigError for no scales, or one that is not above 0.
    """
    if not accuracies or not all(s > 0 for s in accuracies):
        raise ConfigError("there is no scale above 0 to choose from", "give some, such as 0.5, 1")
    needed = margin(base_accuracy, count, errors)
    table = tuple((s, checked(accuracies[s])) for s in sorted(accuracies))
    best, accuracy = max(table, key=lambda row: (row[1], -row[0]))
    chosen = best if accuracy > base_accuracy + needed else 0.0
    return ScaleChoice(chosen, base_accuracy, needed, table)


@dataclass(frozen=True)
class GateResult:
    """Whether a candidate may be published; accuracies None where nothing was evaluated."""

    adopt: bool
    current: float | None
    candidate: float | None
    margin: float

    def to_dict(self) -> dict[str, object]:
        """As it is kept with the publication."""
        return asdict(self)


Gate = Callable[[Arrays, Arrays], GateResult]
"""(weights of the current base, weights of the candidate) → whether to publish."""


def evaluation_gate(evaluate: Evaluate, *, count: int, errors: float = 1.0) -> Gate:
    """Adopts unless the candidate's accuracy is below the current base's by more than a margin.

    The margin is :func:`margin` of the current base's accuracy on ``count`` images.
    """

    def gate(current: Arrays, proposed: Arrays) -> GateResult:
        return judge(evaluate(current), evaluate(proposed), count=count, errors=errors)

    return gate


def judge(current: float, proposed: float, *, count: int, errors: float = 1.0) -> GateResult:
    """What the gate says of two accuracies on the same ``count`` images, wherever measured."""
    before, after = checked(current), checked(proposed)
    allowed = margin(before, count, errors)
    return GateResult(after >= before - allowed, before, after, allowed)


def no_gate(current: Arrays, proposed: Arrays) -> GateResult:
    """Adopts everything: for federations without validation data. Nothing is evaluated."""
    return GateResult(True, None, None, 0.0)

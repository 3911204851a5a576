"""What each hospital does to the merged model: its accuracy with and without that hospital.

Leave-one-out shows a vector that harms (flipped labels, flipped sign) and passed every other
check. It costs one evaluation for each hospital. Accuracies that are not of held-out data of
all classes say little: a hospital that alone knows a class looks harmless without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from common.vectors.errors import VectorError
from common.vectors.tensors import Arrays

Evaluate = Callable[[Arrays], float]
"""A model's weights → its accuracy on validation data, from 0 to 1."""


@dataclass(frozen=True)
class Influence:
    """One hospital's. ``influence``: accuracy of all minus ``without``; below 0 it harms."""

    hospital: str
    without: float
    influence: float
    harmful: bool
    """Whether the model without it is better by more than the margin."""


@dataclass(frozen=True)
class InfluenceTable:
    """``accuracy``: of the model of all vectors. ``rows``: by rising influence, then by name."""

    accuracy: float
    margin: float
    rows: tuple[Influence, ...]

    def harmful(self) -> list[str]:
        """The hospitals to look at, the worst first."""
        return [row.hospital for row in self.rows if row.harmful]


def leave_one_out(
    hospitals: Iterable[str],
    model_without: Callable[[str | None], Arrays],
    evaluate: Evaluate,
    *,
    margin: float = 0.0,
) -> InfluenceTable:
    """Evaluate the model of all (``model_without(None)``), then without each hospital.

    ``margin``: see :func:`common.vectors.scale.margin`. VectorError (``evaluation``) if an
    accuracy is not a number from 0 to 1.
    """
    accuracy = checked(evaluate(model_without(None)))
    rows = []
    for hospital in sorted(set(hospitals)):
        without = checked(evaluate(model_without(hospital)))
        influence = accuracy - without
        rows.append(Influence(hospital, without, influence, -influence > margin))
    rows.sort(key=lambda row: (row.influence, row.hospital))
    return InfluenceTable(accuracy, margin, tuple(rows))


def checked(accuracy: float) -> float:
    """``accuracy`` if it is one; VectorError (``evaluation``) otherwise."""
    if not (math.isfinite(accuracy) and 0.0 <= accuracy <= 1.0):
        raise VectorError(
            "evaluation",
            f"the validation gave {accuracy!r}, which is no accuracy",
            "check the validation data and the model",
        )
    return float(accuracy)

"""Whether a model validates worse than those before it, beyond what chance explains.

The figures are sums over images: of the hospitals (under privacy with noise of known size), or of
the coordinator's own. A liar can put any numbers into the hospitals' sums: impossible ones are
noticed, invented possible ones are not (docs/poisoning.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from common.privacy.figures import LOSS_CLIP

_Z = 3.0
_LOSS_FACTOR, _LOSS_ROOM = 2.0, 1.0
WINDOW = 10
"""Models back that a new one is compared with."""


@dataclass(frozen=True)
class Validated:
    """A model's validation: shares and means over ``examples`` images."""

    accuracy: float
    loss: float
    examples: float
    accuracy_noise: float = 0.0
    """Standard deviation of the privacy noise on ``accuracy``."""
    loss_noise: float = 0.0

    def as_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return asdict(self)


def of_sums(sums: dict[str, float], *, noise: float, hospitals: int) -> Validated | str | None:
    """From a round's opened sums; None if nobody validated; a text if they are impossible.

    ``noise``: noise multiplier of one hospital's figures under privacy, 0 for exact ones.
    """
    n = sums.get("val-examples", 0.0)
    if n == 0:
        return None
    correct, loss = sums["val-correct"], sums["val-loss-sum"]
    # As common.privacy.figures draws it: multiplier × largest norm √½, on each of two coordinates.
    spread = noise * math.sqrt(0.5 * hospitals)
    room = 8 * spread + 1e-6 * abs(n)
    if n < 0 or not -room <= correct <= n + room or loss < -LOSS_CLIP * room - 1e-3:
        return (
            f"validation sums that no images can have: {correct:.0f} of {n:.0f} right, "
            f"loss {loss:.3g}"
        )
    return Validated(
        accuracy=min(max(correct / n, 0.0), 1.0),
        loss=max(loss / n, 0.0),
        examples=n,
        accuracy_noise=spread / n,
        loss_noise=LOSS_CLIP * spread / n,
    )


def worse(new: Validated, before: Sequence[Validated], margin: float) -> str | None:
    """Why ``new`` is worse than the models ``before`` it (oldest first), or None.

    ``margin``: so much of accuracy may be lost beside chance: training wavers, too. Compared with
    the best of the last :data:`WINDOW`, so that a slow decline is seen; and with their median loss,
    since the first rounds' accuracy says little.
    """
    recent = list(before[-WINDOW:])
    if not recent:
        return None
    best = max(recent, key=lambda v: v.accuracy)
    chance = math.sqrt(sum(_variance(v) for v in (new, best)))
    if best.accuracy - new.accuracy > margin + _Z * chance:
        return (
            f"accuracy {100 * new.accuracy:.1f} % where it had been {100 * best.accuracy:.1f} % "
            f"(chance explains {100 * _Z * chance:.1f} points, {100 * margin:.0f} may be lost)"
        )
    usual = median(v.loss for v in recent)
    allowed = max(_LOSS_FACTOR * usual, usual + _LOSS_ROOM)
    if new.loss > allowed + _Z * new.loss_noise:
        return f"loss {new.loss:.2f} where it had been {usual:.2f}"
    return None


def _variance(v: Validated) -> float:
    """Of an accuracy: over the choice of images, and of the noise."""
    p = min(max(v.accuracy, 1 / v.examples), 1 - 1 / v.examples) if v.examples > 2 else 0.5
    return p * (1 - p) / max(v.examples, 1.0) + v.accuracy_noise**2


def from_dict(value: dict[str, Any]) -> Validated:
    """Undo :meth:`Validated.as_dict`."""
    return Validated(**{k: float(v) for k, v in value.items()})

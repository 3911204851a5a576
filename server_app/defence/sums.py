"""What one opened sum tells of a lie: the weight that was claimed, the norm, the largest entry.

A hospital that lies may mask any vector: the ring's ranges bind honest encoders only. Three things
remain that it cannot hide from the sum. Its claimed number of images raises the sum of the weights
above what the members' agreed numbers add up to. If it leaves the weight alone and scales its
vector instead, the mean's norm grows. And in one of two disjoint halves it weighs twice as much as
in the whole, and not at all in the other.

Noise is taken into account by its energy: a sum of d coordinates with noise of standard deviation
s has s²d in its squared norm, give or take s²√(2d).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

COUNT_NOISE = 14.2
"""Standard deviation of the noise on a hospital's number of images (common/privacy/plan.py)."""

_Z = 6.0
"""Standard deviations of noise that an honest sum stays within, for all rounds of a run."""

HALF_FACTOR = 1.8
"""A half's mean may be longer than the other's by this. Honest halves of ten hospitals were at most
1.73 times as long, under label skew; under size skew 1.41 times (benchmarks/README.md)."""

ENTRY_FACTOR = 4.0
"""The largest entry may exceed the median of the rounds before by this."""

_FEWEST_BEFORE = 2
"""Rounds before that a norm is compared with."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One opened sum's public figures."""

    members: tuple[str, ...]
    weight: float
    """Sum of the numbers of images that were claimed."""
    norm: float
    """L2 norm of the mean."""
    largest: float
    """Its largest entry in absolute value."""
    noise: float = 0.0
    """Standard deviation of the known noise on each coordinate of the mean."""
    length: int = 1
    """Coordinates."""

    @property
    def signal(self) -> float:
        """Most that the norm can be without its noise (with the noise's own chance)."""
        energy, chance = _noise_energy(self)
        return math.sqrt(max(self.norm**2 - energy, 0.0) + chance)

    def exceeds(self, allowed: float) -> bool:
        """Whether the norm is beyond what ``allowed`` and the noise explain."""
        energy, chance = _noise_energy(self)
        # The signal's product with the noise has this standard deviation, too.
        cross = 2 * allowed * self.noise
        return self.norm**2 > allowed**2 + energy + chance + _Z * cross


def _noise_energy(m: Measured) -> tuple[float, float]:
    """(expected energy of the noise, what chance adds to it at most)."""
    return m.noise**2 * m.length, _Z * m.noise**2 * math.sqrt(2 * m.length)


def weight_bound(
    members: Sequence[str], agreed: Mapping[str, int], most: int, *, private: bool
) -> float | None:
    """Most that honest ``members`` can claim together; None where no number is agreed.

    ``agreed``: images by hospital, as fixed at admission; who is not in it may claim ``most``.
    Under privacy the claims carry noise, for which there is room.
    """
    if not agreed:
        return None
    room = 8 * COUNT_NOISE * math.sqrt(len(members)) if private else 0.0
    return float(sum(agreed.get(name, most) for name in members)) + room


def overclaimed(m: Measured, bound: float | None) -> str | None:
    """Why the weight cannot be true, or None."""
    if bound is not None and m.weight > bound:
        return f"{m.weight:.0f} images were claimed where {bound:.0f} were agreed on"
    if not m.weight >= 1:
        return f"{m.weight:.0f} images were claimed"
    return None


def outsized(
    m: Measured, norms: Sequence[float], entries: Sequence[float], factor: float
) -> str | None:
    """Why the mean is too large beside the rounds before, or None; also with too few of them.

    ``norms`` (without noise) and ``entries``: of adopted rounds; ``factor``: of their median.
    """
    if len(norms) < _FEWEST_BEFORE:
        return None
    usual = median(norms)
    if m.exceeds(factor * usual):
        return f"the mean update's norm is {m.norm:.3g}; of the rounds before {usual:.3g}"
    common = median(entries)
    if m.largest > ENTRY_FACTOR * common + _Z * m.noise:
        return f"the mean update's largest entry is {m.largest:.3g}; before {common:.3g}"
    return None


def uneven(one: Measured, other: Measured) -> str | None:
    """Why ``one`` half's mean is too long beside the ``other``'s, or None."""
    # Of smaller halves the means have more of single hospitals' scatter in them.
    if one.exceeds(HALF_FACTOR * other.signal):
        return f"this half's mean update has norm {one.norm:.3g}, the other's {other.norm:.3g}"
    return None


def log_ratio(one: Measured, other: Measured) -> float:
    """Logarithm of the ratio of two means' norms, their noise taken off."""
    tiny = 1e-30
    return math.log(max(one.signal, tiny) / max(other.signal, tiny))

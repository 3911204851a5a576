"""What lies where in the aggregated vector, and at which fixed-point scale.

The scale of a segment follows from the parameters alone, so that no hospital can choose
another. With ``n`` the largest cohort and ``b`` the ring's bits, one hospital may encode up
to ``M = floor((2**(b-1) - 1) / n)`` in absolute value; since ``n M < 2**(b-1)``, the sum of
a whole cohort never wraps, rounding included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from common.errors import ConfigError
from common.secagg import wire
from common.secagg.errors import malformed
from common.secagg.params import SecAggParams

Kind = Literal["integer", "real", "modular"]
KINDS = get_args(Kind)

WEIGHT = "weight"
"""Reserved segment: one integer, the hospital's weight; the encoder fills it in itself."""
MAX_SEGMENTS = 64
_FLOAT_LIMIT = 1 << 50
"""Largest encoded real value: below it, float64 arithmetic has fraction bits to round with."""
_EXACT = 1 << 53
"""Integers below this are exact in the float64 that decoding returns."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """``length`` values of absolute value at most ``bound``.

    kind: ``integer`` is summed exactly (scale 1); ``real`` in fixed point; ``modular``: integers
        of any size, whose sum is learned modulo the ring and may wrap. Nothing of one hospital's
        values decides what leaves it, which noise that is shared among hospitals needs.
    weighted: the hospital's weight multiplies each value before it is encoded.
    step: largest acceptable fixed-point step of the encoded (weighted) value; 0 asks only
        for the parameters' ``min_precision_bits``. Of a modular segment: what one means.
    """

    name: str
    length: int
    bound: float
    kind: Kind = "real"
    weighted: bool = False
    step: float = 0.0


@dataclass(frozen=True)
class SegmentPlan:
    """Where a segment lies and how it is encoded: ``round(value * scale)``, at most ``limit``."""

    segment: Segment
    start: int
    stop: int
    scale: float
    limit: int


@dataclass(frozen=True)
class VectorLayout:
    """The segments of the vector, in order, and the largest weight of a hospital."""

    segments: tuple[Segment, ...]
    max_weight: int = 1

    @property
    def length(self) -> int:
        """Number of values in the vector."""
        return sum(segment.length for segment in self.segments)

    def plan(self, params: SecAggParams) -> tuple[SegmentPlan, ...]:
        """Place and scale each segment; :class:`ConfigError` if something cannot fit.

        Guarantee: ``params.max_cohort * limit < 2**(ring_bits - 1)`` for every segment that is
        not modular.
        """
        self._check()
        plans, start = [], 0
        for segment in self.segments:
            scale, limit = self._scale(segment, params)
            plans.append(SegmentPlan(segment, start, start + segment.length, scale, limit))
            start += segment.length
        return tuple(plans)

    def _scale(self, segment: Segment, params: SecAggParams) -> tuple[float, int]:
        room = ((1 << (params.ring_bits - 1)) - 1) // params.max_cohort
        factor = self.max_weight if segment.weighted else 1
        if segment.kind == "modular":
            return 1.0, 1 << (params.ring_bits - 1)
        if segment.kind == "integer":
            largest = int(segment.bound) * factor
            if largest > room or largest * params.max_cohort > _EXACT:
                raise _overflow(segment, self, params, f"{largest} of a hospital's {room}")
            return 1.0, largest
        limit = min(room, _FLOAT_LIMIT)
        step = segment.bound * factor / max(limit - 1, 1)
        if limit < 1 << params.min_precision_bits:
            raise _overflow(
                segment,
                self,
                params,
                f"{params.min_precision_bits} bits, and {limit} steps are all that a hospital has",
            )
        if 0 < segment.step < step:
            raise _overflow(segment, self, params, f"steps of {segment.step:g}, and has {step:g}")
        # One step is kept back, so that rounding up cannot pass the limit.
        return (limit - 1) / (segment.bound * factor), limit

    def _check(self) -> None:
        names = [segment.name for segment in self.segments]
        if not 1 <= len(names) <= MAX_SEGMENTS or len(set(names)) != len(names):
            raise ConfigError(
                f"A vector of {len(names)} segments, or one with a name twice.",
                f"Use 1 to {MAX_SEGMENTS} segments with different names.",
            )
        if type(self.max_weight) is not int or not 1 <= self.max_weight < 1 << 40:
            raise ConfigError("max_weight is not a whole number from 1 to 2**40.", "Correct it.")
        for segment in self.segments:
            whole = segment.kind == "real" or float(segment.bound).is_integer()
            bounded = math.isfinite(segment.bound) and 0 < segment.bound < 2.0**53 and whole
            if segment.kind not in KINDS or not bounded:
                raise ConfigError(
                    f"Segment {segment.name!r} has kind {segment.kind!r}, bound {segment.bound}.",
                    f"Use kind {' or '.join(KINDS)}, and a positive bound (whole but for reals).",
                )
            if type(segment.length) is not int or not 1 <= segment.length < 1 << 40:
                raise ConfigError(f"Segment {segment.name!r} has no valid length.", "Correct it.")
            if not math.isfinite(segment.step) or segment.step < 0:
                raise ConfigError(f"Segment {segment.name!r} has no valid step.", "Correct it.")
            if segment.name == WEIGHT and (
                segment.kind != "integer"
                or segment.length != 1
                or segment.weighted
                or segment.bound != self.max_weight
            ):
                raise ConfigError(
                    f"Segment {WEIGHT!r} is reserved for the sum of the weights.",
                    "Make it one unweighted integer with bound max_weight, or rename it.",
                )
            if segment.kind == "modular" and segment.weighted:
                raise ConfigError(
                    f"Segment {segment.name!r} is modular and weighted.", "Weight its values first."
                )

    def to_wire(self) -> list[object]:
        """The layout as nested lists of plain values."""
        rows = [
            [s.name, s.length, float(s.bound), s.kind, int(s.weighted), float(s.step)]
            for s in self.segments
        ]
        return [self.max_weight, rows]

    @classmethod
    def from_wire(cls, value: object) -> VectorLayout:
        """Read what :meth:`to_wire` wrote; :class:`Refusal` if malformed."""
        max_weight, rows = wire.as_record(value, 2)
        segments = tuple(_segment(row) for row in wire.as_list(rows, most=MAX_SEGMENTS))
        return cls(segments, wire.as_int(max_weight))


def update_layout(
    length: int, *, bound: float, max_weight: int, metrics: Sequence[Segment] = ()
) -> VectorLayout:
    """The usual vector: the weighted update, the weight itself, then the metrics."""
    update = Segment(name="update", length=length, bound=bound, weighted=True)
    weight = Segment(name=WEIGHT, length=1, bound=max_weight, kind="integer")
    return VectorLayout((update, weight, *metrics), max_weight)


def _segment(row: object) -> Segment:
    name, length, bound, kind, weighted, step = wire.as_record(row, 6)
    if kind not in KINDS or wire.as_int(weighted) not in (0, 1):
        raise malformed("a segment is of no known kind")
    return Segment(
        name=wire.as_name(name),
        length=wire.as_int(length),
        bound=wire.as_float(bound),
        kind=cast(Kind, kind),
        weighted=bool(weighted),
        step=wire.as_float(step),
    )


def _overflow(
    segment: Segment, layout: VectorLayout, params: SecAggParams, needs: str
) -> ConfigError:
    weight = f", weights up to {layout.max_weight}" if segment.weighted else ""
    return ConfigError(
        f"Segment {segment.name!r} does not fit the ring: range {segment.bound:g}{weight}, up to "
        f"{params.max_cohort} hospitals, {params.ring_bits} bits; it needs {needs}.",
        f"Take one of three ways out: a smaller range (now {segment.bound:g}); a smaller "
        f"max_weight ({layout.max_weight}) or max_cohort ({params.max_cohort}); more ring_bits "
        f"({params.ring_bits}).",
    )

"""What was noted of a run's rounds, and the figures drawn from it. No clock, no process here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Interval = tuple[float, float]

PARTS = ("train", "validate", "test")
"""Work on pictures: training, hospitals' validation of the model, the server's test figures."""


@dataclass(frozen=True)
class Span:
    """One call of one function."""

    label: str
    process: int
    thread: int
    begin: float
    end: float
    cpu: float
    """CPU seconds of its thread; with one thread of computing, all that it took."""


def read_spans(path: Path) -> list[Span]:
    """All calls that a run noted, by when they began."""
    spans = [Span(*json.loads(line)) for line in path.read_text().splitlines()]
    return sorted(spans, key=lambda span: span.begin)


def rounds_of(spans: Iterable[Span]) -> list[Interval]:
    """Begin and end of each round, in order.

    A round begins when the server says that it does, and ends when its record is kept: hospitals,
    secure aggregation, test figures and files are inside.
    """
    rounds: list[Interval] = []
    begin: float | None = None
    for span in spans:
        if span.label == "round-starts":
            begin = span.begin
        elif span.label == "round-ends" and begin is not None:
            rounds.append((begin, span.end))
            begin = None
    return rounds


def union(intervals: Iterable[Interval]) -> float:
    """Seconds in which at least one of ``intervals`` was going on."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def most_at_once(intervals: Sequence[Interval]) -> int:
    """How many of ``intervals`` were going on at one moment, at most."""
    ends = [(begin, 1) for begin, _ in intervals] + [(end, -1) for _, end in intervals]
    at_hand = most = 0
    for _, change in sorted(ends):
        at_hand += change
        most = max(most, at_hand)
    return most


def inside(spans: Iterable[Span], label: str, within: Interval) -> list[Interval]:
    """The calls of ``label`` within an interval, cut to it."""
    begin, end = within
    return [
        (max(span.begin, begin), min(span.end, end))
        for span in spans
        if span.label == label and span.end > begin and span.begin < end
    ]


def _in(span: Span, label: str, within: Interval) -> bool:
    return span.label == label and within[0] <= span.begin and span.end <= within[1]


def shares(spans: Sequence[Span], rounds: Sequence[Interval]) -> Row:
    """Medians over ``rounds``: a round's wall seconds, and those in which somebody trained.

    ``share_not_training`` is of wall time: 1 less the share of it in which at least one hospital
    trains; ``slots_not_training`` of the time of as many as train at once at most. ``rest_s`` is
    what neither trains nor validates nor tests: messages, secure aggregation, ledgers, files,
    waiting. ``training_hospital_s`` (wall) and ``train_cpu_s`` add up over the hospitals.
    """
    each: list[Row] = []
    for one in rounds:
        wall = one[1] - one[0]
        seconds = {part: union(inside(spans, part, one)) for part in PARTS}
        busy = union([i for part in PARTS for i in inside(spans, part, one)])
        trainings = inside(spans, "train", one)
        training = sum(end - begin for begin, end in trainings)
        slots = max(1, most_at_once(trainings))
        each.append(
            {
                "wall_s": wall,
                **{f"{part}_s": value for part, value in seconds.items()},
                "rest_s": wall - busy,
                "training_hospital_s": training,
                "train_cpu_s": sum(s.cpu for s in spans if _in(s, "train", one)),
                "share_not_training": 1 - seconds["train"] / wall,
                "slots": slots,
                "slots_not_training": 1 - training / wall / slots,
            }
        )
    return {key: round(statistics.median(e[key] for e in each), 4) for key in each[0]} | {
        "rounds_measured": len(each),
        "wall_s_all": [round(e["wall_s"], 3) for e in each],
    }

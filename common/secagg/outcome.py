"""Who took part in a round: expected, contributed, dropped at which stage and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Dropout:
    """At which stage a hospital dropped, and the reason (a code or a short text)."""

    stage: str
    reason: str


@dataclass(frozen=True)
class RoundOutcome:
    """What a round reports at its end, whether it succeeded or not.

    contributed: hospitals whose masked input is in the sum; empty if the round failed.
    dropped: everybody who left, by name. A hospital that left after its masked input was
        taken stands here and in ``contributed``.
    misbehaved: hospitals that sent a share which its owner had not committed to.
    """

    expected: tuple[str, ...]
    contributed: tuple[str, ...]
    dropped: Mapping[str, Dropout]
    misbehaved: Mapping[str, str]

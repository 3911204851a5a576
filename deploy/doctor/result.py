"""What a check comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["PASS", "WARN", "FAIL"]

WORST: tuple[Status, ...] = ("FAIL", "WARN", "PASS")
"""From the worst to the best."""


@dataclass(frozen=True)
class Result:
    """One check's outcome.

    ``PASS``: nothing to do; ``WARN``: it works, and somebody should look at it, or it could not
    be checked; ``FAIL``: it will not work. ``remedy`` is empty for ``PASS`` only. ``needed``: the
    check whose outcome kept this one from being made, or "".
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    needed: str = ""

    def __post_init__(self) -> None:
        """Hold what the class promises."""
        if (self.status == "PASS") != (not self.remedy):
            raise ValueError(f"{self.name}: a remedy, and only one, belongs to what is not PASS")


@dataclass(frozen=True)
class Finding:
    """What a check function returns; its name is in the list of checks."""

    status: Status
    found: str
    remedy: str = ""


def good(found: str) -> Finding:
    """PASS."""
    return Finding("PASS", found)


def warn(found: str, remedy: str) -> Finding:
    """WARN."""
    return Finding("WARN", found, remedy)


def fail(found: str, remedy: str) -> Finding:
    """FAIL."""
    return Finding("FAIL", found, remedy)


class NotChecked(Exception):
    """A check cannot be made because of another one's outcome: ``needed`` is its name."""

    def __init__(self, needed: str) -> None:
        super().__init__(needed)
        self.needed = needed

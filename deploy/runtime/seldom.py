"""Lines that others can provoke as often as they like are told seldom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

QUIET = 10.0
"""Seconds between two lines of one kind."""
_MOST_KINDS = 1000


class Seldom:
    """Says a line of each kind at most once in ``quiet`` seconds, and how many it left out."""

    def __init__(self, say: Callable[[str], None], quiet: float = QUIET) -> None:
        self._say, self._quiet = say, quiet
        self._kinds: dict[str, tuple[float, int]] = {}

    def __call__(self, line: str, kind: str = "") -> None:
        """``kind``: what the line is one of; the line itself if it is left out."""
        if left_out := self.due(kind or line):
            more = f" (and {left_out - 1} times more meanwhile)" if left_out > 1 else ""
            self._say(line + more)

    def due(self, kind: str) -> int:
        """0 if a line of ``kind`` is to be left out now, else how many came since the last."""
        now = time.monotonic()
        told, left_out = self._kinds.get(kind, (now - self._quiet, 0))
        if now - told < self._quiet:
            self._kinds[kind] = told, left_out + 1
            return 0
        if len(self._kinds) >= _MOST_KINDS and kind not in self._kinds:
            self._kinds.clear()  # the kinds are ours, few; were they others', they fill no memory
        self._kinds[kind] = now, 0
        return left_out + 1


class SeldomFilter(logging.Filter):
    """Lets a logger's lines of one kind (before their arguments are put in) through seldom."""

    def __init__(self, quiet: float = QUIET) -> None:
        super().__init__()
        self._seldom = Seldom(lambda line: None, quiet)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is told now."""
        return bool(self._seldom.due(str(record.msg)))

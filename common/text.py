"""Text from the other side, for a terminal, a log line, a table: what cannot be printed is escaped.

A name that a server or a hospital chose, or that a file has, may hold what commands a terminal
(ESC), what begins a line that looks like one of ours (a newline), or what shows letters in another
order than they stand (bidirectional marks). :func:`printable` is the one place where that ends.
Every two-part error passes through it (:mod:`common.errors`), and every line that our loggers and
Flower's write (:func:`guard_logs`, which importing ``common`` calls): no caller can forget it.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

LIMIT = 4000
"""Characters of one text, where the caller says nothing else."""
GUARDED = ("consilium", "flwr")
"""Loggers whose lines are escaped, with all below them."""
CONTINUED = "\n  | "
"""Before the further lines of one entry in a log: none of them can look like an entry."""

_ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None]


def printable(text: object, limit: int = LIMIT) -> str:
    """``text`` in one line of at most about ``limit`` characters, harmless to print.

    Characters that Unicode calls printable stay; all others (control, format and so bidirectional
    marks, line ends, surrogates, unassigned) become ``\\\\n``, ``\\\\x1b``, ``\\\\u202e`` and the
    like. Applied twice it changes nothing more.
    """
    whole = str(text)
    line = whole[:limit]
    if not line.isprintable():
        line = "".join(c if c.isprintable() else _escaped(c) for c in line)
    return line if len(whole) <= limit else f"{line}… ({len(whole)} characters)"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def printable_lines(text: str, limit: int = LIMIT) -> str:
    """The same of each line; the further ones begin with :data:`CONTINUED`."""
    lines = text.split("\n")
    return CONTINUED.join(printable(line, limit) for line in lines)


class GuardedRecord(logging.LogRecord):
    """An entry of a log whose message and traceback are escaped, whatever formats them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and not self.exc_text:
            # Formatters use this where it is set already.
            self.exc_text = _traceback(self.exc_info)

    def getMessage(self) -> str:
        """The message with its arguments, escaped."""
        return printable_lines(super().getMessage())


def _traceback(info: Any) -> str:
    lines = "".join(traceback.format_exception(*info)).rstrip("\n")
    return CONTINUED.lstrip("\n") + printable_lines(lines)


_plain: Any = None


def _record(
    name: str,
    level: int,
    path: str,
    line: int,
    message: object,
    args: tuple[object, ...] | Mapping[str, object],
    info: _ExcInfo | None,
    function: str | None = None,
    stack: str | None = None,
    **more: Any,
) -> logging.LogRecord:
    make = GuardedRecord if name.split(".", 1)[0] in GUARDED else _plain
    made: logging.LogRecord = make(
        name, level, path, line, message, args, info, function, stack, **more
    )
    return made


def guard_logs() -> None:
    """From now on every entry of a logger of :data:`GUARDED` is a :class:`GuardedRecord`.

    By the factory of records, since a filter or a formatter holds for one logger or handler only,
    and Flower brings its own. Once more changes nothing.
    """
    global _plain
    if _plain is None:
        _plain = logging.getLogRecordFactory()
        logging.setLogRecordFactory(_record)

"""A ledger's rows as entries, each checked against its own hash and the one before.

A ledger is opened for every message, and a process that works on many (a simulation, a grid in one
process) would hash every entry anew each time: a cost that grows with the square of a run's
rounds. So what this process has found whole is kept: the entries, and a digest of the very rows
that they were read from. :func:`verified` is a function of a ledger's first predecessor and its
rows alone, and says the same with and without what is kept:

* rows that begin with those found whole before, to the last byte and type, are those entries, and
  only rows after them are hashed one by one;
* any other rows (one was edited, cut off, put in, moved) are hashed from the first one on.

Nothing is kept outside the process: a new one hashes everything.
"""

from __future__ import annotations

import hashlib
import marshal
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.privacy.ledger.entry import COLUMNS, Entry

_LEDGERS = 64
"""Of how many ledgers is kept what was found, those used last: as many as a simulation has."""

Row = tuple[Any, ...]
"""The columns of one entry, in the order of :data:`~common.privacy.ledger.entry.COLUMNS`."""


@dataclass(frozen=True)
class _Found:
    entries: tuple[Entry, ...]
    rows: bytes
    """Digest of the rows that the entries are."""


_found: OrderedDict[str, _Found] = OrderedDict()
"""A ledger's first predecessor → what was found whole. A copy of a ledger has the same one: the
rows decide, and never the path or the file."""
_lock = threading.Lock()


def verified(genesis: str, rows: Sequence[Row], *, anew: bool = False) -> tuple[Entry, ...]:
    """The entries that ``rows`` are, in their order, all of them verified.

    ``genesis``: the first entry's predecessor. ``anew``: hash all of them, whatever was found
    before. Raises ValueError naming the first entry that is missing, was changed, or does not
    follow from the one before; TypeError or ValueError for what cannot be an entry's field.
    """
    known = None if anew else _known(genesis, rows)
    entries = list(known.entries) if known else []
    if known is not None and len(entries) == len(rows):
        return known.entries
    previous = entries[-1].hash if entries else genesis
    for number, row in enumerate(rows[len(entries) :], start=len(entries) + 1):
        entry = entry_of(row)
        if entry.seq != number:
            raise ValueError(f"entry {number} is missing")
        whole = entry.hash == entry.digest() and entry.is_of_its_schema()
        if entry.previous != previous or not whole:
            raise ValueError(f"entry {number} was changed after it was written")
        previous = entry.hash
        entries.append(entry)
    found = _Found(tuple(entries), _digest(rows))
    with _lock:
        _found[genesis] = found
        _found.move_to_end(genesis)
        while len(_found) > _LEDGERS:
            _found.popitem(last=False)
    return found.entries


def entry_of(row: Row) -> Entry:
    """The entry of one row, not verified."""
    return Entry(**dict(zip(COLUMNS, row, strict=True)))


def _known(genesis: str, rows: Sequence[Row]) -> _Found | None:
    """What was found whole before and is what ``rows`` begin with; None: nothing is."""
    with _lock:
        found = _found.get(genesis)
    if found is None or len(found.entries) > len(rows):
        return None
    return found if _digest(rows[: len(found.entries)]) == found.rows else None


def _digest(rows: Sequence[Row]) -> bytes:
    """SHA-256 that is another one where any value, or its type, is: 1, 1.0 and "1" differ.

    Format 2 of marshal writes every value out, and none as a reference to an earlier one, which
    would depend on how the rows came about.
    """
    return hashlib.sha256(marshal.dumps(list(rows), 2)).digest()

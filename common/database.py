"""What our SQLite files have in common."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def write_transaction(database: sqlite3.Connection) -> Iterator[None]:
    """Alone with the file, from the first read to the commit; undone on any error.

    ``database``: in autocommit mode (``isolation_level=None``). Raises what the block raises, and
    ``sqlite3.Error`` where the file is locked or cannot be written.
    """
    try:
        database.execute("BEGIN IMMEDIATE")
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise

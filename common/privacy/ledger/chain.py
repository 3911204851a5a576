"""The ledger's file: SQLite, append-only, every entry chained to the one before by its hash.

A changed, removed or inserted entry breaks the chain. Entries cut off at the end leave a chain
that is whole but shorter than the *head* written down beside the file, and than any head that a
person noted (``consilium ledger verify --head``). Whoever may write both files and knows no
earlier head can still rewrite history: the chain is against accidents and against quiet edits,
not against the hospital's own administrator.

An entry is hashed over the fields of the schema that it was written under
(:mod:`common.privacy.ledger.schema`), so that a ledger of an earlier version of consilium is whole
as it is, and goes on. ``user_version`` is the newest schema that has written to the file: one that
is newer than this code is not read, since what its entries cost could not be told.

SQLite's rollback journal with ``synchronous=EXTRA``: a transaction is on the disk when it has
committed, and one that was killed is undone at the next opening.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.database import write_transaction
from common.errors import PrivacyError
from common.files import atomic_write
from common.privacy.ledger.entry import COLUMNS, DEFAULTS, Entry
from common.privacy.ledger.schema import VERSION, fields_of, steps_to
from common.privacy.ledger.verified import Row, entry_of, verified

__all__ = ["BUSY_SECONDS", "GENESIS", "VERSION", "Chain", "Entry", "LedgerError"]

GENESIS = "0" * 64
BUSY_SECONDS = 120.0
"""How long one process waits for another's transaction: an admission may calibrate for seconds."""

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    time TEXT NOT NULL,
    kind TEXT NOT NULL,
    run TEXT NOT NULL,
    round INTEGER,
    dataset TEXT NOT NULL,
    part TEXT NOT NULL,
    mechanism TEXT NOT NULL,
    unit TEXT NOT NULL,
    sampling_rate REAL,
    noise_multiplier REAL,
    steps INTEGER,
    pure_epsilon REAL,
    model TEXT NOT NULL,
    refers INTEGER,
    note TEXT NOT NULL,
    previous TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE
);
CREATE TABLE members (
    dataset TEXT NOT NULL,
    part TEXT NOT NULL,
    image BLOB NOT NULL,
    patient BLOB NOT NULL
);
CREATE INDEX members_by_image ON members (image);
CREATE INDEX members_by_patient ON members (patient);
CREATE INDEX members_by_dataset ON members (dataset);
"""
_TRIGGERS = "".join(
    f"""
CREATE TRIGGER no_{verb.lower()}_of_{table} BEFORE {verb} ON {table}
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""
    for table in ("meta", "entries", "members")
    for verb in ("UPDATE", "DELETE")
)


class LedgerError(PrivacyError):
    """The ledger is damaged, or is not the one that was here before; nothing is trained."""

    code = "ledger"


class Chain:
    """The open file. Opening it compares every entry with its hash, or with what this process found
    to be so before (:mod:`common.privacy.ledger.verified`): an edit of any entry, old ones too, is
    found at the next opening, in the same process as in another one. :meth:`verify` hashes every
    entry, whatever was found before.

    :meth:`entries` gives those that opening verified as they were then, and reads those that were
    added since, which the next opening verifies.

    Raises :class:`LedgerError` for a file that is no ledger, of another version, broken, or
    shorter than its head says; for a head without its ledger.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        self._head_file = path.with_suffix(".head")
        # Looked for before the ledger, after which it is written: another process may be making
        # both at this moment.
        self._had_head = self._head_file.exists()
        self._verified: tuple[Entry, ...] = ()
        if not path.exists():
            if self._had_head:
                raise self._lost()
            if not create:
                raise LedgerError(f"there is no privacy ledger {path}", "check the path")
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            # Made with its mode before SQLite opens it; not replaced if another was quicker.
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        try:
            self._db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        except sqlite3.Error as error:
            raise _unusable(path, error) from None
        try:
            self._db.execute("PRAGMA synchronous=EXTRA")
            self._prepare(create)
            self._verified = self._check(anew=False)
        except sqlite3.OperationalError as error:  # locked, read-only, no more room
            self._db.close()
            raise _unusable(path, error) from None
        except (sqlite3.Error, TypeError, ValueError) as error:
            self._db.close()
            raise self.damaged(str(error)) from None
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _prepare(self, create: bool) -> None:
        if self._version() is None:
            if self._had_head:  # a file of which nothing is left is no new ledger
                raise self._lost()
            if not create:
                raise LedgerError(f"{self.path} is no privacy ledger", "check the path")
            with self.transaction():
                if self._version() is None:
                    for statement in _statements(_SCHEMA + _TRIGGERS):
                        self._db.execute(statement)
                    self._db.execute("INSERT INTO meta VALUES ('salt', ?)", [os.urandom(32)])
                    self._db.execute("INSERT INTO meta VALUES ('id', ?)", [secrets.token_hex(8)])
                    self._raise_to(VERSION, since=1)
        self._schema()

    def _schema(self) -> int:
        """The newest schema that has written to the file; LedgerError unless this code knows it.

        Asked each time: another process may be of a later version, and write meanwhile.
        """
        version = self._version() or 0
        if version > VERSION:
            raise LedgerError(
                f"the privacy ledger {self.path} is of schema {version}: a later version of "
                f"consilium has written to it than this one, which reads schemas up to {VERSION}",
                "use the version of consilium that wrote it, or a later one; nothing is trained "
                "meanwhile",
            )
        if version < 1:
            raise self.damaged(f"it is of schema {version}, and there is none")
        return version

    def _raise_to(self, version: int, *, since: int) -> None:
        """Give the file what entries of ``version`` need, inside a transaction."""
        for statement in steps_to(version, since=since):
            self._db.execute(statement)
        self._db.execute(f"PRAGMA user_version={version}")

    def _version(self) -> int | None:
        """The schema's version; None for an empty file."""
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return int(self._db.execute("PRAGMA user_version").fetchone()[0]) if tables else None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Alone with the file, from the first read to the commit; undone on any error."""
        try:
            with write_transaction(self._db):
                yield
        except sqlite3.Error as error:  # locked, no room on the disk
            raise _unusable(self.path, error) from None
        try:
            self._note_head()
        except OSError as error:
            raise _unusable(self.path, error) from None

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read inside is of one moment; writers wait meanwhile."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("ROLLBACK")

    def append(self, entry: Entry) -> Entry:
        """Add ``entry`` at the end, inside a transaction; returns it as it was written."""
        last = self._db.execute(
            "SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1"
        ).fetchone()
        seq, previous = (last[0] + 1, last[1]) if last else (1, self._genesis())
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        chained = replace(entry, seq=seq, time=now, previous=previous, hash="", schema=VERSION)
        chained = replace(chained, hash=chained.digest())
        version = self._schema()
        if version < VERSION:  # not at the opening: to look at a ledger does not change it
            self._raise_to(VERSION, since=version)
        content = chained.content()
        marks = ",".join("?" * len(content))
        self._db.execute(
            f"INSERT INTO entries ({','.join(content)}) VALUES ({marks})", list(content.values())
        )
        return chained

    def entries(self, *, run: str | None = None) -> list[Entry]:
        """All entries, or one run's, in their order."""
        later = map(entry_of, self._rows(after=len(self._verified)))
        return [e for e in (*self._verified, *later) if run in (None, e.run)]

    def _rows(self, after: int | None = None) -> list[Row]:
        """The rows of all entries, or of those ``after`` that number.

        A column that came after the file's last entry is read as its default.
        """
        where, values = ("", []) if after is None else ("WHERE seq > ?", [after])
        while True:
            schema = self._schema()
            there = fields_of(schema)
            missing = [DEFAULTS[name] for name in COLUMNS if name not in there]
            columns = ",".join(name if name in there else "?" for name in COLUMNS)
            query = f"SELECT {columns} FROM entries {where} ORDER BY seq"
            rows = self._db.execute(query, [*missing, *values]).fetchall()
            # Else another process has raised it in between, and written entries of the new one.
            if self._schema() == schema:
                return rows

    def add_members(self, rows: Iterator[tuple[str, str, bytes, bytes]]) -> None:
        """Add (dataset, part, image, patient) rows, inside a transaction."""
        self._db.executemany("INSERT INTO members VALUES (?, ?, ?, ?)", rows)

    def members(self, where: str, values: list[Any]) -> list[tuple[str, str, bytes, bytes]]:
        """(dataset, part, image, patient) rows under a fixed SQL condition."""
        return list(
            self._db.execute(
                f"SELECT dataset, part, image, patient FROM members WHERE {where}",
                values,
            )
        )

    def meta(self, name: str) -> bytes:
        """A constant of this ledger: ``salt`` (32 random bytes) or ``id``."""
        value = self._db.execute("SELECT value FROM meta WHERE name = ?", [name]).fetchone()[0]
        return value.encode() if isinstance(value, str) else bytes(value)

    def _genesis(self) -> str:
        """The first entry's predecessor: binds the chain to this ledger's salt."""
        return hashlib.sha256(b"consilium-ledger\0" + self.meta("salt")).hexdigest()

    def head(self) -> tuple[int, str]:
        """(number, hash) of the last entry; (0, zeros) of an empty ledger."""
        row = self._db.execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        return (int(row[0]), str(row[1])) if row else (0, GENESIS)

    def _note_head(self) -> None:
        number, value = self.head()
        noted = f"{number} {value}\n"
        # A durable write waits for the disk, and many transactions add nothing.
        with suppress(OSError, ValueError):
            if self._head_file.read_text() == noted:
                return
        atomic_write(self._head_file, noted, mode=0o600)

    def verify(self, head: str = "") -> int:
        """Hash the whole chain, and check that it holds its noted head and ``head``; its length.

        Raises LedgerError naming the first entry that is wrong.
        """
        entries = self._check(anew=True)
        if head and head != GENESIS and all(e.hash != head for e in entries):
            raise self.damaged(f"the head {head} is not in it: entries were removed or rewritten")
        return len(entries)

    def _check(self, *, anew: bool) -> tuple[Entry, ...]:
        """All entries, verified, among them the noted head; LedgerError where they are not whole.

        ``anew``: by their hashes, even where this process has found them whole before.
        """
        # Before the entries: another process may append meanwhile, and note a head beyond them.
        noted = self._noted_head()
        try:
            entries = verified(self._genesis(), self._rows(), anew=anew)
        except (TypeError, ValueError) as wrong:
            raise self.damaged(str(wrong)) from None
        # The file is written after the commit, so it may be behind; never ahead. Mostly it is the
        # last entry's: looked for from the end.
        if noted not in (None, GENESIS) and all(e.hash != noted for e in reversed(entries)):
            raise self.damaged("it lacks its last noted entry: entries were cut off")
        return entries

    def _noted_head(self) -> str | None:
        try:
            text = self._head_file.read_text().split()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise self.damaged(f"its head file cannot be read: {type(error).__name__}") from None
        if len(text) != 2:
            raise self.damaged("its head file is malformed")
        return text[1]

    def _lost(self) -> LedgerError:
        return LedgerError(
            f"the privacy ledger {self.path} is gone, but its head {self._head_file.name} is "
            "still here",
            "restore the ledger from a backup; without it nobody knows what was spent",
        )

    def damaged(self, what: str) -> LedgerError:
        """The error for a ledger in which ``what`` is wrong."""
        return LedgerError(
            f"the privacy ledger {self.path} is damaged: {what}",
            "restore it from a backup and find out who changed it; nothing is trained meanwhile",
        )


def _unusable(path: Path, error: sqlite3.Error | OSError) -> LedgerError:
    return LedgerError(
        f"the privacy ledger {path} cannot be used: {error}",
        "check that this user may read and write it and its folder, that the disk has room, and "
        "that no other program holds it; nothing is trained meanwhile",
    )


def _statements(script: str) -> list[str]:
    """A script's statements: sqlite3's own executescript would commit the transaction at hand."""
    found, at_hand = [], ""
    for line in script.splitlines():
        at_hand += line + "\n"
        if sqlite3.complete_statement(at_hand):
            found.append(at_hand)
            at_hand = ""
    return found

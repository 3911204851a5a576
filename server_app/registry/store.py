"""The registry's folder: rows in SQLite, tensors in files; whole at every moment.

``registry.sqlite`` (write-ahead log, ``synchronous=FULL``: a commit is on the disk),
``bases/VERSION-ID.safetensors``, ``vectors/SERIAL.safetensors``. A file is written, and flushed
to the disk, before the row that names it is committed, and removed after the row has gone: a
kill leaves at most files that no row names, which are removed at the next opening. Everything
happens under SQLite's write lock, so several processes may share a folder.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from common.database import write_transaction
from common.files import atomic_write
from common.vectors import Base, SignedVector, VectorError
from common.vectors.tensors import Arrays
from server_app.registry.history import (
    ACTIVE,
    RETIRED,
    WITHDRAWN,
    BaseRow,
    Log,
    PublicationRow,
    VectorRow,
)

VERSION = 1
FOLDERS = ("bases", "vectors")
BUSY_SECONDS = 120.0
"""How long one process waits for another's transaction, which may merge for a while."""

_SCHEMA = (
    """CREATE TABLE bases (
        version INTEGER NOT NULL, id TEXT NOT NULL, parent TEXT, model TEXT NOT NULL,
        pretrained INTEGER NOT NULL, state TEXT NOT NULL, made TEXT NOT NULL,
        PRIMARY KEY (version, id))""",
    """CREATE TABLE publications (
        version INTEGER PRIMARY KEY, upto INTEGER NOT NULL, rule TEXT NOT NULL,
        recipe TEXT NOT NULL, gate TEXT NOT NULL, published TEXT NOT NULL,
        taken_back TEXT NOT NULL)""",
    """CREATE TABLE vectors (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, serial TEXT NOT NULL UNIQUE,
        hospital TEXT NOT NULL, base TEXT NOT NULL, bucket INTEGER NOT NULL, epsilon REAL,
        delta REAL, metrics TEXT NOT NULL, norm REAL NOT NULL, digest TEXT NOT NULL,
        created TEXT NOT NULL, arrived TEXT NOT NULL, state TEXT NOT NULL,
        reason TEXT NOT NULL)""",
)

Row = TypeVar("Row", BaseRow, PublicationRow, VectorRow)


class Store:
    """The open folder. VectorError (``registry-unusable``, ``registry-damaged``)."""

    def __init__(self, folder: Path, *, create: bool = True) -> None:
        self.folder = folder
        self.path = folder / "registry.sqlite"
        if not create and not self.path.exists():
            raise VectorError(
                "registry-unusable", f"there is no registry in {folder}", "check the path"
            )
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in FOLDERS:
            (folder / name).mkdir(exist_ok=True, mode=0o700)
        try:
            self._db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from None
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._db.close()
            raise _unusable(self.path, error) from None
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        # What a hospital has withdrawn must not linger in free pages.
        self._db.execute("PRAGMA secure_delete=ON")
        with self.alone():
            version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
            if version == 0:
                # Rows come before files: were this a new registry, there would be none. Without
                # the rows, all of them would be swept away.
                if any(any((self.folder / name).iterdir()) for name in FOLDERS):
                    raise damaged(f"{self.path.name} is gone, but the files are here")
                for statement in _SCHEMA:
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={VERSION}")
            elif version != VERSION:
                raise VectorError(
                    "registry-unusable",
                    f"{self.path} is of version {version}, not {VERSION}",
                    "use the version of consilium that wrote it, or a later one",
                )
        self.sweep()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With the write lock, from the first read to the commit; undone on any error."""
        try:
            with write_transaction(self._db):
                yield
        except sqlite3.Error as error:  # locked, no room on the disk
            raise _unusable(self.path, error) from None

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Everything read from the rows inside is of one moment; nobody waits."""
        try:
            self._db.execute("BEGIN")
            yield
        except sqlite3.Error as error:
            raise _unusable(self.path, error) from None
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def log(self) -> Log:
        """All rows, inside :meth:`alone` or :meth:`snapshot`."""
        return Log(
            self._all(BaseRow, "bases", "version, made, id"),
            self._all(PublicationRow, "publications", "version"),
            self._all(VectorRow, "vectors", "seq"),
        )

    def _all(self, kind: type[Row], table: str, order: str) -> list[Row]:
        names = [f.name for f in fields(kind)]
        rows = self._db.execute(f"SELECT {','.join(names)} FROM {table} ORDER BY {order}")
        made = []
        for row in rows:
            told: dict[str, Any] = dict(zip(names, row, strict=True))
            if "pretrained" in told:
                told["pretrained"] = bool(told["pretrained"])
            made.append(kind(**told))
        return made

    def execute(self, statement: str, values: Sequence[Any] = ()) -> None:
        """A statement, inside :meth:`alone`."""
        self._db.execute(statement, values)

    def insert(self, table: str, **values: Any) -> None:
        """A new row, inside :meth:`alone`; replaces one of the same key."""
        marks = ",".join("?" * len(values))
        self._db.execute(
            f"INSERT OR REPLACE INTO {table} ({','.join(values)}) VALUES ({marks})",
            list(values.values()),
        )

    # Files

    def base_path(self, version: int, base: str) -> Path:
        """Where a base of the line is."""
        return self.folder / "bases" / f"{version:05d}-{base}.safetensors"

    def vector_path(self, serial: str) -> Path:
        """Where a vector's envelope is."""
        return self.folder / "vectors" / f"{serial}.safetensors"

    def write_base(self, base: Base) -> None:
        """Write the base's file, before its row."""
        base.save(self.base_path(base.version, base.id))

    def write_vector(self, serial: str, envelope: bytes) -> None:
        """Write the vector's file, before its row."""
        atomic_write(self.vector_path(serial), envelope, mode=0o600)

    def load_base(self, row: BaseRow) -> Base:
        """A base of the line, of its row's place in it; refused unless its content is its id."""
        path = self.base_path(row.version, row.id)
        try:
            found = Base.load(path, limit=1 << 40)
        except VectorError as error:
            raise damaged(f"base {row.version}: {error.what}") from None
        if found.id != row.id:
            raise damaged(f"the file {path.name} holds another base")
        return Base(
            version=row.version,
            parent=row.parent,
            model_digest=found.model_digest,
            weights=found.weights,
            pretrained=row.pretrained,
        )

    def load_values(self, row: VectorRow) -> Arrays:
        """The values of a vector, refused unless its envelope is the one that was accepted."""
        try:
            envelope = self.vector_path(row.serial).read_bytes()
        except OSError as error:
            raise damaged(f"vector {row.serial}: {error.strerror or error}") from None
        if hashlib.sha256(envelope).hexdigest() != row.digest:
            raise damaged(f"the file of vector {row.serial} was changed")
        return SignedVector.from_bytes(envelope, limit=len(envelope)).vector.values

    def sweep(self) -> None:
        """Remove the files that no row names: of withdrawn vectors, replaced bases, and kills."""
        with self.alone():
            log = self.log()
            kept = {self.vector_path(v.serial) for v in log.vectors if v.state != WITHDRAWN}
            lines = [b for b in log.bases if b.state in (ACTIVE, RETIRED)]
            kept |= {self.base_path(b.version, b.id) for b in lines}
            for name in FOLDERS:
                for path in (self.folder / name).iterdir():
                    if path not in kept and path.is_file():
                        path.unlink(missing_ok=True)


def damaged(what: str) -> VectorError:
    """The error for a registry in which ``what`` is wrong."""
    return VectorError(
        "registry-damaged",
        f"the registry is damaged: {what}",
        "try to rebuild it (a base's file is made anew); else restore the folder from a backup",
    )


def _unusable(path: Path, error: sqlite3.Error) -> VectorError:
    return VectorError(
        "registry-unusable",
        f"the registry {path} cannot be used: {error}",
        "check that this user may read and write its folder, that the disk has room, and that no "
        "other program holds it",
    )

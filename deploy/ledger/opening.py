"""A privacy ledger opened by a person, who may not be the user that the hospital's node runs as."""

from __future__ import annotations

import os
import pwd
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigError
from common.privacy.ledger import Ledger, LedgerError, check_members


@contextmanager
def opened(path: Path, *, write: bool = False) -> Iterator[Ledger]:
    """The ledger, its chain and its members checked; a file that is not there is not made.

    Raises LedgerError for one that is damaged, ConfigError for one that this user may not read
    or, with ``write``, not change.
    """
    _check_access(path, write)
    try:
        ledger = Ledger(path, create=False)
    except LedgerError:
        journal = path.with_name(path.name + "-journal")
        if not journal.exists() or _may_write(path):
            raise
        raise ConfigError(
            f"{path} cannot be read: a crash left a change half done ({journal.name}), and "
            "undoing it needs write access",
            f"run this as {_owner(path)}, or start the hospital's node once",
        ) from None
    try:
        with ledger:
            _check_members(ledger)
            yield ledger
    except sqlite3.Error as error:  # somebody else holds it, or the disk is full
        raise ConfigError(
            f"the privacy ledger {path} cannot be used: {error}",
            "try again; if it stays, check the disk and who may write there",
        ) from None


def _check_members(ledger: Ledger) -> None:
    try:
        check_members(ledger.chain)
    except (sqlite3.Error, TypeError) as error:
        raise ledger.chain.damaged(f"its images cannot be read ({type(error).__name__})") from None


def _check_access(path: Path, write: bool) -> None:
    if not path.exists():
        return  # the ledger says what is missing
    if not path.is_file():
        raise ConfigError(f"{path} is no file", "check the directory")
    if not _may(path, os.R_OK):
        raise ConfigError(f"you may not read {path}", f"run this as {_owner(path)}")
    if write and path.stat().st_uid != os.geteuid():
        # Its head would be written anew as this user's, and lock the hospital's node out.
        raise ConfigError(
            f"{path} belongs to {_owner(path)}, and only that user may change it",
            f"run this as {_owner(path)}",
        )
    if write and not _may_write(path):
        raise ConfigError(f"{path} or its directory is read-only", "make it writable for its owner")


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def _may_write(path: Path) -> bool:
    return _may(path, os.W_OK) and _may(path.parent, os.W_OK | os.X_OK)


def _owner(path: Path) -> str:
    number = path.stat().st_uid
    try:
        return f"user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"user {number}"

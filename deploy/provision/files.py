"""Folders that only their owner reads, keys that are written once, one command at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigError
from common.files import atomic_write

LOCK = ".lock"
_OPEN = 0o077
"""Permission bits of everybody but the owner."""


def private_folder(path: Path) -> Path:
    """``path`` as a folder that only its owner enters; made where it is missing."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.chmod(0o700)
    return path


def claim(root: Path, marker: Path) -> None:
    """Make ``root``, or take it over where it is empty or already has ``marker``.

    ConfigError for a folder with something else in it: it is somebody's.
    """
    if not root.is_dir():
        if os.path.lexists(root):
            raise ConfigError(f"{root} is no folder", "name a folder that does not exist yet")
    elif not marker.exists():
        # A kill may have left the lock, and the marker's own temporary file.
        mine = (LOCK, f".{marker.name}.")
        if foreign := [p.name for p in root.iterdir() if not p.name.startswith(mine)]:
            raise ConfigError(
                f"{root} is not empty ({foreign[0]}) and has no {marker.name}",
                "name an empty folder, or one that does not exist yet",
            )
    private_folder(root)


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Nobody else's command changes ``root`` meanwhile; a dead process holds no lock."""
    with open(os.open(root / LOCK, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_private(path: Path) -> bytes:
    """A private key's bytes; ConfigError if it is missing or others may read it."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(64 * 1024)
    except OSError as error:
        raise ConfigError(
            f"the private key {path} cannot be read ({error.strerror or error})",
            "restore it from a backup; nothing can stand in for it",
        ) from None
    if mode & _OPEN:
        raise ConfigError(
            f"others than its owner may read the private key {path}",
            f"chmod 600 {path}; if somebody may have read it, have it revoked and enrol anew",
        )
    return data


def is_open(path: Path) -> bool:
    """Whether others than its owner may read or write ``path``."""
    return bool(path.stat().st_mode & _OPEN)


def keep_or_make(path: Path, make: Callable[[], bytes], *, dependent: Path) -> None:
    """Make the private key at ``path`` by ``make`` if there is none; one that is there stays.

    Where ``dependent``, made from the key, is already there, a missing key is an error: another
    one would not fit.
    """
    if os.path.lexists(path):
        return
    if os.path.lexists(dependent):
        raise ConfigError(
            f"the private key {path} is missing, and {dependent} was made with it",
            "restore it from a backup; without one, begin anew in another folder",
        )
    atomic_write(path, make(), mode=0o600)


def write_if_changed(path: Path, data: bytes) -> bool:
    """Write a public file atomically unless it already says so; whether it was written."""
    if path.is_file() and path.read_bytes() == data:
        return False
    atomic_write(path, data)
    return True

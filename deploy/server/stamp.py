"""Whether anything about members has changed, without reading it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deploy.provision.federation import FederationFolder


def stamp(folder: FederationFolder) -> object:
    """Equal as long as settings, records, revocations and roster are the same files."""
    paths = [folder.settings, folder.revoked, folder.roster, folder.coordinator]
    records = folder.hospitals.glob("*.json") if folder.hospitals.is_dir() else ()
    return tuple(_stamps([*paths, *sorted(records)]))


def _stamps(paths: list[Path]) -> Iterator[tuple[str, int, int, int] | str]:
    for path in paths:
        try:
            found = path.stat()
            yield path.name, found.st_mtime_ns, found.st_ino, found.st_size
        except OSError:
            yield path.name

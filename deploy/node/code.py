"""Which code runs at a hospital: what it has installed, and nothing else.

Flower ships an app as an archive (FAB) from the server to each node. Here nothing of it is
unpacked or imported. It is compared with the installed packages, file by file, and a message of
an app whose hospital part is any other is refused; then the installed app runs. So a server
can choose *whether* a hospital's code runs and with which run config (which policy and ledger
bound), but not *what* runs: new code comes to a hospital only by its own installation.

That is stricter than Flower's trusted entities, which let the server choose among everything that
was ever signed and unpack it (docs/flower.md, §4).
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import client_app
import common
from common.errors import ConsiliumError

log = logging.getLogger("consilium.code")

PACKAGES = (common, client_app)
"""What runs at a hospital. The server's part is the coordinator's business."""
LIMIT = 32_000_000
"""Bytes of an unpacked archive, at most: as it unpacks, not as it says."""
PACKED_LIMIT = 10_000_000
"""Bytes of an archive, at most, which is Flower's own limit."""
MOST_FILES = 4096
_PIECE = 64 * 1024


class CodeError(ConsiliumError):
    """The app that a server sent is not the one that is installed here."""

    code = "code"


def installed() -> dict[str, bytes]:
    """SHA-256 of each file that decides what runs here, by its path in an archive."""
    found = {}
    for package in PACKAGES:
        root = Path(str(package.__file__)).parent
        for path in (p for p in root.rglob("*") if p.suffix in (".py", ".toml")):
            name = PurePosixPath(package.__name__, *path.relative_to(root).parts)
            found[str(name)] = hashlib.sha256(path.read_bytes()).digest()
    return found


def shipped(archive: bytes) -> dict[str, bytes]:
    """The same of a FAB's content; CodeError if it is no archive, or too large.

    Everything in the hospital's packages counts, whatever its name ends with. No size that stands
    in the archive is believed: files are unpacked piece by piece, by a decoder that keeps to the
    size of a piece, until there are more than :data:`LIMIT` bytes of them.
    """
    prefixes = tuple(f"{package.__name__}/" for package in PACKAGES)
    try:
        # Each entry has this signature; the list of them is made when the archive is opened.
        if len(archive) > PACKED_LIMIT or archive.count(b"PK\x01\x02") > MOST_FILES:
            raise ValueError
        with zipfile.ZipFile(io.BytesIO(archive)) as packed:
            entries = [i for i in packed.infolist() if i.filename.startswith(prefixes)]
            if len({i.filename for i in entries}) != len(entries):
                raise ValueError
            return _digests(packed, entries)
    except Exception:  # a decoder fed with damaged bytes may raise anything at all
        raise CodeError(
            "what the server sent as its app is no archive that can be read",
            "tell the coordinator; nothing of it was unpacked or run",
        ) from None


def _digests(packed: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> dict[str, bytes]:
    """SHA-256 of each entry; ValueError for more than :data:`LIMIT` bytes of them."""
    found, left = {}, LIMIT
    for entry in entries:
        # The decoders of other methods unpack all that they are given at once.
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError
        digest = hashlib.sha256()
        with packed.open(entry) as file:
            while piece := file.read(_PIECE):
                left -= len(piece)
                if left < 0:
                    raise ValueError
                digest.update(piece)
        found[entry.filename] = digest.digest()
    return found


def check(archive: bytes, own: Mapping[str, bytes]) -> None:
    """CodeError naming the files unless the hospital's part of ``archive`` is ``own``."""
    theirs = shipped(archive)
    other = sorted(name for name in {*own, *theirs} if own.get(name) != theirs.get(name))
    if other:
        rest = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise CodeError(
            f"the app that the server sent is not the one that is installed here: "
            f"{', '.join(ascii(name) for name in other[:3])}{rest} differ",
            "ask the coordinator which version of consilium the federation runs, have it reviewed, "
            "and install that; nothing of the server's was run",
        )

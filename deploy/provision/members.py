"""Who was admitted, until when, and which keys never will be again.

``hospitals/NAME.json`` (``consilium-hospital-2``): ``version``, ``request`` (the whole of it, so
that its signatures can be checked at any time), ``admitted`` (UTC), ``valid-from`` and ``expires``
(first and last day, UTC), ``max-images`` (the most images that it may claim, or null; version 1
lacks it). ``revoked.json`` (``consilium-revoked-1``): ``version`` and ``revoked``,
a list of ``name``, ``identity``, ``node``, ``time``, ``reason``. A hospital is a member while it
has a record and neither of its keys is revoked.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.federation_file import (
    TIME,
    EnrolmentError,
    check_time,
    decoded,
    read_limited,
    strict_json,
)
from common.files import write_json
from common.secagg import RosterEntry
from deploy.provision.federation import FederationFolder
from deploy.provision.files import locked, private_folder
from deploy.provision.requests import Request, check_max_images

VERSION = "consilium-hospital-2"
BEFORE = "consilium-hospital-1"
"""Read as well: as an earlier consilium wrote it."""
REVOKED = "consilium-revoked-1"
_RESTORE = "restore it from a backup"


@dataclass(frozen=True)
class Member:
    """An admitted hospital; days are YYYY-MM-DD, both included."""

    request: Request
    admitted: str
    valid_from: str
    expires: str
    max_images: int | None = None
    """Most images that it may claim, as agreed at admission; None: not agreed."""

    @property
    def name(self) -> str:
        """The hospital's name."""
        return self.request.name

    def entry(self) -> RosterEntry:
        """As the roster has it."""
        return RosterEntry(
            self.name, self.request.identity, self.valid_from, self.expires, self.max_images
        )

    def days_left(self, now: datetime) -> int:
        """Days after today on which it may still take part; negative once it may not."""
        return (date.fromisoformat(self.expires) - now.date()).days


@dataclass(frozen=True)
class Revocation:
    """Keys that are never admitted again."""

    name: str
    identity: bytes
    node: str
    time: str
    reason: str


def records(folder: FederationFolder) -> list[Member]:
    """Everybody who was admitted, in the order of names, revoked or not.

    ConfigError or EnrolmentError naming a record that cannot be read or was changed.
    """
    paths = sorted(folder.hospitals.glob("*.json")) if folder.hospitals.is_dir() else []
    return [_record(path) for path in paths if not path.name.startswith(".")]


def members(folder: FederationFolder) -> list[Member]:
    """The hospitals that are admitted and not revoked, in the order of names."""
    gone = revocations(folder)
    return [member for member in records(folder) if revocation_of(member.request, gone) is None]


def revocations(folder: FederationFolder) -> list[Revocation]:
    """Everybody who was revoked, in the order of time."""
    if not folder.revoked.exists():
        return []
    try:
        document = strict_json(read_limited(folder.revoked), str(folder.revoked), _RESTORE)
        if set(document) != {"version", "revoked"} or document["version"] != REVOKED:
            raise ValueError(f"it is not of version {REVOKED}")
        return [
            Revocation(
                row["name"],
                decoded(row["identity"], 32),
                row["node"],
                check_time(row["time"]),
                row["reason"],
            )
            for row in document["revoked"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise EnrolmentError(f"{folder.revoked} is malformed: {error}", _RESTORE) from None


def revocation_of(request: Request, gone: list[Revocation]) -> Revocation | None:
    """The revocation of either of a request's keys, or None."""
    for one in gone:
        if request.identity == one.identity or request.node == one.node:
            return one
    return None


def check_admissible(folder: FederationFolder, request: Request) -> Member | None:
    """The record of the same hospital with the same keys, or None for a new one.

    EnrolmentError where a key is revoked, or the name or a key is another hospital's.
    """
    gone = revocations(folder)
    if one := revocation_of(request, gone):
        raise EnrolmentError(
            f"a key of this request was revoked ({one.name}, {one.time[:10]})",
            "the hospital must make new keys: `consilium hospital init` in a new folder",
        )
    for member in members(folder):
        other = member.request
        same = (other.name == request.name, other.identity == request.identity,
                other.node == request.node)  # fmt: skip
        if all(same):
            return member
        # Names that differ in capitals only are one file on some file systems, and to many eyes.
        if other.name.casefold() == request.name.casefold():
            raise EnrolmentError(
                f"there is a hospital {other.name} already, with other keys",
                f"if it makes new keys, revoke the old first: `consilium federation revoke DIR "
                f"{other.name}`; else choose another name",
            )
        if any(same):
            raise EnrolmentError(
                f"a key of this request is that of the hospital {other.name}",
                "each hospital makes its own keys: `consilium hospital init` in a new folder",
            )
    return None


def admit(
    folder: FederationFolder,
    request: Request,
    now: datetime,
    days: int,
    *,
    begins: str | None = None,
    max_images: int | None = None,
) -> list[str]:
    """Sign the hospital into the roster, through the day ``days`` from now; its keys as they are.

    begins: the first day (YYYY-MM-DD) on which it may be in a sum, so that the others can accept
    it before; None: today. max_images: the most images that it may claim; None: as it proposes.
    Admitted again, it keeps its first day and its number of images unless they are given, and gets
    a new last day. Returns whose kits changed. EnrolmentError as :func:`check_admissible`.
    """
    from deploy.provision.kit import refresh

    check_max_images(max_images)
    _check_able(folder)
    last = (now.date() + timedelta(days=days)).isoformat()
    if begins is not None:
        _check_begins(begins, last)
    with locked(folder.root):
        before = check_admissible(folder, request)
        known = request.max_images if before is None else before.max_images
        today = now.date().isoformat()
        document = {
            "version": VERSION,
            "request": request.document(),
            "admitted": now.strftime(TIME) if before is None else before.admitted,
            "valid-from": begins or (today if before is None else before.valid_from),
            "expires": last,
            "max-images": known if max_images is None else max_images,
        }
        private_folder(folder.hospitals)
        write_json(folder.hospitals / f"{request.name}.json", document)
        return refresh(folder, now)


def revoke(folder: FederationFolder, name: str, now: datetime, reason: str) -> list[str]:
    """Take a hospital out of the roster, and never admit its keys again; whose kits changed.

    Repeated, it completes what a crash left. ConfigError for a name that was never admitted.
    """
    from deploy.provision.kit import refresh

    _check_able(folder)
    with locked(folder.root):
        everyone = {member.name: member for member in records(folder)}
        if name not in everyone:
            known = ", ".join(everyone) or "nobody was admitted yet"
            raise ConfigError(f"there is no hospital {name!r}", f"the hospitals are: {known}")
        request, gone = everyone[name].request, revocations(folder)
        if revocation_of(request, gone) is None:
            one = Revocation(name, request.identity, request.node, now.strftime(TIME), reason)
            write_json(folder.revoked, _revoked_document([*gone, one]))
        return refresh(folder, now)


def _check_begins(begins: str, last: str) -> None:
    try:
        if _day(begins) > last:
            raise ValueError(f"the admission ends on {last}, before that")
    except ValueError as error:
        raise ConfigError(
            f"an admission cannot begin on {begins!r}: {error}", "give a day as YYYY-MM-DD"
        ) from None


def _check_able(folder: FederationFolder) -> None:
    """Fail before anything is changed where the roster could not be signed afterwards."""
    folder.load()
    folder.signer()


def _revoked_document(gone: list[Revocation]) -> dict[str, Any]:
    return {
        "version": REVOKED,
        "revoked": [
            {
                "name": one.name,
                "identity": base64.b64encode(one.identity).decode(),
                "node": one.node,
                "time": one.time,
                "reason": one.reason,
            }
            for one in gone
        ],
    }


def _record(path: Path) -> Member:
    document: Mapping[str, Any] = strict_json(read_limited(path), str(path), _RESTORE)
    fields = {"version", "request", "admitted", "valid-from", "expires"}
    try:
        version = document.get("version")
        if version not in (VERSION, BEFORE):
            raise ValueError(f"it is not of version {VERSION}")
        if set(document) != fields | ({"max-images"} if version == VERSION else set()):
            raise ValueError("it does not have exactly the fields of its version")
        if not isinstance(document["request"], dict):
            raise ValueError("it holds no request")
        member = Member(
            Request.of(document["request"]),
            check_time(document["admitted"]),
            _day(document["valid-from"]),
            _day(document["expires"]),
            document.get("max-images"),
        )
        check_max_images(member.max_images)
        if path.name != f"{member.name}.json":
            raise ValueError(f"it is the record of {member.name}")
    except ValueError as error:
        raise EnrolmentError(f"{path} is malformed: {error}", _RESTORE) from None
    except (EnrolmentError, ConfigError) as error:
        raise EnrolmentError(f"{path}: {error.what}", _RESTORE) from None
    return member


def _day(text: object) -> str:
    if not isinstance(text, str) or not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        raise ValueError("a day is not YYYY-MM-DD")
    return date.fromisoformat(text).isoformat()

"""Kits: what a hospital is given, made by the coordinator and verified by the hospital.

All that is in a kit is public. One signature (``federation.json``) covers the description, the
certificate authority and the roster; the roster has its own, too, which nodes check by themselves.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from common.errors import ConfigError, ProtocolError
from common.federation_file import (
    TIME,
    EnrolmentError,
    FederationFile,
    read_key,
    read_limited,
)
from common.secagg import Roster, RosterEntry
from deploy.provision import certificates
from deploy.provision.federation import FederationFolder, Settings
from deploy.provision.files import private_folder, write_if_changed
from deploy.provision.keys import coordinator_fingerprint
from deploy.provision.members import members, records

AUTHORITY, ROSTER, DESCRIPTION = "ca.crt", "roster.json", "federation.json"
COORDINATOR, README = "coordinator.pub", "README.txt"
SIGNED = (AUTHORITY, COORDINATOR, ROSTER, DESCRIPTION)
"""The files of a kit that are checked, in the order in which they are written: the one whose
signature covers the others last."""

FILES = (README, *SIGNED)
_ANEW = "get the kit anew from the coordinator, by another way"


def refresh(folder: FederationFolder, now: datetime, *, reissue: bool = False) -> list[str]:
    """Make roster, description, node keys and kits from what counts; the caller has the lock.

    Returns the hospitals whose kits are other than before. Repeated, it changes nothing, unless
    ``reissue``: then roster and description are signed again with a new date, for hospitals whose
    policy takes no old ones.
    """
    settings, signer, current = folder.load(), folder.signer(), members(folder)
    entries = tuple(member.entry() for member in current)
    authority = _certificate_digest(read_limited(folder.authority))
    before = None if reissue else _before(folder)
    roster, issued = b"", before
    if before is not None:
        roster = Roster(settings.name, entries, before.issued).sign(signer)
        issued = _described(settings, authority, roster, before.issued)
    if issued is None or issued != before:
        # Something is new, and so is the time.
        time = _time(folder, now)
        roster = Roster(settings.name, entries, time).sign(signer)
        issued = _described(settings, authority, roster, time)
    # A crash between these two leaves a description that doesn't fit: the next refresh, and every
    # hospital, sees that. The kits come after.
    write_if_changed(folder.roster, roster)
    write_if_changed(folder.description, issued.sign(signer))
    private_folder(folder.hospitals)
    private_folder(folder.kits)
    names = {member.name for member in current}
    for path in folder.hospitals.glob("*.pub"):
        if path.stem not in names:
            path.unlink()
    for gone in {member.name for member in records(folder)} - names:
        _remove_kit(folder.kits / gone)
    changed = []
    for member in current:
        write_if_changed(
            folder.hospitals / f"{member.name}.pub", f"{member.request.node}\n".encode()
        )
        if _write_kit(folder, settings, member.name):
            changed.append(member.name)
    return changed


def _before(folder: FederationFolder) -> FederationFile | None:
    """The description as it was signed last, or None before the first."""
    if not folder.description.exists():
        return None
    return FederationFile.load(read_limited(folder.description), folder.public_key())


def _described(settings: Settings, authority: bytes, roster: bytes, issued: str) -> FederationFile:
    digest = hashlib.sha256(roster).digest()
    return FederationFile(settings.description(), authority, digest, issued)


def _time(folder: FederationFolder, now: datetime) -> str:
    """``now``, or later: hospitals go by this, so it grows even if the clock went back."""
    time, before = now.astimezone(UTC), _before(folder)
    if before is not None:
        last = datetime.strptime(before.issued, TIME).replace(tzinfo=UTC)
        time = max(time, last + timedelta(seconds=1))
    return time.strftime(TIME)


def _certificate_digest(pem: bytes) -> bytes:
    return certificates.digest(certificates.parse_certificate(pem, AUTHORITY))


def _write_kit(folder: FederationFolder, settings: Settings, name: str) -> bool:
    kit = private_folder(folder.kits / name)
    contents = {
        README: _readme(settings, name).encode(),
        AUTHORITY: read_limited(folder.authority),
        COORDINATOR: base64.b64encode(folder.public_key()) + b"\n",
        ROSTER: read_limited(folder.roster),
        DESCRIPTION: read_limited(folder.description),
    }
    written = [write_if_changed(kit / file, contents[file]) for file in FILES]
    return any(written)


def _remove_kit(kit: Path) -> None:
    """What this command wrote; anything else in the folder stays."""
    if not kit.is_dir():
        return
    for file in FILES:
        (kit / file).unlink(missing_ok=True)
    if not any(kit.iterdir()):
        kit.rmdir()


def _readme(settings: Settings, name: str) -> str:
    return f"""\
The kit of {name} for the federation {settings.name}
Nothing in it is secret; what it says is signed. Copy the whole folder to the hospital.

1. Ask the coordinator for the fingerprint of the coordinator's key, by telephone or in person,
   not by the way that this kit came.
2. consilium hospital join DIR KIT
   DIR: the folder of `consilium hospital init`. KIT: this folder.
   It shows the fingerprint of the key in this kit. If it is not the one that you were told, stop.
3. Edit DIR/hospital.toml (where the pictures are) and DIR/policy.toml (your limits).

The node opens a connection to {settings.address} and nobody connects to it: let outgoing TCP
to that address through the firewall, and nothing in.

Joining accepts the hospitals that are on the roster now: read their names. Who joins later waits
until you accept it: consilium hospital members DIR

Whenever hospitals come or go the coordinator sends a newer kit: join with it in the same way.
The private keys in DIR/private stay in the hospital. Nobody else ever needs them.
"""


@dataclass(frozen=True)
class Kit:
    """A kit whose files were read, not yet whether they are to be believed."""

    folder: Path
    contents: dict[str, bytes]
    coordinator: bytes
    """The 32-byte key that the kit itself claims; nothing says yet that it is the coordinator's."""

    @classmethod
    def read(cls, folder: Path) -> Kit:
        """Read a kit's folder; ConfigError for a file that is missing or too large."""
        if not folder.is_dir():
            raise ConfigError(
                f"{folder} is no folder", "give the folder that the coordinator sent, unpacked"
            )
        contents = {name: read_limited(folder / name, _ANEW) for name in SIGNED}
        readme = folder / README
        contents[README] = read_limited(readme) if readme.is_file() else b""
        return cls(folder, contents, read_key(folder / COORDINATOR))

    @property
    def fingerprint(self) -> str:
        """Of the coordinator's key in the kit."""
        return coordinator_fingerprint(self.coordinator)

    def verify(self, coordinator: bytes, now: datetime) -> tuple[FederationFile, Roster]:
        """What the kit says, all of it signed by ``coordinator`` (32 bytes) and fitting together.

        EnrolmentError otherwise, or for an authority that is none or not valid ``now``.
        """
        if self.coordinator != coordinator:
            raise EnrolmentError(
                "the kit is under another coordinator's key than the one that this hospital has "
                "pinned",
                "do not use it. Ask the coordinator by telephone; for another federation, enrol "
                "in another folder",
            )
        told = FederationFile.load(self.contents[DESCRIPTION], coordinator)
        try:
            roster = Roster.load(self.contents[ROSTER], coordinator)
        except ProtocolError as error:
            raise EnrolmentError(error.what, error.remedy) from None
        authority = certificates.parse_certificate(self.contents[AUTHORITY], AUTHORITY)
        for what, fits in (
            ("ca.crt", certificates.digest(authority) == told.ca_sha256),
            (ROSTER, hashlib.sha256(self.contents[ROSTER]).digest() == told.roster_sha256),
            (ROSTER, roster.federation == told.description.name),
        ):
            if not fits:
                raise EnrolmentError(f"{what} of the kit is not the one that was signed", _ANEW)
        certificates.check_authority(authority, now)
        return told, roster


def entry_of(roster: Roster, name: str, identity: bytes, now: datetime) -> RosterEntry:
    """A hospital's own entry; EnrolmentError unless it has exactly its key and is valid today."""
    found = {entry.name: entry for entry in roster.entries}.get(name)
    today = now.date().isoformat()
    if found is None:
        raise EnrolmentError(
            f"the roster has no hospital {name}",
            "send request.json to the coordinator, and join with the kit made after that",
        )
    if found.identity != identity:
        raise EnrolmentError(
            f"the roster has another key for {name} than this hospital's own",
            "do not use this kit: ask the coordinator which request was admitted",
        )
    if not found.valid_from <= today <= found.expires:
        raise EnrolmentError(
            f"{name} is admitted from {found.valid_from} to {found.expires}, and not today (UTC)",
            "check this machine's clock; else ask the coordinator to admit the hospital again",
        )
    return found

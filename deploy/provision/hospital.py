"""The hospital's folder: its own keys and request, and the kit that it joins with."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from client_app.hospital_file import HospitalFile, HospitalFolder
from common.errors import ConfigError
from common.federation_file import EnrolmentError, FederationFile, read_key, read_limited
from common.files import atomic_write
from common.secagg import Roster, RosterEntry
from deploy.provision import keys, samples
from deploy.provision.files import claim, keep_or_make, locked, private_folder, write_if_changed
from deploy.provision.kit import FILES, Kit, entry_of
from deploy.provision.requests import Request


def init(folder: HospitalFolder, name: str, now: datetime, *, data: str = "data") -> Request:
    """Make the hospital's keys and request, or complete them after a crash; keys stay as they are.

    ``data``: the pictures' folder, for the sample ``hospital.toml``. ConfigError for a folder
    with something else in it, or of another hospital.
    """
    sample = samples.hospital_toml(name, data)
    claim(folder.root, folder.file)
    with locked(folder.root):
        if not folder.file.exists():
            # First: from now on the folder is this hospital's, whatever happens.
            atomic_write(folder.file, sample)
        _check_name(folder, name)
        private_folder(folder.private)
        for path, make in (
            (folder.identity_key, keys.new_identity),
            (folder.node_key, keys.new_node_key),
        ):
            keep_or_make(path, make, dependent=folder.request)
        identity, node = (
            keys.load_identity(folder.identity_key),
            keys.load_node_key(folder.node_key),
        )
        if not folder.policy.exists():
            atomic_write(folder.policy, samples.policy_toml())
        if not folder.request.exists():
            made = Request.make(name, identity, node, now)
            atomic_write(folder.request, made.to_bytes())
    request = Request.parse(read_limited(folder.request))
    mine = (name, identity.public, keys.node_line(node.public_key()))
    if (request.name, request.identity, request.node) != mine:
        raise ConfigError(
            f"{folder.request} is of another name or other keys than this folder's",
            "move it away, and a new one is made from the keys that are here",
        )
    return request


def _check_name(folder: HospitalFolder, name: str) -> None:
    found = HospitalFile.load(folder.file).name
    if found != name:
        raise ConfigError(
            f"{folder.root} is the folder of the hospital {found}, not {name}",
            f"use --name {found}, or another folder",
        )


@dataclass(frozen=True)
class Joined:
    """What joining came to."""

    told: FederationFile
    roster: Roster
    entry: RosterEntry
    before: FederationFile | None
    """What an earlier kit said, or None at the first."""


def pinned(folder: HospitalFolder) -> bytes | None:
    """The coordinator's key that this hospital confirmed, or None before its first kit."""
    return read_key(folder.coordinator) if folder.coordinator.exists() else None


def join(folder: HospitalFolder, kit: Kit, coordinator: bytes, now: datetime) -> Joined:
    """Install a kit that is ``coordinator``'s (confirmed by its fingerprint), and pin the key.

    Nothing is written unless everything holds: the key is the pinned one (if there is one); the
    signatures; that all belongs together; the authority; this hospital's own entry; the same
    federation as before, and no older than what is installed. EnrolmentError otherwise.
    """
    file = HospitalFile.load(folder.file)
    identity = keys.load_identity(folder.identity_key)
    with locked(folder.root):
        already = pinned(folder)
        told, roster = kit.verify(already or coordinator, now)
        entry = entry_of(roster, file.name, identity.public, now)
        before = folder.load_federation() if already and folder.federation.exists() else None
        if before is not None:
            _check_follows(before, told)
        private_folder(folder.kit)
        # The key first: a kit without a pinned key could be replaced by anybody's.
        if already is None:
            atomic_write(folder.coordinator, kit.contents["coordinator.pub"])
        for name in FILES:
            write_if_changed(folder.kit / name, kit.contents[name])
    return Joined(told, roster, entry, before)


def _check_follows(before: FederationFile, told: FederationFile) -> None:
    if told.description.name != before.description.name:
        raise EnrolmentError(
            f"the kit is of the federation {told.description.name}, and this hospital belongs to "
            f"{before.description.name}",
            "enrol in another folder for another federation",
        )
    if told.issued < before.issued:
        raise EnrolmentError(
            f"the kit was issued on {told.issued}, before the one that is installed "
            f"({before.issued}): it may hold hospitals that were revoked since",
            "ask the coordinator for the latest kit",
        )

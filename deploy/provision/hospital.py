"""The hospital's folder: its own keys and request, and the kit that it joins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from client_app.hospital_file import HospitalFile, HospitalFolder
from client_app.members import Decided, Members, Standing, check_known, waiting
from common.errors import ConfigError
from common.federation_file import EnrolmentError, FederationFile, read_key, read_limited
from common.files import atomic_write
from common.secagg import Roster, RosterEntry
from deploy.provision import keys, samples
from deploy.provision.files import claim, keep_or_make, locked, private_folder, write_if_changed
from deploy.provision.kit import FILES, Kit, entry_of
from deploy.provision.requests import Request, check_max_images


def init(
    folder: HospitalFolder,
    name: str,
    now: datetime,
    *,
    data: str = "data",
    max_images: int | None = None,
) -> Request:
    """Make the hospital's keys and request, or complete them after a crash; keys stay as they are.

    ``data``: the pictures' folder, for the sample ``hospital.toml``. ``max_images``: the most
    images that the request proposes to be let claim; None: no proposal, or the one that was made.
    ConfigError for a folder with something else in it, or of another hospital.
    """
    check_max_images(max_images)
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
            made = Request.make(name, identity, node, now, max_images)
            atomic_write(folder.request, made.to_bytes())
    request = Request.parse(read_limited(folder.request))
    mine = (name, identity.public, keys.node_line(node.public_key()))
    if (request.name, request.identity, request.node) != mine:
        raise ConfigError(
            f"{folder.request} is of another name or other keys than this folder's",
            "move it away, and a new one is made from the keys that are here",
        )
    if max_images not in (None, request.max_images):
        raise ConfigError(
            f"{folder.request} was made already, and proposes {request.max_images or 'no'} images",
            "move it away, and a new one is made from the keys that are here; or have the "
            "coordinator admit it with --max-images",
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
    waiting: tuple[Standing, ...] = ()
    """Who is on the roster, and this hospital's people have neither accepted nor refused."""


def pinned(folder: HospitalFolder) -> bytes | None:
    """The coordinator's key that this hospital confirmed, or None before its first kit."""
    return read_key(folder.coordinator) if folder.coordinator.exists() else None


def join(folder: HospitalFolder, kit: Kit, coordinator: bytes, now: datetime) -> Joined:
    """Install a kit that is ``coordinator``'s (confirmed by its fingerprint), and pin the key.

    Nothing is written unless everything holds: the key is the pinned one (if there is one); the
    signatures; that all belongs together; the authority; this hospital's own entry; the same
    federation as before, and no older than what is installed. EnrolmentError otherwise.

    The first kit is one that a person brings and confirms: whoever is on its roster is accepted.
    Of a later one everything holds at once (addresses, certificates, who is revoked) but this:
    whoever is new waits for :func:`accept` before any sum is shared with it.
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
        known = Members.load(folder.members).follow(roster, now)
        if already is None:
            known = known.decide(others(roster, identity.public), "accepted", now)
        # Before the roster: whoever is revoked is accepted no more, also after a crash.
        known.save(folder.members)
        # The key first: a kit without a pinned key could be replaced by anybody's.
        if already is None:
            atomic_write(folder.coordinator, kit.contents["coordinator.pub"])
        for name in FILES:
            write_if_changed(folder.kit / name, kit.contents[name])
    left = waiting(known.standings(roster, identity.public))
    return Joined(told, roster, entry, before, tuple(left))


def others(roster: Roster, own: bytes) -> list[RosterEntry]:
    """The entries of ``roster`` but that of the identity key ``own``."""
    return [entry for entry in roster.entries if entry.identity != own]


def standings(folder: HospitalFolder) -> list[Standing]:
    """Everybody on the installed roster, then who has gone, as this hospital's people see them.

    ConfigError for a hospital that has not joined; EnrolmentError or Refusal for files that are not
    what they must be.
    """
    return _standings(folder, *_installed(folder))


def accept(folder: HospitalFolder, given: Mapping[str, bytes], now: datetime) -> list[Standing]:
    """Let the members ``given`` (name → the key that was compared) into sums with this hospital.

    All or none: ConfigError for a name that is not on the roster, EnrolmentError where the roster
    has another key for it than the one that was compared. Returns :func:`standings`.
    """
    return _decide(folder, given, "accepted", now)


def refuse(folder: HospitalFolder, given: Mapping[str, bytes], now: datetime) -> list[Standing]:
    """Keep the members ``given`` out of sums with this hospital, accepted before or not.

    Errors and result as those of :func:`accept`.
    """
    return _decide(folder, given, "refused", now)


def _decide(
    folder: HospitalFolder, given: Mapping[str, bytes], state: Decided, now: datetime
) -> list[Standing]:
    with locked(folder.root):
        roster, own = _installed(folder)
        for name, key in given.items():
            # A newer kit may have come since somebody looked.
            if check_known(_standings(folder, roster, own), name).identity != key:
                raise EnrolmentError(
                    f"{name} has another key on the roster than the one that was compared",
                    "look again, and compare the new fingerprint: consilium hospital members "
                    f"{folder.root}",
                )
        chosen = [entry for entry in roster.entries if entry.name in given]
        Members.load(folder.members).decide(chosen, state, now).save(folder.members)
        return _standings(folder, roster, own)


def _installed(folder: HospitalFolder) -> tuple[Roster, bytes]:
    """The installed roster, and this hospital's own identity key."""
    joining = f"join first: consilium hospital join {folder.root} KIT"
    HospitalFile.load(folder.file)
    roster = Roster.load(read_limited(folder.roster, joining), read_key(folder.coordinator))
    return roster, keys.load_identity(folder.identity_key).public


def _standings(folder: HospitalFolder, roster: Roster, own: bytes) -> list[Standing]:
    return Members.load(folder.members).standings(roster, own)


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

"""A hospital's identity: what it signs with, the roster that it believes, whom it has accepted.

A real hospital's folder (``hospital`` in the node config) holds its identity key, the roster,
and the coordinator's key, pinned by another channel than the server. Without a folder a node may
name the three by themselves: ``identity`` (32 raw bytes of an Ed25519 private key), ``roster``
and ``coordinator-key`` (base64). A simulated hospital makes a key at the start of the run and
keeps it in its node's memory; such rounds say that they are unauthenticated.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message

from client_app.hospital_file import HospitalFolder
from client_app.members import Members
from client_app.policy import HospitalPolicy
from common.errors import ConfigError
from common.federation_file import read_key
from common.messages import WIRE, Challenge, Greeting, WireMismatch, entry
from common.roster import check_age, read_roster
from common.secagg import Identity, Refusal

log = logging.getLogger("consilium.hospital")

_RECORD = "identity"


def _folder(context: Context) -> HospitalFolder | None:
    path = context.node_config.get("hospital")
    return None if path is None else HospitalFolder(Path(str(path)))


def identity_of(context: Context) -> Identity:
    """The node's identity key; made now, and kept for the run, where the node names none."""
    path = context.node_config.get("identity")
    if (folder := _folder(context)) is not None:
        path = str(folder.identity_key)
    if path is not None:
        file = Path(str(path))
        try:
            return Identity(file.read_bytes())
        except (OSError, ValueError):
            raise ConfigError(
                f"the identity key {file} is missing or not 32 bytes",
                "restore it from the hospital's backup, or enrol anew",
            ) from None
    record = entry(context.state, _RECORD, ConfigRecord)
    if record is None:
        identity = Identity.generate()
        context.state[_RECORD] = ConfigRecord({"private": identity.private_bytes()})
        return identity
    return Identity(bytes(record["private"]))  # type: ignore[arg-type]  # written above


@dataclass(frozen=True)
class Peers:
    """Who may be in a sum with this hospital today."""

    roster: Mapping[str, bytes]
    """Identity keys by name, of the hospitals valid today."""
    accepted: frozenset[bytes]
    """Those of these keys that this hospital's people have accepted, its own included."""
    most_images: int | None = None
    """Images that this hospital counts for at most, as its entry says; None: none is agreed."""


def peers_of(context: Context, policy: HospitalPolicy) -> Peers | None:
    """Roster and accepted members of this node, checked as they are now; None without a roster.

    A node without a hospital's folder names its roster file by hand; nothing replaces that by
    itself, so whoever is on it was accepted with it. Refuses (``secagg-roster``) a roster that
    was not signed by the pinned key, (``secagg-roster-age``) one that is older than the policy
    allows, and (``secagg-members``) any round while too few are accepted for any cohort: an hour's
    training must not end in a refusal that was foreseeable.
    """
    node = context.node_config
    if (folder := _folder(context)) is not None:
        key = base64.b64encode(read_key(folder.coordinator)).decode()
        roster = read_roster(folder.roster, key)
    elif "roster" not in node:
        return None
    elif "coordinator-key" not in node:
        raise ConfigError(
            "the node config names a roster, but no coordinator-key to check it with",
            "set coordinator-key to the key that the coordinator gave you",
        )
    else:
        roster = read_roster(Path(str(node["roster"])), str(node["coordinator-key"]))
    now = datetime.now(UTC)
    check_age(roster, policy.roster_max_age_days, now)
    identities = roster.identities(now.date().isoformat())
    own = identity_of(context).public
    most = next((e.max_images for e in roster.entries if e.identity == own), None)
    if folder is None:
        return Peers(identities, frozenset(identities.values()), most)
    accepted = Members.load(folder.members).accepted(identities)
    peers = Peers(identities, accepted | {own}, most)
    if policy.secagg.min_trusted > 1 and len(peers.accepted) < policy.secagg.min_trusted:
        raise Refusal(
            "secagg-members",
            f"This hospital has accepted {len(peers.accepted)} members of today's roster, itself "
            f"included, and its policy asks for {policy.secagg.min_trusted} in a sum.",
            f"See who waits, and accept whom you know: consilium hospital members {folder.root}",
        )
    return peers


def greeting(name: str, message: Message, context: Context) -> Greeting:
    """What this hospital answers to a server that asks who it is; signed if it has an identity key.

    The signature holds for this one question, for this node and for this run: what the node knows
    of the latter two is the SuperLink's word over the node's own connection, not the server app's.
    A server of another major version is told the same, so that its operator reads who must update;
    here it is logged, and whatever else that server sends is refused.
    """
    challenge = Challenge.in_record(message.content)
    if challenge is not None and challenge.wire.major != WIRE.major:
        log.error("%s", WireMismatch.between("the server", challenge.wire, "this hospital"))
    node = context.node_config
    if challenge is None or not ("hospital" in node or "identity" in node):
        return Greeting(name)
    identity = identity_of(context)
    return Greeting.signed(name, identity, challenge, run=context.run_id, node=context.node_id)

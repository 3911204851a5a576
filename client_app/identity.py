"""A hospital's identity in secure aggregation, and the roster that it believes.

A real hospital's folder (``hospital`` in the node config) holds its identity key, the roster,
and the coordinator's key, pinned by another channel than the server. Without a folder a node may
name the three by themselves: ``identity`` (32 raw bytes of an Ed25519 private key), ``roster``
and ``coordinator-key`` (base64). A simulated hospital makes a key at the start of the run and
keeps it in its node's memory; such rounds say that they are unauthenticated.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path

from flwr.app import ConfigRecord, Context

from client_app.hospital_file import HospitalFolder
from common.errors import ConfigError
from common.federation_file import read_key
from common.messages.wire import entry
from common.roster import images_agreed, load_roster
from common.secagg import Identity

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


def roster_of(context: Context) -> Mapping[str, bytes] | None:
    """Identity keys by hospital from the node's own roster file, checked; None if it has none."""
    place = _roster_place(context)
    return None if place is None else load_roster(*place)


def agreed_with(context: Context, hospital: str) -> int | None:
    """Most images that ``hospital`` may claim by the node's own roster; None: nothing is agreed."""
    place = _roster_place(context)
    return None if place is None else images_agreed(*place).get(hospital)


def _roster_place(context: Context) -> tuple[Path, str] | None:
    """The node's roster file and the coordinator's key (base64) to check it with."""
    node = context.node_config
    if (folder := _folder(context)) is not None:
        return folder.roster, base64.b64encode(read_key(folder.coordinator)).decode()
    if "roster" not in node:
        return None
    if "coordinator-key" not in node:
        raise ConfigError(
            "the node config names a roster, but no coordinator-key to check it with",
            "set coordinator-key to the key that the coordinator gave you",
        )
    return Path(str(node["roster"])), str(node["coordinator-key"])

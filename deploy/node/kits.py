"""Newer kits, fetched from the server: the same checks as ``consilium hospital join``.

When a hospital joins or leaves, the others need the new roster. The server hands each hospital its
own kit if it signs the request with its identity. A kit is believed by the coordinator's signature
alone, and never an older one than what is installed. Who leaves is out at once; who joins waits
until this hospital's people accept it (:func:`deploy.provision.hospital.accept`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import httpx

from client_app.hospital_file import HospitalFile, HospitalFolder
from client_app.policy import HospitalPolicy
from common.errors import ConsiliumError
from common.federation_file import LIMIT, read_key
from common.secagg import Roster
from deploy.provision import hospital, keys
from deploy.provision.kit import SIGNED, Kit
from deploy.runtime.kit_request import PATH, headers_for

TIMEOUT = 20.0


def update(folder: HospitalFolder, address: str) -> list[str]:
    """Install the newest kit if it is another than the installed one; lines that say what changed.

    ConsiliumError where the server refuses, or its kit cannot be believed; nothing is changed then.
    """
    told = folder.load_federation()
    now = datetime.now(UTC)
    file, identity = HospitalFile.load(folder.file), keys.load_identity(folder.identity_key)
    headers = headers_for(told.description.name, file.name, identity, now)
    headers["if-none-match"] = f'"{hashlib.sha256(folder.federation.read_bytes()).hexdigest()}"'
    context = ssl.create_default_context(cafile=str(folder.authority))
    # Straight to the server, as the node: no proxy of the environment.
    with httpx.Client(verify=context, timeout=TIMEOUT, trust_env=False) as client:
        try:
            answer = client.get(f"https://{address}{PATH}", headers=headers)
        except httpx.HTTPError:
            return []  # nobody there: the node's own log says so
    if answer.status_code == 304 or answer.status_code >= 500:
        return []
    if answer.status_code != 200:
        raise ConsiliumError(
            f"the server gives this hospital no kit (HTTP {answer.status_code})",
            "ask the coordinator whether the hospital is admitted; check this machine's clock",
        )
    members = _identities(folder)
    with tempfile.TemporaryDirectory() as place:
        _unpack(answer.content, Path(place))
        kit = Kit.read(Path(place))
        joined = hospital.join(folder, kit, kit.coordinator, now)
    lines = _came_and_left(folder, members, joined)
    after = folder.load_federation().description
    if after != told.description:
        lines.append(f"kit: the federation's description has changed, see {folder.federation}")
        if after.address != told.description.address:
            lines.append(f"kit: restart the node: its server moves to {after.address}")
    return lines or ["kit: a newer one is installed"]


def _identities(folder: HospitalFolder) -> dict[str, bytes]:
    roster = Roster.load(folder.roster.read_bytes(), read_key(folder.coordinator))
    return {entry.name: entry.identity for entry in roster.entries}


def _came_and_left(
    folder: HospitalFolder, before: Mapping[str, bytes], joined: hospital.Joined
) -> list[str]:
    """A line for each hospital that joined, came with another key, or left."""
    after = {entry.name: entry.identity for entry in joined.roster.entries}
    waits = {one.name for one in joined.waiting} if _asks(folder) else set()
    lines = []
    for name in sorted(name for name in after if after[name] != before.get(name)):
        what = "comes with another key" if name in before else "has joined"
        hint = (
            f"; no sum is shared with it until it is accepted here: consilium hospital members "
            f"{folder.root} --accept {name}"
        )
        lines.append(f"kit: {name} {what}{hint if name in waits else ''}")
    return lines + [f"kit: {name} has left" for name in sorted(before.keys() - after.keys())]


def _asks(folder: HospitalFolder) -> bool:
    """Whether newcomers must be accepted here."""
    try:
        return HospitalPolicy.load(folder.policy).secagg.accept_members == "ask"
    except ConsiliumError:
        return True  # nothing is trained under such a policy anyway


def _unpack(content: bytes, place: Path) -> None:
    """The four files of an answer, and no other, into ``place``."""
    bad = ConsiliumError(
        "the server's kit is malformed", "tell the coordinator; the installed kit stays"
    )
    if len(content) > 8 * LIMIT:
        raise bad
    try:
        files = json.loads(content)["files"]
        for name in SIGNED:
            data = base64.b64decode(files[name], validate=True)
            (place / name).write_bytes(data)
    except (ValueError, KeyError, TypeError):
        raise bad from None

"""Newer kits, fetched from the server: the same checks as ``consilium hospital join``.

When a hospital joins or leaves, the others need the new roster. The server hands each hospital its
own kit if it signs the request with its identity. A kit is believed by the coordinator's signature
alone, and never an older one than what is installed. Who leaves is out at once; who joins waits
until this hospital's people accept it (:func:`deploy.provision.hospital.accept`).
"""

from __future__ import annotations

import base64
import hashlib
import ssl
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import httpx

from client_app.hospital_file import HospitalFile, HospitalFolder
from client_app.policy import HospitalPolicy
from common.errors import ConsiliumError
from common.federation_file import LIMIT, read_key
from common.parsing import parse_json
from common.secagg import Roster
from deploy.provision import hospital, keys
from deploy.provision.kit import SIGNED, Kit
from deploy.runtime.kit_request import PATH, headers_for

TIMEOUT = 20.0
"""Seconds without a byte."""
WHOLE_TIMEOUT = 120.0
"""Seconds for the whole answer: a server may send a byte now and then for ever."""
ANSWER_LIMIT = 8 * LIMIT


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
            status, content = _answer(client, f"https://{address}{PATH}", headers)
        except httpx.HTTPError:
            return []  # nobody there: the node's own log says so
    if status == 304 or status >= 500:
        return []
    if status != 200:
        raise ConsiliumError(
            f"the server gives this hospital no kit (HTTP {status})",
            "ask the coordinator whether the hospital is admitted; check this machine's clock",
        )
    members = _identities(folder)
    with tempfile.TemporaryDirectory() as place:
        _unpack(content, Path(place))
        kit = Kit.read(Path(place))
        joined = hospital.join(folder, kit, kit.coordinator, now)
    lines = _came_and_left(folder, members, joined)
    after = folder.load_federation().description
    if after != told.description:
        lines.append(f"kit: the federation's description has changed, see {folder.federation}")
        if after.address != told.description.address:
            lines.append(f"kit: restart the node: its server moves to {after.address}")
    return lines or ["kit: a newer one is installed"]


def _answer(client: httpx.Client, url: str, headers: dict[str, str]) -> tuple[int, bytes]:
    """Status and content of an answer, of which no more is read than a kit can have.

    As it travels: nothing is unpacked, since a few bytes may unpack to any number. ConsiliumError
    for a packed answer, one that is too long, and one that does not end.
    """
    asked = {**headers, "accept-encoding": "identity"}
    with client.stream("GET", url, headers=asked) as answer:
        if answer.status_code != 200:
            return answer.status_code, b""
        if answer.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise _malformed("is packed, which was not asked for")
        content = bytearray()
        end = time.monotonic() + WHOLE_TIMEOUT
        for piece in answer.iter_raw(64 * 1024):
            content += piece
            if len(content) > ANSWER_LIMIT:
                raise _malformed(f"has more than {ANSWER_LIMIT} bytes")
            if time.monotonic() > end:
                raise _malformed(f"takes more than {WHOLE_TIMEOUT:.0f} seconds")
    return 200, bytes(content)


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
    if len(content) > ANSWER_LIMIT:
        raise _malformed("is too large")
    try:
        files = parse_json(content)["files"]
        for name in SIGNED:
            data = base64.b64decode(files[name], validate=True)
            (place / name).write_bytes(data)
    except (ValueError, KeyError, TypeError):
        raise _malformed("is not of its form") from None


def _malformed(how: str) -> ConsiliumError:
    return ConsiliumError(
        f"the server's kit is malformed: it {how}",
        "tell the coordinator; the installed kit stays",
    )

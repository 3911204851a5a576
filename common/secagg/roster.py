"""The roster: which hospitals belong to the federation, and their identity keys, signed.

The coordinator signs it with an Ed25519 key of which every hospital has pinned the public
half, on paper or by another channel than the server. Without a roster the server could
present keys of its own and stand between the hospitals.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.parsing import parse_json
from common.secagg import wire
from common.secagg.binding import canonical
from common.secagg.errors import Refusal
from common.secagg.keys import KEY_BYTES, SIGNATURE_BYTES, Identity, verify

VERSION = "consilium-roster-1"
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_LIMIT = 4 * 1024 * 1024


@dataclass(frozen=True)
class RosterEntry:
    """A hospital, its 32-byte identity key, and the first and last day (YYYY-MM-DD)."""

    name: str
    identity: bytes
    valid_from: str
    expires: str


@dataclass(frozen=True)
class Roster:
    """The hospitals of a federation. Construction refuses duplicates and bad entries."""

    federation: str
    entries: tuple[RosterEntry, ...]

    def __post_init__(self) -> None:
        """Refuse (``secagg-roster``) a name or key that stands twice, and malformed fields."""
        wire.as_name(self.federation)
        for entry in self.entries:
            wire.as_name(entry.name)
            wire.as_bytes(entry.identity, KEY_BYTES)
            dates = (entry.valid_from, entry.expires)
            if not all(_DATE.fullmatch(date) for date in dates) or entry.valid_from > entry.expires:
                raise _refuse(
                    f"the dates of hospital {entry.name!r} are no YYYY-MM-DD, or reversed"
                )
        for what, values in (
            ("name", [entry.name for entry in self.entries]),
            ("identity key", [entry.identity for entry in self.entries]),
        ):
            if len(set(values)) != len(values):
                raise _refuse(f"a {what} stands twice")

    def identities(self, today: str) -> dict[str, bytes]:
        """Identity keys by name of the hospitals valid on ``today`` (YYYY-MM-DD).

        This is the ``roster`` that the state machines take. They have no clock, so the
        caller brings the date.
        """
        if not _DATE.fullmatch(today):
            raise _refuse("the date to check it for is not YYYY-MM-DD")
        return {e.name: e.identity for e in self.entries if e.valid_from <= today <= e.expires}

    def sign(self, coordinator: Identity) -> bytes:
        """The roster as a signed JSON file."""
        document = {
            "version": VERSION,
            "federation": self.federation,
            "hospitals": [
                {
                    "name": entry.name,
                    "identity": base64.b64encode(entry.identity).decode(),
                    "valid-from": entry.valid_from,
                    "expires": entry.expires,
                }
                for entry in self.entries
            ],
            "signature": base64.b64encode(coordinator.sign(self._statement())).decode(),
        }
        return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def load(cls, data: bytes, coordinator: bytes) -> Roster:
        """Read and verify a roster file; ``coordinator``: the pinned 32-byte public key.

        Raises :class:`Refusal` (``secagg-roster``) for another version, a bad signature, a
        duplicate, or anything that is not exactly this format.
        """
        document = _record(_parse(data), ("version", "federation", "hospitals", "signature"))
        if document["version"] != VERSION:
            raise _refuse(f"its version is not {VERSION}")
        hospitals = document["hospitals"]
        if not isinstance(hospitals, list):
            raise _refuse("it has no list of hospitals")
        roster = cls(_text(document["federation"]), tuple(_entry(row) for row in hospitals))
        signature = _decoded(document["signature"], SIGNATURE_BYTES)
        if not verify(coordinator, signature, roster._statement()):
            raise _refuse("it is not signed by the coordinator whose key this hospital has pinned")
        return roster

    def _statement(self) -> bytes:
        parts: list[bytes | str | int] = [VERSION, self.federation, len(self.entries)]
        for entry in self.entries:
            parts += [entry.name, entry.identity, entry.valid_from, entry.expires]
        return canonical("roster", *parts)


def _parse(data: bytes) -> object:
    def unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
        # Parsers disagree on which of two equal keys counts; so none may come twice.
        if len({key for key, _ in pairs}) != len(pairs):
            raise _refuse("a field stands twice")
        return dict(pairs)

    if len(data) > _LIMIT:
        raise _refuse("it is too large")
    try:
        value: object = parse_json(data, object_pairs_hook=unique)
    except ValueError:
        raise _refuse("it is not JSON") from None
    return value


def _record(value: object, names: Sequence[str]) -> Mapping[str, object]:
    if not isinstance(value, dict) or set(value) != set(names):
        raise _refuse(f"a record does not have exactly the fields {', '.join(names)}")
    return value


def _entry(value: object) -> RosterEntry:
    row = _record(value, ("name", "identity", "valid-from", "expires"))
    return RosterEntry(
        _text(row["name"]),
        _decoded(row["identity"], KEY_BYTES),
        _text(row["valid-from"]),
        _text(row["expires"]),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _refuse("a field is not text")
    return value


def _decoded(value: object, length: int) -> bytes:
    try:
        raw = base64.b64decode(_text(value), validate=True)
    except (binascii.Error, ValueError):
        raise _refuse("a field is not base64") from None
    if len(raw) != length or base64.b64encode(raw).decode() != value:
        raise _refuse(f"a key or signature does not have {length} bytes")
    return raw


def _refuse(what: str) -> Refusal:
    return Refusal(
        "secagg-roster",
        f"The roster is refused: {what}.",
        "Get the roster anew from the coordinator, and compare the coordinator's key with the "
        "one that you were given by another channel.",
    )

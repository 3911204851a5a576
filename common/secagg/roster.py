"""The roster: which hospitals belong to the federation, and their identity keys, signed.

The coordinator signs it with an Ed25519 key of which every hospital has pinned the public
half, on paper or by another channel than the server. Without a roster the server could
present keys of its own and stand between the hospitals.

Two versions, both read. ``consilium-roster-1`` has names, keys and days. ``consilium-roster-2``
has ``issued`` as well, the moment (UTC) at which it was signed or "", so that a hospital can refuse
an old one, and for each hospital ``max-images``, the most images that it may claim to have trained
on, as agreed at its admission, or null. A roster with neither is written as version 1, byte for
byte as before. The signature covers the version and every field of it.
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
DATED = "consilium-roster-2"
MOST_IMAGES = 1_000_000_000
"""Largest ``max_images`` of an entry."""
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")
_LIMIT = 4 * 1024 * 1024


@dataclass(frozen=True)
class RosterEntry:
    """A hospital, its 32-byte identity key, and the first and last day (YYYY-MM-DD)."""

    name: str
    identity: bytes
    valid_from: str
    expires: str
    max_images: int | None = None
    """Most images that it may claim to have trained on, as agreed at admission; None: unbounded."""


@dataclass(frozen=True)
class Roster:
    """The hospitals of a federation. Construction refuses duplicates and bad entries."""

    federation: str
    entries: tuple[RosterEntry, ...]
    issued: str = ""
    """When it was signed (UTC, YYYY-MM-DDTHH:MM:SSZ); "": it does not say."""

    def __post_init__(self) -> None:
        """Refuse (``secagg-roster``) a name or key that stands twice, and malformed fields."""
        wire.as_name(self.federation)
        if self.issued and not _TIME.fullmatch(self.issued):
            raise _refuse("the time of issue is no YYYY-MM-DDTHH:MM:SSZ")
        for entry in self.entries:
            wire.as_name(entry.name)
            wire.as_bytes(entry.identity, KEY_BYTES)
            dates = (entry.valid_from, entry.expires)
            if not all(_DATE.fullmatch(date) for date in dates) or entry.valid_from > entry.expires:
                raise _refuse(
                    f"the dates of hospital {entry.name!r} are no YYYY-MM-DD, or reversed"
                )
            bound = entry.max_images
            if bound is not None and (type(bound) is not int or not 1 <= bound <= MOST_IMAGES):
                raise _refuse(f"the number of images of hospital {entry.name!r} is out of range")
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

    def max_images(self, name: str) -> int | None:
        """The most images that hospital ``name`` may claim; None where none was agreed.

        :class:`Refusal` (``secagg-roster``) for a hospital that is not on the roster.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry.max_images
        raise _refuse(f"it has no hospital {name!r}")

    @property
    def version(self) -> str:
        """The version in which it is written: the oldest that holds what it says."""
        bounded = any(entry.max_images is not None for entry in self.entries)
        return DATED if self.issued or bounded else VERSION

    def sign(self, coordinator: Identity) -> bytes:
        """The roster as a signed JSON file."""
        document: dict[str, object] = {"version": self.version, "federation": self.federation}
        rows: list[dict[str, object]] = [
            {
                "name": entry.name,
                "identity": base64.b64encode(entry.identity).decode(),
                "valid-from": entry.valid_from,
                "expires": entry.expires,
            }
            for entry in self.entries
        ]
        if self.version == DATED:
            document["issued"] = self.issued
            for row, entry in zip(rows, self.entries, strict=True):
                row["max-images"] = entry.max_images
        document["hospitals"] = rows
        signature = coordinator.sign(self._statement(self.version))
        document["signature"] = base64.b64encode(signature).decode()
        return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def load(cls, data: bytes, coordinator: bytes) -> Roster:
        """Read and verify a roster file; ``coordinator``: the pinned 32-byte public key.

        Raises :class:`Refusal` (``secagg-roster``) for another version, a bad signature, a
        duplicate, or anything that is not exactly this format.
        """
        value = _parse(data)
        version = value.get("version") if isinstance(value, dict) else None
        if version not in (VERSION, DATED):
            raise _refuse(f"its version is neither {VERSION} nor {DATED}")
        own = ("version", "federation", "hospitals", "signature")
        document = _record(value, own if version == VERSION else (*own, "issued"))
        hospitals = document["hospitals"]
        if not isinstance(hospitals, list):
            raise _refuse("it has no list of hospitals")
        roster = cls(
            _text(document["federation"]),
            tuple(_entry(row, version) for row in hospitals),
            _text(document.get("issued", "")),
        )
        signature = _decoded(document["signature"], SIGNATURE_BYTES)
        if not verify(coordinator, signature, roster._statement(version)):
            raise _refuse("it is not signed by the coordinator whose key this hospital has pinned")
        return roster

    def _statement(self, version: str) -> bytes:
        parts: list[bytes | str | int] = [version, self.federation, len(self.entries)]
        if version == DATED:
            parts.append(self.issued)
        for entry in self.entries:
            parts += [entry.name, entry.identity, entry.valid_from, entry.expires]
            if version == DATED:
                parts.append(entry.max_images or 0)  # the least that may be agreed is 1
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


def _entry(value: object, version: str) -> RosterEntry:
    own = ("name", "identity", "valid-from", "expires")
    row = _record(value, own if version == VERSION else (*own, "max-images"))
    bound = row.get("max-images")
    if bound is not None and type(bound) is not int:
        raise _refuse("a number of images is no whole number")
    return RosterEntry(
        _text(row["name"]),
        _decoded(row["identity"], KEY_BYTES),
        _text(row["valid-from"]),
        _text(row["expires"]),
        bound,
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

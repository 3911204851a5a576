"""What a federation is, as its hospitals are told: a file that the coordinator signs.

``federation.json`` names the federation, where its server is, the classes and the form of the
images, and binds by digest the certificate authority and the roster that go with it: with one
signature a hospital knows that all it was given belongs together. The key that it checks it with
is pinned by another channel than the server (see :mod:`common.secagg.roster`).

No torch here, and no Flower until a name is checked.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from common.errors import ConfigError, ConsiliumError, ProtocolError
from common.parsing import parse_json, unique_pairs

VERSION = "consilium-federation-1"
TIME = "%Y-%m-%dT%H:%M:%SZ"
"""How a moment is written, always in UTC."""

LIMIT = 1024 * 1024
"""Most bytes of any file of an enrolment."""

_REMEDY = "get the kit anew from the coordinator, and compare the coordinator's key"
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


class EnrolmentError(ConsiliumError):
    """A request, a kit, a certificate or a key is not what it must be; nothing was changed."""

    code = "enrolment"


class Table(BaseModel):
    """Strict: no entry beyond those named (with dashes), no text where a number belongs."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    @classmethod
    def read(cls, document: Mapping[str, Any], where: str | Path) -> Self:
        """Check a parsed file; ConfigError names the file ``where`` and the entry at fault."""
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            problem = error.errors()[0]
            entry = ".".join(str(part) for part in problem["loc"]) or "the file"
            what = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{where} is wrong: {entry}: {what}", "correct that entry") from None


def valid_name(name: str) -> str:
    """``name`` if a federation or hospital may be called so; ValueError otherwise."""
    from common.messages import check_name  # brings Flower along

    try:
        return check_name(name)
    except ProtocolError as error:
        raise ValueError(error.what.replace("a hospital's name", f"the name {name!r}")) from None


def check_host(host: str) -> str:
    """``host`` in lower case if it is a DNS name or an IP address; ValueError otherwise."""
    try:
        # A scoped IPv6 address (fe80::1%eth0) means something on one machine only.
        if "%" not in host:
            return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    name = host.lower()
    labels = name.split(".")
    if len(name) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise ValueError(f"{host!r} is neither a DNS name nor an IP address")
    return name


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` (IPv6: ``[::1]:9092``); ValueError if it is none."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError(f"{address!r} is not HOST:PORT with a port from 1 to 65535")
    checked = check_host(host[1:-1] if bracketed else host)
    if bracketed != (":" in checked):
        raise ValueError(f"{address!r}: an IPv6 address, and nothing else, stands in brackets")
    return checked, int(port)


class Description(Table):
    """What a federation is: the part of ``federation.toml`` that hospitals are told."""

    name: str
    address: str
    classes: tuple[str, ...] = Field(min_length=2, max_length=1000)
    image_size: int = Field(ge=16, le=512)
    channels: int

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return valid_name(name)

    @field_validator("address")
    @classmethod
    def _address(cls, address: str) -> str:
        split_address(address)
        return address

    @field_validator("classes", mode="before")
    @classmethod
    def _classes(cls, classes: Any) -> Any:
        if not isinstance(classes, list | tuple):
            return classes
        for name in classes:
            # They name folders, and stand in reports.
            plain = isinstance(name, str) and name.isprintable() and name == name.strip()
            if not plain or not name or len(name) > 100 or name.startswith(".") or "/" in name:
                raise ValueError(
                    f"{name!r} is no name for a class: up to 100 printable characters, no slash, "
                    "no dot or blank in front"
                )
        if len(set(classes)) != len(classes):
            raise ValueError("a class stands twice")
        return tuple(classes)

    @field_validator("channels")
    @classmethod
    def _channels(cls, channels: int) -> int:
        if channels not in (1, 3):
            raise ValueError("images have 1 channel (grey) or 3 (colour)")
        return channels


@dataclass(frozen=True)
class FederationFile:
    """A federation's signed description, with what belongs to it.

    ``ca_sha256``: digest of the certificate authority's DER encoding; ``roster_sha256``: of the
    roster file's bytes (32 bytes both). ``issued`` (UTC, :data:`TIME`) grows with each change, so
    that a hospital can refuse to go back to an older roster.
    """

    description: Description
    ca_sha256: bytes
    roster_sha256: bytes
    issued: str

    def sign(self, coordinator: Any) -> bytes:
        """The signed JSON file; ``coordinator``: its :class:`~common.secagg.keys.Identity`."""
        document = {"version": VERSION} | self.description.model_dump(mode="json", by_alias=True)
        document |= {
            "ca-sha256": self.ca_sha256.hex(),
            "roster-sha256": self.roster_sha256.hex(),
            "issued": self.issued,
            "signature": base64.b64encode(coordinator.sign(self._statement())).decode(),
        }
        return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def load(cls, data: bytes, coordinator: bytes) -> FederationFile:
        """Read and verify; ``coordinator``: the pinned 32-byte public key.

        EnrolmentError for a bad signature, another version, or anything that is not this format.
        """
        from common.secagg.keys import verify

        what = "the federation's description"
        document = strict_json(data, what, _REMEDY)
        own = ("version", "ca-sha256", "roster-sha256", "issued", "signature")
        texts = {name: document.pop(name, None) for name in own}
        if texts["version"] != VERSION:
            raise EnrolmentError(f"{what} is not of version {VERSION}", "update consilium")
        try:
            signature = decoded(texts["signature"], 64)
            made = cls(
                Description.read(document, what),
                _digest(texts["ca-sha256"]),
                _digest(texts["roster-sha256"]),
                check_time(texts["issued"]),
            )
        except ConfigError as error:
            raise EnrolmentError(error.what, _REMEDY) from None
        except ValueError as error:
            raise EnrolmentError(f"{what} is malformed: {error}", _REMEDY) from None
        if not verify(coordinator, signature, made._statement()):
            raise EnrolmentError(
                f"{what} is not signed by the coordinator whose key is pinned here", _REMEDY
            )
        return made

    def _statement(self) -> bytes:
        from common.secagg.binding import canonical

        told = self.description
        parts: tuple[bytes | str | int, ...] = (
            VERSION,
            told.name,
            told.address,
            len(told.classes),
            *told.classes,
            told.image_size,
            told.channels,
            self.ca_sha256,
            self.roster_sha256,
            self.issued,
        )
        return canonical("federation", *parts)


def read_limited(path: Path, remedy: str = "check the path") -> bytes:
    """The bytes of a file of at most :data:`LIMIT`; ConfigError otherwise."""
    try:
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})", remedy) from None
    if len(data) > LIMIT:
        raise ConfigError(f"{path} is larger than {LIMIT} bytes", remedy)
    return data


def read_key(path: Path) -> bytes:
    """A public Ed25519 key (32 bytes) from a file with its base64; ConfigError otherwise."""
    try:
        return decoded(path.read_text(encoding="ascii").strip(), 32)
    except (OSError, ValueError):
        raise ConfigError(
            f"{path} is missing or holds no public key (32 bytes as base64)",
            "get it anew from the coordinator",
        ) from None


def strict_json(data: bytes, what: str, remedy: str) -> dict[str, Any]:
    """A JSON object in which no field stands twice; EnrolmentError otherwise."""
    try:
        if len(data) > LIMIT:
            raise ValueError("it is too large")
        value = parse_json(data, object_pairs_hook=unique_pairs)
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        told = str(error) if type(error) is ValueError else "it is no JSON"
        raise EnrolmentError(f"{what} is malformed: {told}", remedy) from None
    return value


def decoded(text: object, length: int | None = None) -> bytes:
    """The bytes of canonical base64 ``text``; ValueError otherwise, or for another length."""
    if not isinstance(text, str):
        raise ValueError("a field is not text")
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("a field is not base64") from None
    if base64.b64encode(raw).decode() != text or len(raw) != (length or len(raw)):
        raise ValueError(f"a key or signature does not have {length} bytes")
    return raw


def check_time(text: object) -> str:
    """``text`` if it is a moment in UTC as :data:`TIME` has it; ValueError otherwise."""
    if not isinstance(text, str) or datetime.strptime(text, TIME).strftime(TIME) != text:
        raise ValueError("a time is not YYYY-MM-DDTHH:MM:SSZ")
    return text


def _digest(text: object) -> bytes:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9a-f]{64}", text):
        raise ValueError("a digest is not 64 lower-case hexadecimal digits")
    return bytes.fromhex(text)

"""What every record on the wire has in common: its version, its fields' types, packed arrays.

The version is :data:`WIRE`, major and minor. Between two sides **the major must be equal**, else
every message but a greeting and a refusal is refused (:class:`WireMismatch`). **The minor may
differ**: a newer minor may add optional fields, and records that answer a message which an older
side never sends. A field that the reader does not know is ignored where the message is of a newer
minor (of its own or an older one it is refused where a record is read exactly), and an optional
field that is missing has its default. What else differs takes a new major. docs/compatibility.md
says how to change the wire.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.numpy import save

from common.errors import ProtocolError
from common.tensors import parse_tensors


class Wire(NamedTuple):
    """A version of the wire format."""

    major: int
    minor: int

    def __str__(self) -> str:
        """``4``, or ``4.1``."""
        return f"{self.major}.{self.minor}" if self.minor else str(self.major)


WIRE = Wire(4, 0)
"""What this code writes. Changed together with new golden files: ``python -m tests.golden.make``.

4: a greeting answers a challenge under the hospital's signature; versions have minors."""

VERSION = WIRE.major

RAW = "consilium.bytes"
"""Serialisation type of arrays that are bytes as they are, with no header and no copy."""

PACKED = "consilium.safetensors"
"""Serialisation type of one array that holds many, as a safetensors file. Flower asks for each
array of a message by itself, each time through server and gate: a model is one array here."""

SMALL = 64 * 1024
"""Bytes up to which a payload travels beside its head, for the same reason."""

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

T = TypeVar("T", int, float, str, bytes)
R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)


def entry(record: RecordDict, name: str, kind: type[R]) -> R | None:
    """What a record holds under ``name``, if it is of ``kind``; else None.

    Not by RecordDict's own views (``array_records`` …): a view is in a cycle with the record that
    it shows, so that a masked vector would stay in memory until Python looks for such cycles.
    """
    found = record.get(name)
    return found if isinstance(found, kind) else None


def field_of(config: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """The field ``key`` of exactly the type ``kind``; ProtocolError otherwise."""
    value = config.get(key)
    if type(value) is not kind:
        raise ProtocolError(
            f"a message's field '{key}' is missing or not of type {kind.__name__}",
            "run the same version of consilium at the server and at every hospital",
        )
    return value


class WireMismatch(ProtocolError):
    """The other side speaks another major version of the wire format."""

    code = "wire-version"

    @classmethod
    def between(cls, who: str, theirs: Wire, here: str) -> WireMismatch:
        """``who``: the other side, and ``here``: this one, as people call them."""
        older = who if theirs.major < WIRE.major else here
        return cls(f"{who} speaks wire {theirs}, {here} {WIRE}", f"update consilium at {older}")

    @classmethod
    def of_message(cls, theirs: Wire) -> WireMismatch:
        """For a message whose sender the caller may not know."""
        older = "its sender" if theirs.major < WIRE.major else "this side"
        return cls(
            f"a message is of wire version {theirs}, this side speaks {WIRE}",
            f"update consilium at {older}",
        )


def optional_of(config: Mapping[str, Any], key: str, default: T) -> T:
    """The field ``key`` if it is there, of ``default``'s type (ProtocolError), else ``default``."""
    return field_of(config, key, type(default)) if key in config else default


def stamp() -> dict[str, Any]:
    """The fields with which every record says its version; no minor is minor 0."""
    return {"version": WIRE.major} | ({"minor": WIRE.minor} if WIRE.minor else {})


def wire_of(head: Mapping[str, Any]) -> Wire:
    """The version that a record says it is of; ProtocolError unless it is one."""
    major, minor = field_of(head, "version", int), optional_of(head, "minor", 0)
    if not (0 <= major < 1 << 16 and 0 <= minor < 1 << 16):
        raise ProtocolError("a message's version is out of range", "update the sender")
    return Wire(major, minor)


def any_head_of(record: RecordDict, name: str) -> Mapping[str, Any]:
    """The fields of the record ``name`` of whatever version; ProtocolError if there is none.

    For greetings and refusals, whose fields are read in all majors alike.
    """
    head = entry(record, name, ConfigRecord)
    if head is None:
        raise ProtocolError(
            f"a message has no '{name}' record",
            "run the same version of consilium at the server and at every hospital",
        )
    return head


def head_of(record: RecordDict, name: str) -> Mapping[str, Any]:
    """The fields of the record ``name`` of our major version; ProtocolError otherwise."""
    head = any_head_of(record, name)
    theirs = wire_of(head)
    if theirs.major != WIRE.major:
        raise WireMismatch.of_message(theirs)
    return head


def check_run_id(run: str) -> str:
    """``run`` if it is a proper run id (it names directories); ProtocolError otherwise."""
    if not _RUN.fullmatch(run):
        raise ProtocolError(
            "a run id has characters other than letters, digits and dashes, or is too long",
            "use the id that the server made, such as 20260101-120000-1a2b3c",
        )
    return run


def check_name(name: str) -> str:
    """``name`` if it is a proper hospital name; ProtocolError otherwise."""
    if not _NAME.fullmatch(name):
        raise ProtocolError(
            "a hospital's name has characters other than letters, digits, dot, dash, underscore",
            "name hospitals like st-mary or hospital-03",
        )
    return name


def arrays_to_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Arrays by name as a Flower record of one array, whose shape is the number of values."""
    packed = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    values = sum(int(np.size(array)) for array in arrays.values())
    return ArrayRecord({"packed": Array("safetensors", (values,), PACKED, packed)})


def record_to_arrays(record: RecordDict, name: str) -> dict[str, np.ndarray]:
    """The arrays of one record; ProtocolError if there is none or it cannot be read."""
    found = entry(record, name, ArrayRecord)
    if found is None:
        raise ProtocolError(f"a message has no '{name}' arrays", "update the sender")
    packed = found.get("packed")
    if packed is None or len(found) != 1 or packed.stype != PACKED:
        raise ProtocolError(
            f"the arrays '{name}' of a message are not packed as they should be",
            "run the same version of consilium at the server and at every hospital",
        )
    try:
        return parse_tensors(packed.data)
    except ValueError as e:
        raise ProtocolError(
            f"the arrays '{name}' of a message cannot be decoded: {e}",
            "send them again; if it recurs, update the sender",
        ) from None


def exactly(
    head: Mapping[str, Any], names: Set[str], optional: Set[str] = frozenset()
) -> Mapping[str, Any]:
    """``head`` if it has the fields ``names``, of others at most ``optional`` and its version.

    ProtocolError otherwise; of a newer minor it may have fields that are not known here.
    """
    unknown = set(head) - names - optional - {"version", "minor"}
    newer = wire_of(head).minor > WIRE.minor
    if names - set(head) or (unknown and not newer):
        raise ProtocolError("a message has other fields than it should", "update the sender")
    return head

"""What every record on the wire has in common: its version, its fields' types, packed arrays."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.numpy import save

from common.errors import ProtocolError
from common.tensors import parse_tensors

VERSION = 3

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


def head_of(record: RecordDict, name: str) -> Mapping[str, Any]:
    """The fields of the record ``name`` of our version; ProtocolError otherwise."""
    head = entry(record, name, ConfigRecord)
    if head is None:
        raise ProtocolError(
            f"a message has no '{name}' record",
            "run the same version of consilium at the server and at every hospital",
        )
    if head.get("version") != VERSION:
        raise ProtocolError(
            f"a message is of protocol version {head.get('version')!r}, not {VERSION}",
            "run the same version of consilium at the server and at every hospital",
        )
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


def exactly(head: Mapping[str, Any], names: set[str]) -> Mapping[str, Any]:
    """``head`` if it has these fields and its version alone; ProtocolError otherwise."""
    if set(head) != names | {"version"}:
        raise ProtocolError("a message has other fields than it should", "update the sender")
    return head

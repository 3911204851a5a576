"""The records of the asynchronous strategy: a base offered, a vector delivered, a receipt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from common.errors import ProtocolError
from common.messages.wire import (
    RAW,
    arrays_to_record,
    check_name,
    check_run_id,
    entry,
    exactly,
    field_of,
    head_of,
    record_to_arrays,
    stamp,
)
from common.vectors import base_id

_SERIAL = re.compile(r"[0-9a-f]{32}")
_CODE = re.compile(r"[a-z0-9-]{1,64}")
MAX_WITHDRAWALS = 64
"""Withdrawals in one answer; the rest come with the next."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Offer:
    """A base that a server offers for fine-tuning; the answer is a :class:`Delivery`.

    ``version``: how many bases came before it; ``base``: its id, which the weights must have.
    """

    run: str
    version: int
    base: str
    model_digest: bytes
    weights: Mapping[str, np.ndarray]

    @property
    def round(self) -> int:
        """The version, where logs have a column for rounds."""
        return self.version

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = ConfigRecord(
            {
                **stamp(),
                "run": self.run,
                "base-version": self.version,
                "base": self.base,
                "model": self.model_digest,
            }
        )
        return RecordDict({"offer": head, "weights": arrays_to_record(self.weights)})

    @classmethod
    def from_record(cls, record: RecordDict) -> Offer:
        """Read and check; ProtocolError for anything malformed, or weights of another base."""
        head = exactly(head_of(record, "offer"), {"run", "base-version", "base", "model"})
        version = field_of(head, "base-version", int)
        if not 0 <= version < 1 << 31:
            raise ProtocolError("an offer's version is out of range", "update the sender")
        made = cls(
            run=check_run_id(field_of(head, "run", str)),
            version=version,
            base=field_of(head, "base", str),
            model_digest=field_of(head, "model", bytes),
            weights=record_to_arrays(record, "weights"),
        )
        if base_id(made.model_digest, made.weights) != made.base:
            raise ProtocolError(
                "the weights of an offer are not those of the base that it names",
                "send them again; if it recurs, look at who stands between server and hospital",
            )
        return made


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A hospital's answer to an :class:`Offer` or a :class:`Receipt`: what waited in its outbox.

    ``vector``: a signed vector's bytes, empty if none waits; ``withdrawals``: signed, of vectors
    that it takes back. ``key``: its identity's public key, believed only where there is no roster.
    """

    run: str
    hospital: str
    key: bytes
    vector: bytes = b""
    withdrawals: tuple[bytes, ...] = ()

    def to_record(self) -> RecordDict:
        """As Flower records; bytes as arrays, which Flower sends in chunks."""
        head = ConfigRecord(
            {**stamp(), "run": self.run, "hospital": self.hospital, "key": self.key}
        )
        parts = {f"withdrawal-{i}": one for i, one in enumerate(self.withdrawals)}
        if self.vector:
            parts["vector"] = self.vector
        arrays = {k: Array("uint8", (len(v),), RAW, v) for k, v in parts.items()}
        return RecordDict({"delivery": head, "parcel": ArrayRecord(arrays)})

    @classmethod
    def from_record(cls, record: RecordDict, *, run: str) -> Delivery:
        """Read and check against the run that asked; ProtocolError otherwise."""
        head = exactly(head_of(record, "delivery"), {"run", "hospital", "key"})
        if head.get("run") != run:
            raise ProtocolError(
                f"a delivery belongs to run {str(head.get('run'))[:64]!r}, not to {run!r}",
                "nothing: it was not used",
            )
        parcel = entry(record, "parcel", ArrayRecord) or ArrayRecord()
        names = [f"withdrawal-{i}" for i in range(len(set(parcel) - {"vector"}))]
        if set(parcel) - {"vector"} != set(names) or len(names) > MAX_WITHDRAWALS:
            raise ProtocolError("a delivery holds what nobody asked for", "update the sender")
        if any(array.stype != RAW for array in parcel.values()):
            raise ProtocolError("a delivery holds no bytes", "update the sender")
        return cls(
            run=run,
            hospital=check_name(field_of(head, "hospital", str)),
            key=field_of(head, "key", bytes),
            vector=parcel["vector"].data if "vector" in parcel else b"",
            withdrawals=tuple(parcel[name].data for name in names),
        )


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What became of the vectors and withdrawals that a hospital sent, by serial.

    ``refused``: serial → code. An empty one asks whether there is anything to deliver.
    """

    run: str
    accepted: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    withdrawn: tuple[str, ...] = ()

    @property
    def round(self) -> int:
        """None in particular, where logs have a column for rounds."""
        return 0

    def to_record(self) -> RecordDict:
        """As Flower records; lists as text, since Flower forgets the type of an empty one."""
        refused = [f"{serial}={code}" for serial, code in sorted(self.refused.items())]
        head = ConfigRecord(
            {
                **stamp(),
                "run": self.run,
                "accepted": " ".join(self.accepted),
                "refused": " ".join(refused),
                "withdrawn": " ".join(self.withdrawn),
            }
        )
        return RecordDict({"receipt": head})

    @classmethod
    def from_record(cls, record: RecordDict) -> Receipt:
        """Read and check; ProtocolError for anything malformed."""
        names = {"run", "accepted", "refused", "withdrawn"}
        head = exactly(head_of(record, "receipt"), names)
        pairs = [part.partition("=") for part in field_of(head, "refused", str).split()]
        if not all(_CODE.fullmatch(code) for _, _, code in pairs):
            raise ProtocolError("a receipt's code is malformed", "update the sender")
        return cls(
            run=check_run_id(field_of(head, "run", str)),
            accepted=_serials(field_of(head, "accepted", str).split()),
            refused=dict(zip(_serials([s for s, _, _ in pairs]), [c for _, _, c in pairs],
                             strict=True)),
            withdrawn=_serials(field_of(head, "withdrawn", str).split()),
        )  # fmt: skip


def _serials(found: list[str]) -> tuple[str, ...]:
    if not all(_SERIAL.fullmatch(serial) for serial in found):
        raise ProtocolError("a receipt's serial is malformed", "update the sender")
    return tuple(found)

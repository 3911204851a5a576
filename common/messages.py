"""The records on the wire: each built and read in one place, versioned.

Every message carries ``version``, the run and the round. A reader refuses another version or
another run (:class:`~common.errors.ProtocolError`): nothing of an old run is ever taken for
an answer to a new one. No record holds an image, a file name or a path.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.errors import ConsiliumError, ProtocolError
from common.vectors import base_id

VERSION = 2

RAW = "consilium.bytes"
"""Serialisation type of arrays that are bytes as they are, with no header and no copy."""

PACKED = "consilium.safetensors"
"""Serialisation type of one array that holds many, as a safetensors file. Flower asks for each
array of a message by itself, each time through server and gate: a model is one array here."""

SMALL = 64 * 1024
"""Bytes up to which a payload travels beside its head, for the same reason."""

_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,63}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SERIAL = re.compile(r"[0-9a-f]{32}")
_CODE = re.compile(r"[a-z0-9-]{1,64}")
MAX_WITHDRAWALS = 64
"""Withdrawals in one answer; the rest come with the next."""

T = TypeVar("T", int, float, str, bytes)


def _field(config: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = config.get(key)
    if type(value) is not kind:
        raise ProtocolError(
            f"a message's field '{key}' is missing or not of type {kind.__name__}",
            "run the same version of consilium at the server and at every hospital",
        )
    return value


def _head(record: RecordDict, name: str) -> Mapping[str, Any]:
    head = record.config_records.get(name)
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
    found = record.array_records.get(name)
    if found is None:
        raise ProtocolError(f"a message has no '{name}' arrays", "update the sender")
    packed = found.get("packed")
    if packed is None or len(found) != 1 or packed.stype != PACKED:
        raise ProtocolError(
            f"the arrays '{name}' of a message are not packed as they should be",
            "run the same version of consilium at the server and at every hospital",
        )
    try:
        return dict(load(packed.data))
    except (SafetensorError, ValueError, TypeError, KeyError) as e:
        raise ProtocolError(
            f"the arrays '{name}' of a message cannot be decoded ({type(e).__name__})",
            "send them again; if it recurs, update the sender",
        ) from None


@dataclass(frozen=True)
class Job:
    """What a server asks of a hospital: train on, or evaluate, the model ``weights``."""

    run: str
    round: int
    model_digest: bytes
    """Digest of the :class:`common.model.ModelSpec` that the weights belong to."""
    weights: Mapping[str, np.ndarray]
    invitation: bytes = b""
    """Of secure aggregation; empty: the server asks for update and figures in the clear."""

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = ConfigRecord(
            {
                "version": VERSION,
                "run": self.run,
                "round": self.round,
                "model": self.model_digest,
                "invitation": self.invitation,
            }
        )
        return RecordDict({"job": head, "weights": arrays_to_record(self.weights)})

    @classmethod
    def from_record(cls, record: RecordDict) -> Job:
        """Read and check; ProtocolError for anything malformed."""
        head = _head(record, "job")
        round_ = _field(head, "round", int)
        if round_ < 0:
            raise ProtocolError("a message's round is negative", "update the sender")
        return cls(
            run=check_run_id(_field(head, "run", str)),
            round=round_,
            model_digest=_field(head, "model", bytes),
            weights=record_to_arrays(record, "weights"),
            invitation=_field(head, "invitation", bytes),
        )


@dataclass(frozen=True)
class Report:
    """What a hospital answers: its update (when it trained) and its figures.

    ``metrics`` are sums, so that they can be added up over hospitals: ``examples``,
    ``train-loss-sum``, ``val-examples``, ``val-loss-sum``, ``val-correct``.
    """

    run: str
    round: int
    hospital: str
    metrics: Mapping[str, float]
    update: Mapping[str, np.ndarray] = field(default_factory=dict)

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = ConfigRecord(
            {"version": VERSION, "run": self.run, "round": self.round, "hospital": self.hospital}
        )
        record = RecordDict({"report": head, "metrics": MetricRecord(dict(self.metrics))})
        if self.update:
            record["update"] = arrays_to_record(self.update)
        return record

    @classmethod
    def from_record(cls, record: RecordDict, *, run: str, round: int) -> Report:
        """Read and check against the run and round that were asked; ProtocolError otherwise."""
        head = _head(record, "report")
        if head.get("run") != run or head.get("round") != round:
            raise ProtocolError(
                f"an answer belongs to run {head.get('run')!r}, round {head.get('round')!r}, "
                f"not to run {run!r}, round {round}",
                "nothing: it is an answer that came too late, and was not used",
            )
        metrics: dict[str, float] = {}
        for key, value in record.metric_records.get("metrics", MetricRecord()).items():
            if not isinstance(value, int | float) or not np.isfinite(value):
                raise ProtocolError(f"metric '{key}' is not a finite number", "update the sender")
            metrics[key] = float(value)
        return cls(
            run=run,
            round=round,
            hospital=check_name(_field(head, "hospital", str)),
            metrics=metrics,
            update=record_to_arrays(record, "update") if "update" in record.array_records else {},
        )


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
                "version": VERSION,
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
        head = _exactly(_head(record, "offer"), {"run", "base-version", "base", "model"})
        version = _field(head, "base-version", int)
        if not 0 <= version < 1 << 31:
            raise ProtocolError("an offer's version is out of range", "update the sender")
        made = cls(
            run=check_run_id(_field(head, "run", str)),
            version=version,
            base=_field(head, "base", str),
            model_digest=_field(head, "model", bytes),
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
            {"version": VERSION, "run": self.run, "hospital": self.hospital, "key": self.key}
        )
        parts = {f"withdrawal-{i}": one for i, one in enumerate(self.withdrawals)}
        if self.vector:
            parts["vector"] = self.vector
        arrays = {k: Array("uint8", (len(v),), RAW, v) for k, v in parts.items()}
        return RecordDict({"delivery": head, "parcel": ArrayRecord(arrays)})

    @classmethod
    def from_record(cls, record: RecordDict, *, run: str) -> Delivery:
        """Read and check against the run that asked; ProtocolError otherwise."""
        head = _exactly(_head(record, "delivery"), {"run", "hospital", "key"})
        if head.get("run") != run:
            raise ProtocolError(
                f"a delivery belongs to run {str(head.get('run'))[:64]!r}, not to {run!r}",
                "nothing: it was not used",
            )
        parcel = record.array_records.get("parcel", ArrayRecord())
        names = [f"withdrawal-{i}" for i in range(len(set(parcel) - {"vector"}))]
        if set(parcel) - {"vector"} != set(names) or len(names) > MAX_WITHDRAWALS:
            raise ProtocolError("a delivery holds what nobody asked for", "update the sender")
        if any(array.stype != RAW for array in parcel.values()):
            raise ProtocolError("a delivery holds no bytes", "update the sender")
        return cls(
            run=run,
            hospital=check_name(_field(head, "hospital", str)),
            key=_field(head, "key", bytes),
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
                "version": VERSION,
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
        head = _exactly(_head(record, "receipt"), names)
        pairs = [part.partition("=") for part in _field(head, "refused", str).split()]
        if not all(_CODE.fullmatch(code) for _, _, code in pairs):
            raise ProtocolError("a receipt's code is malformed", "update the sender")
        return cls(
            run=check_run_id(_field(head, "run", str)),
            accepted=_serials(_field(head, "accepted", str).split()),
            refused=dict(zip(_serials([s for s, _, _ in pairs]), [c for _, _, c in pairs],
                             strict=True)),
            withdrawn=_serials(_field(head, "withdrawn", str).split()),
        )  # fmt: skip


def _exactly(head: Mapping[str, Any], names: set[str]) -> Mapping[str, Any]:
    if set(head) != names | {"version"}:
        raise ProtocolError("a message has other fields than it should", "update the sender")
    return head


def _serials(found: list[str]) -> tuple[str, ...]:
    if not all(_SERIAL.fullmatch(serial) for serial in found):
        raise ProtocolError("a receipt's serial is malformed", "update the sender")
    return tuple(found)


@dataclass(frozen=True)
class Envelope:
    """One message of secure aggregation, either way; :mod:`common.secagg` reads the payload."""

    payload: bytes

    def to_record(self) -> RecordDict:
        """As Flower records; a large payload as an array, which Flower sends in chunks."""
        if len(self.payload) <= SMALL:
            small = ConfigRecord({"version": VERSION, "payload": self.payload})
            return RecordDict({"envelope": small})
        payload = Array("uint8", (len(self.payload),), RAW, self.payload)
        return RecordDict(
            {
                "envelope": ConfigRecord({"version": VERSION}),
                "payload": ArrayRecord({"bytes": payload}),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> Envelope:
        """Read and check; ProtocolError for anything malformed."""
        head = _head(record, "envelope")
        if "payload" in head:
            return cls(_field(head, "payload", bytes))
        payload = record.array_records.get("payload", ArrayRecord()).get("bytes")
        if payload is None or payload.stype != RAW:
            raise ProtocolError("an envelope holds no bytes", "update the sender")
        return cls(payload.data)


@dataclass(frozen=True)
class Greeting:
    """A hospital's answer to "who are you": its name, nothing else."""

    hospital: str

    def to_record(self) -> RecordDict:
        """As Flower records."""
        return RecordDict(
            {"greeting": ConfigRecord({"version": VERSION, "hospital": self.hospital})}
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> Greeting:
        """Read and check; ProtocolError for anything malformed."""
        return cls(check_name(_field(_head(record, "greeting"), "hospital", str)))


@dataclass(frozen=True)
class Refusal:
    """A hospital will not or cannot: a code, and an id under which its own log has the details."""

    code: str
    correlation_id: str

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = ConfigRecord(
            {"version": VERSION, "code": self.code, "correlation-id": self.correlation_id}
        )
        return RecordDict({"refusal": head})

    @classmethod
    def of(cls, error: BaseException) -> Refusal:
        """The refusal that tells a server no more of ``error`` than its code."""
        code = error.code if isinstance(error, ConsiliumError) else "internal"
        return cls(code, secrets.token_hex(4))

    @classmethod
    def in_record(cls, record: RecordDict) -> Refusal | None:
        """The refusal in an answer, or None if it is none."""
        if "refusal" not in record.config_records:
            return None
        head = _head(record, "refusal")
        return cls(_field(head, "code", str)[:64], _field(head, "correlation-id", str)[:64])

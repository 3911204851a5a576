"""The records of a synchronous round: a job, its report, and secure aggregation's envelopes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import ProtocolError
from common.messages.wire import (
    RAW,
    SMALL,
    arrays_to_record,
    check_name,
    check_run_id,
    entry,
    field_of,
    head_of,
    record_to_arrays,
    stamp,
)

_DIGEST = re.compile("[0-9a-f]{64}")
_MOST = 64
"""Parts of a model that a message may leave out."""


@dataclass(frozen=True)
class Job:
    """What a server asks of a hospital: train on, or evaluate, a model.

    The model is ``weights`` and ``fixed`` together; updates are of ``weights`` alone. ``fixed`` may
    be left out of a message to a hospital that has it from an earlier one.
    """

    run: str
    round: int
    model_digest: bytes
    """Digest of the :class:`common.model.ModelSpec` that the weights belong to."""
    weights: Mapping[str, np.ndarray]
    """Entries that rounds move (:func:`common.model.moving_names`)."""
    invitation: bytes = b""
    """Of secure aggregation; empty: the server asks for update and figures in the clear."""
    fixed: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Entries that stay as they are."""
    left_out: tuple[str, ...] = ()
    """Digests (:func:`common.fixed.groups_of`) of the fixed entries that are not in the message."""

    @property
    def model(self) -> dict[str, np.ndarray]:
        """All entries of the model; of a message without its fixed ones those that are there."""
        return {**self.fixed, **self.weights}

    def without_fixed(self, groups: Mapping[str, Mapping[str, np.ndarray]]) -> Job:
        """The same with the digests of these ``groups`` (digest → entries) in their place."""
        left = {name for entries in groups.values() for name in entries}
        rest = {name: array for name, array in self.fixed.items() if name not in left}
        return replace(self, fixed=rest, left_out=(*self.left_out, *groups))

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = ConfigRecord(
            {
                **stamp(),
                "run": self.run,
                "round": self.round,
                "model": self.model_digest,
                "invitation": self.invitation,
                "left-out": " ".join(self.left_out),
            }
        )
        record = RecordDict({"job": head, "weights": arrays_to_record(self.weights)})
        if self.fixed:
            record["fixed"] = arrays_to_record(self.fixed)
        return record

    @classmethod
    def from_record(cls, record: RecordDict) -> Job:
        """Read and check; ProtocolError for anything malformed."""
        head = head_of(record, "job")
        round_ = field_of(head, "round", int)
        if round_ < 0:
            raise ProtocolError("a message's round is negative", "update the sender")
        job = cls(
            run=check_run_id(field_of(head, "run", str)),
            round=round_,
            model_digest=field_of(head, "model", bytes),
            weights=record_to_arrays(record, "weights"),
            invitation=field_of(head, "invitation", bytes),
            fixed=record_to_arrays(record, "fixed") if "fixed" in record else {},
            left_out=tuple(field_of(head, "left-out", str).split()),
        )
        if not all(_DIGEST.fullmatch(digest) for digest in job.left_out[:_MOST]):
            raise ProtocolError("what a message leaves out is named badly", "update the sender")
        if len(job.left_out) > _MOST:
            raise ProtocolError("a message leaves out too many parts", "update the sender")
        if job.fixed.keys() & job.weights.keys():
            raise ProtocolError("a message has an entry twice", "update the sender")
        return job


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
            {**stamp(), "run": self.run, "round": self.round, "hospital": self.hospital}
        )
        record = RecordDict({"report": head, "metrics": MetricRecord(dict(self.metrics))})
        if self.update:
            record["update"] = arrays_to_record(self.update)
        return record

    @classmethod
    def from_record(cls, record: RecordDict, *, run: str, round: int) -> Report:
        """Read and check against the run and round that were asked; ProtocolError otherwise."""
        head = head_of(record, "report")
        if head.get("run") != run or head.get("round") != round:
            raise ProtocolError(
                f"an answer belongs to run {head.get('run')!r}, round {head.get('round')!r}, "
                f"not to run {run!r}, round {round}",
                "nothing: it is an answer that came too late, and was not used",
            )
        metrics: dict[str, float] = {}
        for key, value in (entry(record, "metrics", MetricRecord) or MetricRecord()).items():
            if not isinstance(value, int | float) or not np.isfinite(value):
                raise ProtocolError(f"metric '{key}' is not a finite number", "update the sender")
            metrics[key] = float(value)
        return cls(
            run=run,
            round=round,
            hospital=check_name(field_of(head, "hospital", str)),
            metrics=metrics,
            update=record_to_arrays(record, "update") if "update" in record else {},
        )


@dataclass(frozen=True)
class Envelope:
    """One message of secure aggregation, either way; :mod:`common.secagg` reads the payload."""

    payload: bytes

    def to_record(self) -> RecordDict:
        """As Flower records; a large payload as an array, which Flower sends in chunks."""
        if len(self.payload) <= SMALL:
            small = ConfigRecord({**stamp(), "payload": self.payload})
            return RecordDict({"envelope": small})
        payload = Array("uint8", (len(self.payload),), RAW, self.payload)
        return RecordDict(
            {
                "envelope": ConfigRecord(stamp()),
                "payload": ArrayRecord({"bytes": payload}),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> Envelope:
        """Read and check; ProtocolError for anything malformed."""
        head = head_of(record, "envelope")
        if "payload" in head:
            return cls(field_of(head, "payload", bytes))
        payload = (entry(record, "payload", ArrayRecord) or ArrayRecord()).get("bytes")
        if payload is None or payload.stype != RAW:
            raise ProtocolError("an envelope holds no bytes", "update the sender")
        return cls(payload.data)

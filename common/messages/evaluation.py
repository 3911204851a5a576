"""The record of federated evaluation: a candidate to be compared with the base it would replace."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from common.errors import ProtocolError
from common.messages.wire import (
    arrays_to_record,
    check_run_id,
    exactly,
    field_of,
    head_of,
    record_to_arrays,
    stamp,
)
from common.vectors import base_id


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Two models in one question, so that the answers are over the same hospitals.

    ``round``: a number that grows within the run; ``base``: the id of the current base, which the
    weights ``current`` must have; ``invitation``: of secure aggregation, which alone carries the
    answer.
    """

    run: str
    round: int
    base: str
    model_digest: bytes
    current: Mapping[str, np.ndarray]
    candidate: Mapping[str, np.ndarray]
    invitation: bytes = b""

    @cached_property
    def models(self) -> bytes:
        """32 bytes over both models, in their order: what secure aggregation is bound to."""
        return comparison_hash(self.base, base_id(self.model_digest, self.candidate))

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = ConfigRecord(
            {
                **stamp(),
                "run": self.run,
                "round": self.round,
                "base": self.base,
                "model": self.model_digest,
                "invitation": self.invitation,
            }
        )
        return RecordDict(
            {
                "comparison": head,
                "current": arrays_to_record(self.current),
                "candidate": arrays_to_record(self.candidate),
            }
        )

    @classmethod
    def from_record(cls, record: RecordDict) -> Comparison:
        """Read and check; ProtocolError for anything malformed, or models that do not compare."""
        names = {"run", "round", "base", "model", "invitation"}
        head = exactly(head_of(record, "comparison"), names)
        round_ = field_of(head, "round", int)
        if not 0 <= round_ < 1 << 31:
            raise ProtocolError("a comparison's number is out of range", "update the sender")
        made = cls(
            run=check_run_id(field_of(head, "run", str)),
            round=round_,
            base=field_of(head, "base", str),
            model_digest=field_of(head, "model", bytes),
            current=record_to_arrays(record, "current"),
            candidate=record_to_arrays(record, "candidate"),
            invitation=field_of(head, "invitation", bytes),
        )
        if base_id(made.model_digest, made.current) != made.base:
            raise ProtocolError(
                "the current weights of a comparison are not those of the base that it names",
                "send them again; if it recurs, look at who stands between server and hospital",
            )
        if _shapes(made.current) != _shapes(made.candidate):
            raise ProtocolError(
                "the two models of a comparison have different entries", "update the sender"
            )
        if not all(np.isfinite(array).all() for array in made.candidate.values()):
            raise ProtocolError(
                "a candidate has weights that are NaN or infinite", "exclude the vector that harms"
            )
        return made


def comparison_hash(base: str, candidate: str) -> bytes:
    """32 bytes for two models by their ids: the current base first."""
    return hashlib.sha256(f"comparison\0{base}\0{candidate}".encode()).digest()


def _shapes(weights: Mapping[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (array.dtype.str, array.shape) for name, array in weights.items()}

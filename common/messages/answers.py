"""What a hospital may answer to anything: its name when asked who it is, or a refusal."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from common.errors import ConsiliumError
from common.messages.wire import VERSION, check_name, entry, field_of, head_of

_CODE = re.compile(r"[a-z0-9-]{1,64}")
_CORRELATION = re.compile(r"[A-Za-z0-9-]{1,64}")
UNREADABLE = "unreadable"
"""In place of a code, or an id, that is none: it goes to terminals, logs and reports."""


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
        return cls(check_name(field_of(head_of(record, "greeting"), "hospital", str)))


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
        if entry(record, "refusal", ConfigRecord) is None:
            return None
        head = head_of(record, "refusal")
        code, correlation_id = field_of(head, "code", str), field_of(head, "correlation-id", str)
        return cls(
            code if _CODE.fullmatch(code) else UNREADABLE,
            correlation_id if _CORRELATION.fullmatch(correlation_id) else UNREADABLE,
        )

"""Who a hospital is, and what it may answer to anything: a greeting, or a refusal.

These two are read in every major version alike, so that two sides that do not understand each other
can say so. Fields may come to them, and none may ever change or go.
"""

from __future__ import annotations

import importlib.metadata
import re
import secrets
from dataclasses import dataclass
from functools import cache

from flwr.app import ConfigRecord, RecordDict

from common.errors import ConsiliumError, ProtocolError
from common.messages.wire import (
    WIRE,
    Wire,
    any_head_of,
    check_name,
    entry,
    field_of,
    optional_of,
    stamp,
    wire_of,
)
from common.secagg.binding import canonical
from common.secagg.keys import SIGNATURE_BYTES, Identity, verify

NONCE_BYTES = 32
_PACKAGE = re.compile(r"[0-9A-Za-z.+!-]{0,32}")


@cache
def package_version() -> str:
    """Which version of consilium this is, for people; what can be understood the wire says."""
    try:
        return importlib.metadata.version("consilium")[:32]
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Challenge:
    """A server's "who are you": ``nonce`` (32 random bytes) is for one node and one answer."""

    nonce: bytes
    package: str = ""
    wire: Wire = WIRE

    @classmethod
    def new(cls) -> Challenge:
        """A fresh one, from the operating system's entropy."""
        return cls(secrets.token_bytes(NONCE_BYTES), package_version())

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = ConfigRecord({**stamp(), "nonce": self.nonce, "package": self.package})
        return RecordDict({"challenge": head})

    @classmethod
    def in_record(cls, record: RecordDict) -> Challenge | None:
        """The challenge in a message of any version, or None: servers up to wire 3 send none.

        ProtocolError for a malformed one.
        """
        if entry(record, "challenge", ConfigRecord) is None:
            return None
        head = any_head_of(record, "challenge")
        nonce = field_of(head, "nonce", bytes)
        if len(nonce) != NONCE_BYTES:
            raise ProtocolError("a challenge's nonce is not 32 bytes", "update the server")
        return cls(nonce, _package(optional_of(head, "package", "")), wire_of(head))


_CODE = re.compile(r"[a-z0-9-]{1,64}")
_CORRELATION = re.compile(r"[A-Za-z0-9-]{1,64}")
UNREADABLE = "unreadable"
"""In place of a code, or an id, that is none: it goes to terminals, logs and reports."""


@dataclass(frozen=True)
class Greeting:
    """A hospital's answer to "who are you": its name, and what it speaks.

    ``wire`` is what it writes, ``oldest`` the oldest major that it reads. ``proof``: its identity
    key's signature, 64 bytes, over the challenge and all of this; empty from a node without such a
    key, or where no challenge came.
    """

    hospital: str
    package: str = ""
    wire: Wire = WIRE
    oldest: int = WIRE.major
    proof: bytes = b""

    @classmethod
    def signed(
        cls, hospital: str, identity: Identity, challenge: Challenge, *, run: int, node: int
    ) -> Greeting:
        """With its proof. ``run``, ``node``: Flower's ids, as the hospital's own node knows them.

        They are in the signature and not in the answer: a challenge that somebody else was asked,
        and had this hospital answer, gets a proof that holds for this hospital's node alone.
        """
        plain = cls(hospital, package_version())
        statement = plain._statement(challenge.nonce, run, node)
        return cls(hospital, plain.package, proof=identity.sign(statement))

    def proves(self, identity: bytes, challenge: Challenge, *, run: int, node: int) -> bool:
        """Whether it is ``identity``'s (a public key) answer to ``challenge`` by that node."""
        return verify(identity, self.proof, self._statement(challenge.nonce, run, node))

    def _statement(self, nonce: bytes, run: int, node: int) -> bytes:
        return canonical(
            "greeting", nonce, run, node, self.hospital, *self.wire, self.oldest, self.package
        )

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = ConfigRecord(
            {
                **stamp(),
                "hospital": self.hospital,
                "package": self.package,
                "oldest": self.oldest,
                "proof": self.proof,
            }
        )
        return RecordDict({"greeting": head})

    @classmethod
    def from_record(cls, record: RecordDict) -> Greeting:
        """Read and check a greeting of any version; ProtocolError for anything malformed."""
        head = any_head_of(record, "greeting")
        wire = wire_of(head)
        oldest, proof = optional_of(head, "oldest", wire.major), optional_of(head, "proof", b"")
        if not 0 <= oldest <= wire.major or len(proof) not in (0, SIGNATURE_BYTES):
            raise ProtocolError("a greeting's fields are out of range", "update the sender")
        name = check_name(field_of(head, "hospital", str))
        return cls(name, _package(optional_of(head, "package", "")), wire, oldest, proof)


@dataclass(frozen=True)
class Refusal:
    """A hospital will not or cannot: a code, and an id under which its own log has the details."""

    code: str
    correlation_id: str

    def to_record(self) -> RecordDict:
        """As Flower records."""
        head = ConfigRecord({**stamp(), "code": self.code, "correlation-id": self.correlation_id})
        return RecordDict({"refusal": head})

    @classmethod
    def of(cls, error: BaseException) -> Refusal:
        """The refusal that tells a server no more of ``error`` than its code."""
        code = error.code if isinstance(error, ConsiliumError) else "internal"
        return cls(code, secrets.token_hex(4))

    @classmethod
    def in_record(cls, record: RecordDict) -> Refusal | None:
        """The refusal in an answer of any version, or None if it is none."""
        if entry(record, "refusal", ConfigRecord) is None:
            return None
        head = any_head_of(record, "refusal")
        code, correlation_id = field_of(head, "code", str), field_of(head, "correlation-id", str)
        return cls(
            code if _CODE.fullmatch(code) else UNREADABLE,
            correlation_id if _CORRELATION.fullmatch(correlation_id) else UNREADABLE,
        )


def _package(text: str) -> str:
    if not _PACKAGE.fullmatch(text):
        raise ProtocolError("a greeting's version of consilium is no version", "update the sender")
    return text

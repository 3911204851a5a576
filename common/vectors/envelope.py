"""A task vector and a withdrawal as they travel and are kept: signed bytes, read strictly.

The envelope of a vector is a safetensors file whose metadata hold the other fields and the
hospital's Ed25519 signature over all of them and the digest of the tensors. One content has one
byte string, and Ed25519 is deterministic: the same vector signed twice is the same envelope.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from common.parsing import parse_json
from common.secagg.binding import canonical
from common.secagg.keys import SIGNATURE_BYTES, Identity
from common.secagg.keys import verify as verify_signature
from common.vectors.errors import VectorError, malformed
from common.vectors.tensors import LIMIT, pack, unpack
from common.vectors.vector import FIELDS, TaskVector, check_hospital, check_serial, now

_KEY = "consilium-vector"
_VERSION = 1
_WITHDRAWAL_LIMIT = 4096


@dataclass(frozen=True)
class SignedVector:
    """A vector with its hospital's signature. Reading does not verify: :meth:`verify` does."""

    vector: TaskVector
    signature: bytes

    @classmethod
    def sign(cls, vector: TaskVector, identity: Identity) -> SignedVector:
        """Sign as the hospital."""
        return cls(vector, identity.sign(_vector_statement(vector)))

    def verify(self, public: bytes) -> None:
        """VectorError (``vector-signature``) unless it is ``public``'s (32 bytes) signature."""
        if not verify_signature(public, self.signature, _vector_statement(self.vector)):
            raise _bad_signature(f"a vector that names {self.vector.hospital}")

    def to_bytes(self) -> bytes:
        """The envelope: one self-contained byte string, and a safetensors file."""
        told = f'{{"fields":{self.vector.fields_json()},"signature":"{self.signature.hex()}",'
        return pack(self.vector.values, {_KEY: f'{told}"version":{_VERSION}}}'})

    @classmethod
    def from_bytes(cls, data: bytes, *, limit: int = LIMIT) -> SignedVector:
        """Read an envelope of at most ``limit`` bytes; its values are read-only.

        VectorError as :class:`TaskVector` and ``vector-format`` for anything that
        :meth:`to_bytes` would not have written: unknown fields, other types, other spellings.
        """
        values, metadata = unpack(data, limit=limit)
        told = _object(metadata.get(_KEY, ""))
        if set(metadata) != {_KEY} or set(told) != {"fields", "signature", "version"}:
            raise malformed("it is not the envelope of a vector")
        if told["version"] != _VERSION or type(told["version"]) is not int:
            raise malformed(f"the envelope is not of version {_VERSION}")
        fields = told["fields"]
        if not isinstance(fields, dict) or set(fields) != set(FIELDS):
            raise malformed("the envelope's fields are not those of a vector")
        if not isinstance(fields["metrics"], dict):
            raise malformed("its metrics are no table")
        made = cls(TaskVector(values=values, **fields), _signature(told["signature"]))
        if made.to_bytes() != data:
            raise malformed("the envelope is not in its canonical form")
        return made


@dataclass(frozen=True, kw_only=True)
class Withdrawal:
    """A hospital takes the vector with ``serial`` back; for ever."""

    hospital: str
    serial: str
    created: str = field(default_factory=now)
    signature: bytes = b""

    def __post_init__(self) -> None:
        check_hospital(self.hospital)
        check_serial(self.serial)
        if not isinstance(self.created, str) or len(self.created) > 40:
            raise malformed("the withdrawal's time is no time")

    @classmethod
    def sign(cls, hospital: str, serial: str, identity: Identity) -> Withdrawal:
        """Sign as the hospital."""
        plain = cls(hospital=hospital, serial=serial)
        signature = identity.sign(plain._statement())
        return cls(hospital=hospital, serial=serial, created=plain.created, signature=signature)

    def verify(self, public: bytes) -> None:
        """VectorError (``vector-signature``) unless it is ``public``'s (32 bytes) signature."""
        if not verify_signature(public, self.signature, self._statement()):
            raise _bad_signature(f"a withdrawal that names {self.hospital}")

    def to_bytes(self) -> bytes:
        """As JSON."""
        told = {
            "created": self.created,
            "hospital": self.hospital,
            "serial": self.serial,
            "signature": self.signature.hex(),
            "version": _VERSION,
        }
        return json.dumps(told, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Withdrawal:
        """Read; VectorError (``vector-format``) for what :meth:`to_bytes` would not write."""
        if not isinstance(data, bytes) or len(data) > _WITHDRAWAL_LIMIT:
            raise malformed(f"a withdrawal is not a byte string of at most {_WITHDRAWAL_LIMIT}")
        told = _object(data)
        if set(told) != {"created", "hospital", "serial", "signature", "version"}:
            raise malformed("it is no withdrawal")
        made = cls(
            hospital=told["hospital"],
            serial=told["serial"],
            created=told["created"],
            signature=_signature(told["signature"]),
        )
        if made.to_bytes() != data:
            raise malformed("the withdrawal is not in its canonical form")
        return made

    def _statement(self) -> bytes:
        return canonical("vector withdrawal", self.hospital, self.serial, self.created)


def _vector_statement(vector: TaskVector) -> bytes:
    return canonical("task vector", vector.fields_json(), vector.values_digest())


def _object(text: str | bytes) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError:
        raise malformed("it holds no JSON") from None
    if not isinstance(value, dict):
        raise malformed("it holds no JSON object")
    return value


def _signature(text: object) -> bytes:
    try:
        signature = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        signature = b""
    if len(signature) != SIGNATURE_BYTES:
        raise malformed("its signature does not have 64 bytes")
    return signature


def _bad_signature(what: str) -> VectorError:
    return VectorError(
        "vector-signature",
        f"{what} is not signed with that hospital's key in the roster",
        "check the roster; if it is right, somebody else has sent it",
    )

"""What every key, signature, share and message of a round is bound to.

:func:`transcript` is the one hash of the protocol: length-prefixed, typed and labelled, so
that two different inputs never give the same bytes. :class:`RoundBinding` holds everything
that a hospital must have agreed to; its digest enters all of the round's cryptography.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

from common.errors import ConfigError
from common.secagg import wire
from common.secagg.errors import malformed
from common.secagg.layout import VectorLayout
from common.secagg.params import SecAggParams

_DOMAIN = "consilium-secagg-1"
INVITATION_BYTES = 64 * 1024


def canonical(label: str, *parts: bytes | str | int) -> bytes:
    """An injective encoding of ``label`` and ``parts``: type, 8-byte length, content."""
    pieces = []
    for part in (_DOMAIN, label, *parts):
        if isinstance(part, str):
            tag, content = b"s", part.encode()
        elif isinstance(part, bytes):
            tag, content = b"b", part
        else:
            tag, content = b"i", str(int(part)).encode()
        pieces.append(tag + len(content).to_bytes(8, "big") + content)
    return b"".join(pieces)


def transcript(label: str, *parts: bytes | str | int) -> bytes:
    """SHA-256 of the canonical encoding of ``label`` and ``parts``; 32 bytes."""
    return hashlib.sha256(canonical(label, *parts)).digest()


@dataclass(frozen=True, kw_only=True)
class RoundBinding:
    """Run, round, purpose (what the sum is for), parameters, layout and model of one round.

    ``model_hash``: 32 bytes over the model that the round starts from. A hospital compares
    it with its own hash of what it received, so that all trained from the same weights.
    """

    run: str
    round: int
    purpose: str
    params: SecAggParams
    layout: VectorLayout
    model_hash: bytes

    def validate(self) -> None:
        """Raise :class:`ConfigError` or ``Refusal`` unless the round could be started so."""
        wire.as_name(self.run)
        wire.as_name(self.purpose)
        if type(self.round) is not int or not 0 <= self.round < 1 << 31:
            raise ConfigError("The round's number is not from 0 to 2**31.", "Correct it.")
        wire.as_bytes(self.model_hash, 32)
        self.params.validate()
        self.layout.plan(self.params)

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that stand for the whole binding."""
        return transcript("binding", self.to_bytes())

    def to_bytes(self) -> bytes:
        """The invitation: what the server sends with the training task."""
        return wire.pack(
            "invitation", b"", self.run, self.round, self.purpose, self.params.to_wire(),
            self.layout.to_wire(), self.model_hash,
        )  # fmt: skip

    @classmethod
    def from_bytes(cls, data: bytes) -> RoundBinding:
        """Read an invitation; :class:`Refusal` if malformed. Does not judge its parameters."""
        fields = wire.unpack(data, "invitation", None, fields=6, limit=INVITATION_BYTES)
        binding = cls(
            run=wire.as_name(fields[0]),
            round=wire.as_int(fields[1]),
            purpose=wire.as_name(fields[2]),
            params=SecAggParams.from_wire(fields[3]),
            layout=VectorLayout.from_wire(fields[4]),
            model_hash=wire.as_bytes(fields[5], 32),
        )
        if binding.to_bytes() != data:
            raise malformed("the invitation is not in its canonical encoding")
        return binding

"""What every key, signature, share and message of a round is bound to.

:func:`transcript` is the one hash of the protocol: length-prefixed, typed and labelled, so
that two different inputs never give the same bytes. :class:`RoundBinding` holds everything
that a hospital must have agreed to; its digest enters all of the round's cryptography.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

from common.errors import ConfigError
from common.secagg import wire
from common.secagg.errors import malformed
from common.secagg.layout import VectorLayout
from common.secagg.params import SecAggParams

_DOMAIN = "consilium-secagg-1"
"""Of this encoding, and not of the protocol: ids of bases and signatures of rosters, vectors and
requests are made of it, and must stay what they are."""
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


_SAME_NOISE = 1e-6
"""Relative difference of two noise multipliers that count as one: each party calibrates by itself,
and libraries of other versions differ in the last digits. The binding holds one value for all."""


@dataclass(frozen=True, kw_only=True)
class RoundTerms:
    """How the vectors of a round are made, as far as it is the same at all hospitals.

    ``config``: 32 bytes over the whole effective run config. ``noise_multiplier`` (σ of the sum),
    ``clipping_norm`` (C) and ``sampling_rate`` (q): of what is summed, where the round's noise
    belongs to the sum; 0 where each hospital's noise is its own affair, or there is none.
    """

    config: bytes
    noise_multiplier: float = 0.0
    clipping_norm: float = 0.0
    sampling_rate: float = 0.0

    def validate(self) -> None:
        """Raise :class:`Refusal` unless these could be the terms of a round."""
        wire.as_bytes(self.config, 32)
        if not all(math.isfinite(x) and x >= 0 for x in self._numbers()):
            raise malformed("the round's noise, clipping norm or sampling rate is out of range")

    def agree(self, own: RoundTerms) -> bool:
        """Whether they are ``own``, a hospital's: all equal, and the same σ."""
        same = math.isclose(self.noise_multiplier, own.noise_multiplier, rel_tol=_SAME_NOISE)
        return same and (self.config, *self._numbers()[1:]) == (own.config, *own._numbers()[1:])

    def _numbers(self) -> tuple[float, float, float]:
        return self.noise_multiplier, self.clipping_norm, self.sampling_rate

    def to_wire(self) -> list[object]:
        """The terms as a list of plain values."""
        return [self.config, *(float(x) for x in self._numbers())]

    @classmethod
    def from_wire(cls, value: object) -> RoundTerms:
        """Read what :meth:`to_wire` wrote; not validated yet. Raises :class:`Refusal`."""
        config, noise, norm, rate = wire.as_record(value, 4)
        return cls(
            config=wire.as_bytes(config, 32),
            noise_multiplier=wire.as_float(noise),
            clipping_norm=wire.as_float(norm),
            sampling_rate=wire.as_float(rate),
        )


@dataclass(frozen=True, kw_only=True)
class RoundBinding:
    """Run, round, purpose (what the sum is for), parameters, layout, model and terms of one round.

    ``model_hash``: 32 bytes over the model that the round starts from. A hospital compares
    it with its own hash of what it received, so that all trained from the same weights.
    ``terms``: what else decides what a hospital computes. A hospital compares them with what it was
    told itself, so that no two in one sum were told differently.
    """

    run: str
    round: int
    purpose: str
    params: SecAggParams
    layout: VectorLayout
    model_hash: bytes
    terms: RoundTerms

    def validate(self) -> None:
        """Raise :class:`ConfigError` or ``Refusal`` unless the round could be started so."""
        wire.as_name(self.run)
        wire.as_name(self.purpose)
        if type(self.round) is not int or not 0 <= self.round < 1 << 31:
            raise ConfigError("The round's number is not from 0 to 2**31.", "Correct it.")
        wire.as_bytes(self.model_hash, 32)
        self.terms.validate()
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
            self.layout.to_wire(), self.model_hash, self.terms.to_wire(),
        )  # fmt: skip

    @classmethod
    def from_bytes(cls, data: bytes) -> RoundBinding:
        """Read an invitation; :class:`Refusal` if malformed. Does not judge its parameters."""
        fields = wire.unpack(data, "invitation", None, fields=7, limit=INVITATION_BYTES)
        binding = cls(
            run=wire.as_name(fields[0]),
            round=wire.as_int(fields[1]),
            purpose=wire.as_name(fields[2]),
            params=SecAggParams.from_wire(fields[3]),
            layout=VectorLayout.from_wire(fields[4]),
            model_hash=wire.as_bytes(fields[5], 32),
            terms=RoundTerms.from_wire(fields[6]),
        )
        if binding.to_bytes() != data:
            raise malformed("the invitation is not in its canonical encoding")
        return binding

"""The messages after the advertisement: one builder and one reader each.

Readers are strict and say nothing about meaning; the state machines judge what they read.
Limits are computed from the parameters, so that a huge message is refused unread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from common.secagg import wire
from common.secagg.binding import RoundBinding
from common.secagg.errors import malformed
from common.secagg.keys import SIGNATURE_BYTES, TAG_BYTES
from common.secagg.params import SecAggParams
from common.secagg.shamir import SHARE_BYTES
from common.secagg.statements import (
    ENTRY_BYTES,
    MASK_KEY,
    SEED,
    Advertisement,
    ShareStatement,
    read_names,
)

SALT_BYTES = 32
SEALED_BYTES = 2 * SHARE_BYTES + TAG_BYTES
_ALIGN = 64
_HEADER_LIMIT = 1024


@dataclass(frozen=True)
class Sealed:
    """Two shares, sealed for ``holder``: the HKDF salt of their key, and the ciphertext."""

    holder: str
    salt: bytes
    box: bytes = field(repr=False)


def build_advertisement(binding: RoundBinding, member: Advertisement) -> bytes:
    """Hospital to server, stage 1."""
    return wire.pack("advertisement", binding.digest, member.fields())


def read_advertisement(binding: RoundBinding, data: bytes) -> Advertisement:
    """Read stage 1's message."""
    (entry,) = wire.unpack(data, "advertisement", binding.digest, fields=1, limit=2 * ENTRY_BYTES)
    return Advertisement.from_fields(entry)


def build_cohort(binding: RoundBinding, cohort: Sequence[Advertisement]) -> bytes:
    """Server to hospitals: who is in the cohort, with what each advertised."""
    return wire.pack("cohort", binding.digest, [member.fields() for member in cohort])


def read_cohort(binding: RoundBinding, data: bytes) -> list[Advertisement]:
    """Read the cohort; names and keys are not judged yet."""
    limit = _many(binding.params)
    (entries,) = wire.unpack(data, "cohort", binding.digest, fields=1, limit=limit)
    members = wire.as_list(entries, most=binding.params.max_cohort)
    return [Advertisement.from_fields(entry) for entry in members]


def build_shares(context: bytes, statement: ShareStatement, sealed: Sequence[Sealed]) -> bytes:
    """Hospital to server, stage 2."""
    boxes = [[entry.holder, entry.salt, entry.box] for entry in sealed]
    return wire.pack("shares", context, statement.fields(), boxes)


def read_shares(
    context: bytes, params: SecAggParams, data: bytes
) -> tuple[ShareStatement, list[Sealed]]:
    """Read stage 2's message."""
    limit = ENTRY_BYTES * (params.num_shares + 2)
    statement, boxes = wire.unpack(data, "shares", context, fields=2, limit=limit)
    sealed = [_sealed(entry) for entry in wire.as_list(boxes, most=params.num_shares)]
    return ShareStatement.from_fields(statement, params.num_shares), sealed


def build_relay(
    context: bytes, recipient: str, entries: Sequence[tuple[ShareStatement, Sealed]]
) -> bytes:
    """Server to one hospital: the shares of its neighbours."""
    rows = [[statement.fields(), [s.holder, s.salt, s.box]] for statement, s in entries]
    return wire.pack("relay", context, recipient, rows)


def read_relay(
    context: bytes, params: SecAggParams, data: bytes
) -> tuple[str, list[tuple[ShareStatement, Sealed]]]:
    """Read what the server relayed: its recipient, and a statement and a box per neighbour."""
    limit = ENTRY_BYTES * (params.num_shares + 2) * (params.num_shares + 1)
    recipient, rows = wire.unpack(data, "relay", context, fields=2, limit=limit)
    entries = []
    for row in wire.as_list(rows, most=params.num_shares):
        statement, sealed = wire.as_record(row, 2)
        entries.append((ShareStatement.from_fields(statement, params.num_shares), _sealed(sealed)))
    return wire.as_name(recipient), entries


def build_masked(context: bytes, name: str, packed: bytes) -> bytes:
    """Hospital to server, stage 3: a header, padded so that the vector lies aligned."""
    header = wire.pack("masked", context, name)
    padding = -(4 + len(header)) % _ALIGN
    return b"".join((len(header).to_bytes(4, "little"), header, bytes(padding), packed))


def read_masked(context: bytes, data: bytes, size: int) -> tuple[str, memoryview]:
    """Read stage 3's message without copying the vector, which must have ``size`` bytes."""
    if not isinstance(data, bytes) or not 4 <= len(data) <= size + _HEADER_LIMIT:
        raise malformed("a masked input does not have the layout's size")
    length = int.from_bytes(data[:4], "little")
    start = 4 + length + -(4 + length) % _ALIGN
    if length > _HEADER_LIMIT or len(data) != start + size or any(data[4 + length : start]):
        raise malformed("a masked input does not have the layout's size")
    (name,) = wire.unpack(data[4 : 4 + length], "masked", context, fields=1, limit=_HEADER_LIMIT)
    return wire.as_name(name), memoryview(data)[start:]


def build_survivors(context: bytes, survivors: Sequence[str]) -> bytes:
    """Server to hospitals: whose masked input it has."""
    return wire.pack("survivors", context, sorted(survivors))


def read_survivors(context: bytes, params: SecAggParams, data: bytes) -> list[str]:
    """Read the survivors: names, sorted, each once."""
    (names,) = wire.unpack(data, "survivors", context, fields=1, limit=_many(params))
    return read_names(names, params.max_cohort)


def build_signature(context: bytes, name: str, signature: bytes) -> bytes:
    """Hospital to server, stage 4."""
    return wire.pack("signature", context, name, signature)


def read_signature(context: bytes, data: bytes) -> tuple[str, bytes]:
    """Read stage 4's message: the name and its signature over the survivors."""
    name, signature = wire.unpack(data, "signature", context, fields=2, limit=ENTRY_BYTES)
    return wire.as_name(name), wire.as_bytes(signature, SIGNATURE_BYTES)


def build_signatures(context: bytes, entries: Sequence[tuple[str, bytes]]) -> bytes:
    """Server to hospitals: who signed the survivors."""
    return wire.pack("signatures", context, [list(entry) for entry in sorted(entries)])


def read_signatures(context: bytes, params: SecAggParams, data: bytes) -> dict[str, bytes]:
    """Read the signatures over the survivors, by name."""
    (rows,) = wire.unpack(data, "signatures", context, fields=1, limit=_many(params))
    pairs = [wire.as_record(row, 2) for row in wire.as_list(rows, most=params.max_cohort)]
    names = read_names([name for name, _ in pairs], params.max_cohort)
    signed = [wire.as_bytes(signature, SIGNATURE_BYTES) for _, signature in pairs]
    return dict(zip(names, signed, strict=True))


def build_revealed(context: bytes, name: str, shares: Sequence[tuple[str, str, bytes]]) -> bytes:
    """Hospital to server, stage 5: (owner, kind, share) for each neighbour."""
    return wire.pack("revealed", context, name, [list(entry) for entry in sorted(shares)])


def read_revealed(
    context: bytes, params: SecAggParams, data: bytes
) -> tuple[str, dict[str, tuple[str, bytes]]]:
    """Read stage 5's message: by owner, the kind of share and the share."""
    limit = ENTRY_BYTES * (params.num_shares + 2)
    name, rows = wire.unpack(data, "revealed", context, fields=2, limit=limit)
    entries = [wire.as_record(row, 3) for row in wire.as_list(rows, most=params.num_shares)]
    owners = read_names([row[0] for row in entries], params.num_shares)
    shares = {}
    for owner, (_, kind, share) in zip(owners, entries, strict=True):
        if kind not in (SEED, MASK_KEY):
            raise malformed("a share is of no known kind")
        shares[owner] = (wire.as_text(kind), wire.as_bytes(share, SHARE_BYTES))
    return wire.as_name(name), shares


def _sealed(value: object) -> Sealed:
    holder, salt, box = wire.as_record(value, 3)
    return Sealed(
        wire.as_name(holder), wire.as_bytes(salt, SALT_BYTES), wire.as_bytes(box, SEALED_BYTES)
    )


def _many(params: SecAggParams) -> int:
    return ENTRY_BYTES * (params.max_cohort + 1)

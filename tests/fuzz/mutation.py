"""Bytes that are nearly right: what parsers stumble over, from a seed that is printed."""

from __future__ import annotations

import random

JUNK = (
    b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff", b"[" * 3000, b'{"a":' * 2000, b"(" * 300, b"\xff" * 8, b"\x00" * 8,
    b"1e999", b"-1", b"9" * 23, b"9" * 5000, b"NaN", b"Infinity", "\u202e".encode(), b"null",
    b"true", b"[]", b"{}", b"0001-01-01T00:00:00Z", b"9999-99-99", b"\xed\xa0\x80", b"\x1b[2J",
    b"\n", b'"', b"\\u0000", b"\\ud800", b"'''", b'"""', b"#", b"= =",
)  # fmt: skip


def mutated(seed: bytes, rnd: random.Random, others: tuple[bytes, ...] = ()) -> bytes:
    """``seed`` with one to eight changes; now and then a part of one of the ``others`` in it."""
    data = bytearray(seed)
    for _ in range(rnd.choice((1, 1, 2, 3, 8))):
        at = rnd.randrange(max(1, len(data)))
        kind = rnd.randrange(9)
        if kind == 0 and data:
            data[at] ^= 1 << rnd.randrange(8)
        elif kind == 1 and data:
            data[at] = rnd.randrange(256)
        elif kind == 2:
            data[at:at] = rnd.randbytes(rnd.randrange(1, 9))
        elif kind == 3:
            del data[at : at + rnd.randrange(1, 9)]
        elif kind == 4:
            data[at : at + rnd.randrange(12)] = rnd.choice(JUNK)
        elif kind == 5:
            start = rnd.randrange(max(1, len(data)))
            data[at:at] = data[start : start + rnd.randrange(1, 60)]
        elif kind == 6:
            del data[at:]
        elif kind == 7 and others:
            other = rnd.choice(others)
            start = rnd.randrange(max(1, len(other)))
            data[at:at] = other[start : start + rnd.randrange(1, 200)]
        elif digits := [i for i, byte in enumerate(data) if 48 <= byte < 58]:
            data[rnd.choice(digits)] = 48 + rnd.randrange(10)
    return bytes(data)

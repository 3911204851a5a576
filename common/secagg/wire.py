"""Strict messages: one canonical msgpack array, its size bounded, its context checked.

Every message is ``[version, kind, context, *fields]``. ``context`` is the 32-byte hash that
binds it to its round (before there is a cohort: :class:`~common.secagg.binding.RoundBinding`;
afterwards: the cohort hash, which covers the binding), so that a message of another run,
round, cohort or set of parameters is refused before anything in it is read. Only the
canonical encoding is accepted, so that one content has one byte string.
"""

from __future__ import annotations

import hmac
import unicodedata
from collections.abc import Sequence

import msgpack

from common.secagg.errors import Refusal, malformed

VERSION = 2
"""2: the invitation holds the round's terms."""
NAME_BYTES = 128


def pack(kind: str, context: bytes, *fields: object) -> bytes:
    """The canonical bytes of a message of ``kind``, bound to ``context`` (32 bytes)."""
    packed: bytes = msgpack.packb([VERSION, kind, context, *fields], use_bin_type=True)
    return packed


def unpack(
    data: bytes, kind: str, context: bytes | None, *, fields: int, limit: int
) -> list[object]:
    """The ``fields`` fields of a message; raises :class:`Refusal` if anything is off.

    ``limit`` bounds the message's bytes. ``context=None`` is for the one message that
    brings the context itself (the invitation).
    """
    value = as_list(load(data, limit))
    if len(value) < 3 or value[0] != VERSION or type(value[0]) is not int:
        raise Refusal(
            "secagg-version",
            f"A {kind} message is not of version {VERSION} of this protocol.",
            "Install the same version of consilium on the server and in every hospital.",
        )
    if value[1] != kind:
        raise Refusal(
            "secagg-kind",
            f"A {kind} message was expected here, and another kind came.",
            "The stages come in one order, each once; start a new round.",
        )
    if context is not None and not hmac.compare_digest(as_bytes(value[2], 32), context):
        raise Refusal(
            "secagg-context",
            f"A {kind} message belongs to another run, round, cohort or set of parameters.",
            "Start a new round; if it comes again, treat the server as hostile.",
        )
    if len(value) != 3 + fields:
        raise malformed(f"{kind} has {len(value) - 3} fields instead of {fields}")
    return value[3:]


def load(data: bytes, limit: int) -> object:
    """One canonical msgpack value of at most ``limit`` bytes; raises :class:`Refusal`."""
    if not isinstance(data, bytes):
        raise malformed("it is not a byte string")
    if len(data) > limit:
        raise malformed(f"{len(data)} bytes, more than the {limit} that this stage allows")
    try:
        value: object = msgpack.unpackb(data, raw=False, strict_map_key=True)
        canonical: bytes = msgpack.packb(value, use_bin_type=True)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
        raise malformed("it is not msgpack") from None
    if canonical != data:
        raise malformed("it is not in its canonical encoding")
    return value


def as_list(value: object, *, most: int | None = None) -> list[object]:
    """``value`` as a list of at most ``most`` entries."""
    if not isinstance(value, list) or (most is not None and len(value) > most):
        raise malformed("a list is missing or too long")
    return value


def as_record(value: object, length: int) -> Sequence[object]:
    """``value`` as a list of exactly ``length`` entries."""
    if not isinstance(value, list) or len(value) != length:
        raise malformed(f"a record does not have {length} entries")
    return value


def as_bytes(value: object, length: int) -> bytes:
    """``value`` as exactly ``length`` bytes."""
    if not isinstance(value, bytes) or len(value) != length:
        raise malformed(f"a field is not a string of {length} bytes")
    return value


def as_int(value: object) -> int:
    """``value`` as an integer; a boolean is none."""
    if type(value) is not int:
        raise malformed("a field is not an integer")
    return value


def as_float(value: object) -> float:
    """``value`` as a float; an integer is none."""
    if type(value) is not float:
        raise malformed("a field is not a floating-point number")
    return value


def as_text(value: object) -> str:
    """``value`` as text."""
    if not isinstance(value, str):
        raise malformed("a field is not text")
    return value


def as_name(value: object) -> str:
    """``value`` as a name: 1 to 128 bytes, printable, in Unicode's composed form (NFC).

    One form only, because two spellings of one name would be two hospitals in a cohort.
    """
    text = as_text(value)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise malformed("a name is not valid Unicode") from None
    plain = text.isprintable() and text == text.strip()
    if not 1 <= size <= NAME_BYTES or not plain or unicodedata.normalize("NFC", text) != text:
        raise malformed(f"a name is empty, longer than {NAME_BYTES} bytes or not plain text")
    return text

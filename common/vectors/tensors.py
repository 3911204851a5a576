"""Named arrays as bytes: the safetensors format, in one canonical form, read strictly.

One content has one byte string: tensors by falling item size, then by name, without gaps, and a
header as :func:`pack` writes it. So a signed envelope has one digest, whoever wrote it, and a
reader need not judge overlapping or hidden ranges: it compares. Any safetensors library reads
these files; files of other writers are read with that library and packed anew.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.parsing import parse_json
from common.secagg.binding import canonical
from common.vectors.errors import malformed

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
_NAMES = {value: name for name, value in DTYPES.items()}

LIMIT = 256 * 1024 * 1024
"""Most bytes that are read, unless the caller says otherwise."""
HEADER_LIMIT = 1024 * 1024
NAME_LENGTH = 200
DIMENSIONS = 8

Arrays = Mapping[str, np.ndarray]
_Described = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def as_tensor(name: str, array: np.ndarray) -> np.ndarray:
    """``array`` in C order and little-endian; refused (``vector-format``) if not of numbers."""
    made = np.asarray(array, order="C")
    made = made.astype(made.dtype.newbyteorder("<"), copy=False)
    if made.dtype.str not in _NAMES:
        raise malformed(f"entry {name!r} is of type {made.dtype}")
    return made


def pack(arrays: Arrays, metadata: Mapping[str, str]) -> bytes:
    """The safetensors file of ``arrays`` with ``metadata``."""
    made = {name: as_tensor(name, array) for name, array in arrays.items()}
    described = [(k, _NAMES[v.dtype.str], v.shape) for k, v in made.items()]
    header = _header(described, metadata)
    body = [made[name].tobytes() for name, _, _ in _ordered(described)]
    return b"".join([len(header).to_bytes(8, "little"), header, *body])


def unpack(data: bytes, *, limit: int = LIMIT) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays (read-only, views of ``data``, sorted by name) and metadata of :func:`pack`'s bytes.

    Refused (``vector-format``): more than ``limit`` bytes, and whatever :func:`pack` would not
    have written. Sizes are checked before any array is made.
    """
    if not isinstance(data, bytes) or len(data) > limit:
        raise malformed(f"not a byte string of at most {limit} bytes")
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(HEADER_LIMIT, len(data) - 8):
        raise malformed("the header is cut off or too long")
    raw = data[8 : 8 + length]
    described, metadata = _parse(raw)
    if _header(described, metadata) != raw:
        raise malformed("the header is not in its canonical form")
    if len(data) != 8 + length + sum(_size(dtype, shape) for _, dtype, shape in described):
        raise malformed("the length is not that of the tensors")
    arrays, start = {}, 8 + length
    for name, dtype, shape in _ordered(described):
        flat = np.frombuffer(data, DTYPES[dtype], count=math.prod(shape), offset=start)
        if dtype == "BOOL" and (flat.view(np.uint8) > 1).any():
            raise malformed(f"entry {name!r} holds what is no boolean")
        arrays[name] = flat.reshape(shape)
        start += _size(dtype, shape)
    return {name: arrays[name] for name in sorted(arrays)}, metadata


def digest(label: str, context: Sequence[bytes | str | int], arrays: Arrays) -> str:
    """SHA-256 (hex) over label, context, and each entry's name, dtype, shape and bytes by name."""
    parts: list[bytes | str | int] = [*context, len(arrays)]
    for name in sorted(arrays):
        made = as_tensor(name, arrays[name])
        content = hashlib.sha256(made.tobytes()).digest()
        parts += [name, made.dtype.str, made.ndim, *made.shape, content]
    return hashlib.sha256(canonical(label, *parts)).hexdigest()


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return np.dtype(DTYPES[dtype]).itemsize * math.prod(shape)


def _ordered(described: Sequence[_Described]) -> list[_Described]:
    """By falling item size, so that every tensor is aligned; then by name."""
    return sorted(described, key=lambda d: (-np.dtype(DTYPES[d[1]]).itemsize, d[0]))


def _header(described: Sequence[_Described], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {key: metadata[key] for key in sorted(metadata)}}
    start = 0
    for name, dtype, shape in _ordered(described):
        end = start + _size(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _parse(raw: bytes) -> tuple[list[_Described], dict[str, str]]:
    """Names, types and shapes as a header claims them, of the right types and within limits."""
    try:
        header = parse_json(raw)
    except ValueError:
        raise malformed("the header is no JSON") from None
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise malformed("the header has no metadata")
    return [_entry(name, entry) for name, entry in header.items()], metadata


def _entry(name: str, entry: object) -> _Described:
    if not name.isprintable() or not 0 < len(name) <= NAME_LENGTH:
        raise malformed("an entry's name is empty, too long or not printable")
    if not isinstance(entry, dict):
        raise malformed(f"entry {name!r} is no table")
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise malformed(f"entry {name!r} is of an unknown type")
    if not isinstance(shape, list) or len(shape) > DIMENSIONS:
        raise malformed(f"entry {name!r} has no shape")
    if not all(type(n) is int and 0 < n < 1 << 32 for n in shape):
        raise malformed(f"entry {name!r} has no proper shape")
    return name, dtype, tuple(shape)

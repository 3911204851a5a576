"""Arrays by name from elsewhere: the safetensors format, with trust in no number that it holds.

Everything is read from bytes that are at hand already, and takes memory in proportion to them. The
library's own reader believes a header of any length. (:mod:`common.vectors.tensors` reads one
canonical form of the same format, for what is signed.)
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from common.parsing import parse_json, unique_pairs

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "|i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
"""Of safetensors → NumPy's, little-endian."""
MAX_HEADER = 1024 * 1024
"""Bytes of a safetensors header: a ResNet-18's has 10 kB."""
MAX_TENSORS = 10_000
MAX_FILE = 4 * 2**30
MAX_NAME = 200
MAX_DIMENSIONS = 8


def parse_tensors(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, by name; ValueError for whatever is none.

    They are copies, writable, of :data:`DTYPES`. Refused before anything is made of them: a header
    beyond :data:`MAX_HEADER`, more than :data:`MAX_TENSORS`, names that cannot be printed, shapes
    that are not of their range's length, and ranges that overlap or leave bytes out.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER, len(data) - 8):
        raise ValueError("the header is cut off or too long")
    raw = data[8 : 8 + length]
    if raw.count(b'"data_offsets"') > MAX_TENSORS:  # before they are objects
        raise ValueError(f"there are more than {MAX_TENSORS} tensors")
    header = parse_json(raw, object_pairs_hook=unique_pairs)
    if not isinstance(header, dict) or len(header) > MAX_TENSORS + 1:
        raise ValueError("the header is no table of tensors")
    header.pop("__metadata__", None)
    described = [(name, *_described(name, entry)) for name, entry in header.items()]
    at = 0
    for name, _, _, begin, end in sorted(described, key=lambda entry: entry[3:]):
        if begin != at:
            raise ValueError(f"tensor {name!r} does not begin where another one ends")
        at = end
    if at != len(data) - 8 - length:
        raise ValueError("the length is not that of the tensors")
    start = 8 + length
    return {
        name: np.frombuffer(data, dtype, math.prod(shape), start + begin).reshape(shape).copy()
        for name, dtype, shape, begin, _ in described
    }


def load_tensors(path: Path, *, limit: int = MAX_FILE) -> dict[str, np.ndarray]:
    """:func:`parse_tensors` of a file of at most ``limit`` bytes; OSError where it is not there."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return parse_tensors(data)


def _described(name: str, entry: object) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    """Type, shape, begin and end of a tensor, in agreement with each other."""
    if not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise ValueError("a tensor's name is empty, too long or not printable")
    told = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = (told.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} is of an unknown type")
    if not isinstance(shape, list) or not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {name!r} has no proper shape")
    if not isinstance(offsets, list) or not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has no range")
    made = np.dtype(DTYPES[dtype])
    if made.itemsize * math.prod(shape) != offsets[1] - offsets[0]:
        raise ValueError(f"tensor {name!r} is not as long as its shape says")
    return made, tuple(shape), offsets[0], offsets[1]


def _sizes(values: list[Any]) -> bool:
    return all(type(n) is int and 0 <= n <= sys.maxsize for n in values)

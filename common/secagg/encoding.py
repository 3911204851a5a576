"""Fixed point with stochastic rounding: from values to ring elements, and sums back.

The encoded value is ``floor(w * x * scale + u)`` with ``u`` uniform in [0, 1), so that its
expectation is exact and the errors of many hospitals average out. The randomness is a cipher
stream keyed from OS entropy: a guessable rounding would tell something of the value. Scale
and limit come from :mod:`common.secagg.layout`, and make a wrap-around impossible, but for
modular segments, which are integers modulo the ring.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from common.secagg.errors import Refusal, malformed
from common.secagg.keys import Entropy, new_secret
from common.secagg.layout import WEIGHT, SegmentPlan, VectorLayout
from common.secagg.masks import KeyStream, RingArray
from common.secagg.params import SecAggParams

_CHUNK = 1 << 16
"""Values per step: the float64 temporaries then stay in the processor's cache."""


@dataclass(frozen=True)
class Encoded:
    """A hospital's vector, ready to be masked, and what encoding did to it.

    vector: ring elements (uint32 or uint64), secret until it is masked.
    clipped: per segment, how many values lay outside the range. For the hospital's own log.
    """

    vector: RingArray = field(repr=False)
    clipped: Mapping[str, int] = field(repr=False)


def ring_dtype(ring_bits: int) -> type[np.uint32] | type[np.uint64]:
    """The unsigned type that sums of ``ring_bits`` are computed in."""
    return np.uint32 if ring_bits <= 32 else np.uint64


def zeros(layout: VectorLayout, params: SecAggParams) -> RingArray:
    """An empty sum: one zero ring element for each value of the layout."""
    if params.ring_bits <= 32:
        return np.zeros(layout.length, dtype=np.uint32)
    return np.zeros(layout.length, dtype=np.uint64)


def encode(
    layout: VectorLayout,
    params: SecAggParams,
    values: Mapping[str, npt.ArrayLike],
    *,
    weight: int,
    entropy: Entropy = os.urandom,
) -> Encoded:
    """Encode one array for each segment (except ``weight``, filled in from ``weight``).

    values: real segments as float arrays, the others as integer arrays, each with as many
        values as its segment, of any shape.
    weight: from 1 to ``layout.max_weight``; multiplies the weighted segments.

    Guarantee: each element is at most its segment's ``limit`` in absolute value. Raises
    :class:`Refusal` for NaN or infinity (``secagg-not-finite``), a wrong length or type
    (``secagg-values``), an integer out of bounds (``secagg-integer-range``) or a weight out
    of range (``secagg-weight``); no text names a value. Real values outside the range are
    clipped and counted. :class:`~common.errors.ConfigError` if the layout does not fit.
    """
    plans = layout.plan(params)
    if isinstance(weight, bool) or not isinstance(weight, int | np.integer):
        raise _refuse("weight", "The weight is not a whole number")
    if not 1 <= weight <= layout.max_weight:
        raise _refuse("weight", f"The weight is outside 1 to {layout.max_weight}")
    given = dict(values)
    if any(plan.segment.name == WEIGHT for plan in plans):
        given[WEIGHT] = np.array([int(weight)], dtype=np.int64)
    if set(given) != {plan.segment.name for plan in plans}:
        raise _refuse("values", "The values given are not those of the layout's segments")
    vector = zeros(layout, params)
    stream = KeyStream(new_secret(entropy))
    clipped = {}
    for plan in plans:
        array = np.asarray(given[plan.segment.name]).reshape(-1)
        name = plan.segment.name
        if array.size != plan.segment.length:
            raise _refuse(
                "values", f"Segment {name!r} does not have its {plan.segment.length} values"
            )
        factor = int(weight) if plan.segment.weighted else 1
        out = vector[plan.start : plan.stop]
        encoder = _encode_real if plan.segment.kind == "real" else _encode_integer
        clipped[name] = encoder(plan, array, factor, out, stream)
    return Encoded(vector, clipped)


def _encode_integer(
    plan: SegmentPlan, array: npt.NDArray[np.generic], factor: int, out: RingArray, _: KeyStream
) -> int:
    name = plan.segment.name
    if not np.issubdtype(array.dtype, np.integer):
        raise _refuse("values", f"Segment {name!r} does not hold integers")
    if plan.segment.kind == "modular":
        out[:] = array.astype(np.int64).astype(out.dtype)  # casts to unsigned types are modular
        return 0
    bound = int(plan.segment.bound)
    if int(array.max()) > bound or int(array.min()) < -bound:
        raise _refuse("integer-range", f"Segment {name!r} has a value outside -{bound} to {bound}")
    out[:] = (array.astype(np.int64) * factor).astype(out.dtype)
    return 0


def _encode_real(
    plan: SegmentPlan,
    array: npt.NDArray[np.generic],
    factor: int,
    out: RingArray,
    stream: KeyStream,
) -> int:
    name, bound, clipped = plan.segment.name, plan.segment.bound, 0
    if not np.issubdtype(array.dtype, np.floating):
        raise _refuse("values", f"Segment {name!r} does not hold floating-point numbers")
    size = min(_CHUNK, array.size)
    buffer = memoryview(bytearray(4 * size))
    random, scaled = np.frombuffer(buffer, dtype="<u4"), np.empty(size)
    uniform, whole = np.empty(size), np.empty(size, dtype=np.int64)
    for start in range(0, array.size, size):
        part = array[start : start + size]
        count = part.size
        x, u, encoded = scaled[:count], uniform[:count], whole[:count]
        x[:] = part
        # One comparison finds both: NaN compares false with everything.
        if not (x.max() <= bound and x.min() >= -bound):
            if not np.isfinite(x).all():
                raise Refusal(
                    "secagg-not-finite",
                    f"Segment {name!r} of this hospital's vector has NaN or infinite values.",
                    "Nothing was sent. Lower the learning rate or check the training data.",
                )
            clipped += int(np.count_nonzero(np.abs(x) > bound))
            np.clip(x, -bound, bound, out=x)
        x *= factor * plan.scale
        stream.fill(buffer[: 4 * count])
        np.multiply(random[:count], 2.0**-32, out=u)
        x += u
        np.floor(x, out=x)
        # Never active: the scale keeps a step back. It makes the guarantee unconditional.
        np.clip(x, -plan.limit, plan.limit, out=x)
        np.copyto(encoded, x, casting="unsafe")
        # A cast to an unsigned type is reduction modulo 2**32 or 2**64.
        out[start : start + count] = encoded.astype(out.dtype)
    return clipped


def decode(
    layout: VectorLayout, params: SecAggParams, total: RingArray
) -> dict[str, npt.NDArray[np.float64]]:
    """The sums, one float64 array for each segment, from the unmasked ring sum."""
    if total.dtype != ring_dtype(params.ring_bits) or total.shape != (layout.length,):
        raise malformed("the sum does not have the layout's length and type")
    spare = total.dtype.itemsize * 8 - params.ring_bits
    result = {}
    for plan in layout.plan(params):
        part = total[plan.start : plan.stop]
        # Up and back down as a signed number: reduces to ring_bits and extends the sign.
        signed = (part << part.dtype.type(spare)).view(f"i{part.dtype.itemsize}") >> spare
        result[plan.segment.name] = signed.astype(np.float64) / plan.scale
    return result


def pack(vector: RingArray, ring_bits: int) -> bytes:
    """``ring_bits / 8`` little-endian bytes a value; higher bits are dropped (the modulus)."""
    little = np.ascontiguousarray(vector, dtype=np.dtype(ring_dtype(ring_bits)).newbyteorder("<"))
    width, stored = ring_bits // 8, little.dtype.itemsize
    if width == stored:
        return little.tobytes()
    return little.view(np.uint8).reshape(-1, stored)[:, :width].tobytes()


def unpack(data: bytes | memoryview, length: int, ring_bits: int) -> RingArray:
    """The ``length`` elements that :func:`pack` wrote, perhaps read-only; checks the size."""
    width, dtype = ring_bits // 8, np.dtype(ring_dtype(ring_bits))
    if memoryview(data).nbytes != length * width:
        raise malformed(f"a vector does not have {length} values of {width} bytes")
    if width == dtype.itemsize:
        whole: RingArray = np.frombuffer(data, dtype=dtype.newbyteorder("<")).astype(
            dtype, copy=False
        )
        return whole
    wide = np.zeros((length, dtype.itemsize), dtype=np.uint8)
    wide[:, :width] = np.frombuffer(data, dtype=np.uint8).reshape(length, width)
    narrow: RingArray = wide.view(dtype.newbyteorder("<")).reshape(-1).astype(dtype, copy=False)
    return narrow


def _refuse(code: str, what: str) -> Refusal:
    return Refusal(
        f"secagg-{code}",
        f"{what}.",
        "Nothing was sent. Make the values fit the layout that the round's invitation names.",
    )

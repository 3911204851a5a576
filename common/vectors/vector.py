"""A hospital's task vector: what fine-tuning a base changed (arXiv 2408.13038, "data vector").

With it goes what the server may know, and nothing more: the bucket of the number of images, the
ε that training cost, figures that the hospital allows.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from common.federation_file import TIME, check_time
from common.vectors.base import is_floating
from common.vectors.errors import VectorError, malformed
from common.vectors.tensors import Arrays, digest

MAX_METRICS = 16
MAX_BUCKET = 1 << 40
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # as common.messages, without Flower
_METRIC = re.compile(r"[a-z][a-z0-9-]{0,39}")
_ID = re.compile(r"[0-9a-f]{64}")
_SERIAL = re.compile(r"[0-9a-f]{32}")
FIELDS = ("hospital", "base", "serial", "bucket", "epsilon", "delta", "metrics", "created")


def new_serial() -> str:
    """128 random bits (hex) from the operating system: nobody else's vector has them."""
    return secrets.token_hex(16)


def now() -> str:
    """This moment in UTC, as :data:`common.federation_file.TIME`."""
    return datetime.now(UTC).strftime(TIME)


def bucket_of(count: int) -> int:
    """The greatest power of two that is not above ``count`` images: the count is not told."""
    if count < 1:
        raise VectorError(
            "vector-bucket", f"a vector of {count} images was asked for", "train on some images"
        )
    return 1 << (int(count).bit_length() - 1)


def difference(fine_tuned: Arrays, base: Arrays) -> dict[str, np.ndarray]:
    """``fine_tuned`` − ``base``, float32, for the base's floating entries, by name.

    VectorError (``vector-shape``) if names or shapes differ.
    """
    check_shapes(
        {k: tuple(v.shape) for k, v in base.items()},
        {k: tuple(v.shape) for k, v in fine_tuned.items()},
    )
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            name: np.asarray(
                np.subtract(fine_tuned[name], base[name], dtype=np.float64), dtype=np.float32
            )
            for name in sorted(base)
            if is_floating(base[name])
        }


def norm_of(values: Arrays) -> float:
    """Euclidean norm over all entries, summed in float64 in the order of their names."""
    squares = (np.square(values[k], dtype=np.float64).sum() for k in sorted(values))
    return math.sqrt(math.fsum(map(float, squares)))


def check_shapes(
    template: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """VectorError (``vector-shape``) naming the first entry of ``shapes`` that does not fit."""
    for name in sorted({*template, *shapes}):
        if template.get(name) != shapes.get(name):
            raise VectorError(
                "vector-shape",
                f"entry '{name}' has shape {shapes.get(name)}, and the base {template.get(name)}",
                "fine-tune the base that the server publishes, with its model and width",
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskVector:
    """One hospital's vector. One that exists is well-formed; whether it fits, a base says.

    ``base``: id of the base that it was trained from. ``serial``: 128 random bits (hex) of the
    hospital's choosing; it tells a vector from every other one, so that none counts twice.
    ``values``: float32, names and shapes of the base's floating entries. ``bucket``: see
    :func:`bucket_of`. ``epsilon``, ``delta``: what training cost in privacy, None where it was
    not private. ``created``: UTC, :data:`common.federation_file.TIME`.

    Raises VectorError: ``vector-finite`` for NaN or infinity, ``vector-shape`` for values that
    are not float32, ``vector-format`` for any other field.
    """

    hospital: str
    base: str
    values: Arrays
    bucket: int
    serial: str = field(default_factory=new_serial)
    epsilon: float | None = None
    delta: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    created: str = field(default_factory=now)

    def __post_init__(self) -> None:
        _matches("hospital's name", _NAME, self.hospital)
        _matches("base", _ID, self.base)
        check_serial(self.serial)
        if type(self.bucket) is not int or not 0 < self.bucket <= MAX_BUCKET:
            raise malformed("its bucket is not a whole number from 1")
        if self.bucket & (self.bucket - 1):
            raise malformed("its bucket is not a power of two")
        self._check_privacy()
        self._check_metrics()
        try:
            check_time(self.created)
        except ValueError:
            raise malformed("its time is not YYYY-MM-DDTHH:MM:SSZ") from None
        for name, array in self.values.items():
            if array.dtype != np.dtype("<f4"):
                raise VectorError(
                    "vector-shape", f"entry '{name}' is {array.dtype}, not float32", "update"
                )
            if not np.isfinite(array).all():
                raise VectorError(
                    "vector-finite",
                    f"entry '{name}' of {self.hospital}'s vector holds NaN or infinity",
                    "fine-tune again with a lower learning rate",
                )

    def _check_privacy(self) -> None:
        pair = (self.epsilon, self.delta)
        if pair == (None, None):
            return
        if not all(type(v) is float and math.isfinite(v) and v >= 0 for v in pair):
            raise malformed("its epsilon and delta are not two finite numbers, nor both absent")
        if self.delta is not None and self.delta >= 1:
            raise malformed("its delta is not below 1")

    def _check_metrics(self) -> None:
        if len(self.metrics) > MAX_METRICS:
            raise malformed(f"it has more than {MAX_METRICS} metrics")
        for name, value in self.metrics.items():
            _matches("metric", _METRIC, name)
            if type(value) is not float or not math.isfinite(value):
                raise malformed(f"its metric '{name}' is not a finite number")

    def norm(self) -> float:
        """Euclidean norm of the values."""
        return norm_of(self.values)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the values."""
        return {k: tuple(v.shape) for k, v in self.values.items()}

    def fields_json(self) -> str:
        """Every field but the values, as canonical JSON."""
        told = {name: getattr(self, name) for name in FIELDS} | {"metrics": dict(self.metrics)}
        return json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)

    def values_digest(self) -> str:
        """SHA-256 (hex) over names, shapes and bytes of the values."""
        return digest("task vector values", [], self.values)


def check_serial(serial: object) -> None:
    """VectorError (``vector-format``) unless ``serial`` is 32 lower-case hexadecimal digits."""
    _matches("serial", _SERIAL, serial)


def check_hospital(name: object) -> None:
    """VectorError (``vector-format``) unless ``name`` is a hospital's."""
    _matches("hospital's name", _NAME, name)


def _matches(what: str, pattern: re.Pattern[str], value: object) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise malformed(f"its {what} is not of the right form")

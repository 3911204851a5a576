"""A published base: the weights that hospitals fine-tune, with an id that is their hash."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from common.files import atomic_write
from common.vectors.errors import VectorError, malformed
from common.vectors.tensors import LIMIT, Arrays, digest, pack, unpack

_FIELDS = {"consilium-base", "id", "version", "parent", "model", "pretrained"}
_VERSION = "1"


def base_id(model_digest: bytes, weights: Arrays) -> str:
    """SHA-256 (hex) over the model's digest and each entry's name, dtype, shape and bytes.

    ``model_digest``: of the ``ModelSpec`` that the weights belong to. The order of the entries
    does not matter; version and parent do not enter: equal models have equal ids.
    """
    return digest("base", [model_digest], weights)


@dataclass(frozen=True, kw_only=True, eq=False)
class Base:
    """A model that hospitals start from.

    ``version``: 0 for the first, then growing. ``parent``: the id of the base that it was made
    from, None for the first. ``pretrained``: False for a random initialisation, from which
    vectors cannot be merged (FedAvg can start there); a merged base has its parent's.
    Raises VectorError (``base-finite``) for NaN or infinity, ``vector-format`` for other types
    than numbers.
    """

    version: int
    parent: str | None
    model_digest: bytes
    weights: Arrays
    pretrained: bool

    def __post_init__(self) -> None:
        for name, array in self.weights.items():
            if is_floating(array) and not np.isfinite(array).all():
                raise VectorError(
                    "base-finite",
                    f"the base's entry '{name}' holds NaN or infinity",
                    "publish the last good model; lower the learning rate or the scale",
                )

    @cached_property
    def id(self) -> str:
        """64 hexadecimal digits: :func:`base_id` of the content."""
        return base_id(self.model_digest, self.weights)

    def template(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what a task vector must hold: the floating entries, by name."""
        weights = self.weights
        return {k: tuple(weights[k].shape) for k in sorted(weights) if is_floating(weights[k])}

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        return pack(
            self.weights,
            {
                "consilium-base": _VERSION,
                "id": self.id,
                "version": str(self.version),
                "parent": self.parent or "",
                "model": self.model_digest.hex(),
                "pretrained": "yes" if self.pretrained else "no",
            },
        )

    @classmethod
    def from_bytes(cls, data: bytes, *, limit: int = LIMIT) -> Base:
        """Read a base of at most ``limit`` bytes.

        VectorError: ``vector-format`` if malformed, ``base-id`` if the content is not that of
        the id that the file gives.
        """
        weights, told = unpack(data, limit=limit)
        if set(told) != _FIELDS or told["consilium-base"] != _VERSION:
            raise malformed("it is no base of this version")
        try:
            base = cls(
                version=int(told["version"]),
                parent=told["parent"] or None,
                model_digest=bytes.fromhex(told["model"]),
                weights=weights,
                pretrained=told["pretrained"] == "yes",
            )
        except ValueError:
            raise malformed("a field of the base is no number") from None
        if base.id != told["id"]:
            raise VectorError(
                "base-id",
                f"the content of base {told['id'][:16]} is not what its id stands for",
                "get the base anew from the server; do not train on this file",
            )
        if base.version < 0 or base.to_bytes() != data:
            raise malformed("a field of the base is not in its canonical form")
        return base

    def save(self, path: Path) -> None:
        """Write the base atomically."""
        atomic_write(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path, *, limit: int = LIMIT) -> Base:
        """Read a base from a file; VectorError as :meth:`from_bytes`, or ``base-file``."""
        return cls.from_bytes(read_file(path, limit), limit=limit)


def is_floating(array: np.ndarray) -> bool:
    """Whether an entry is trained: counters (of batch norm) are whole numbers, and are kept."""
    return bool(np.issubdtype(array.dtype, np.floating))


def apply_update(weights: Arrays, update: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``weights`` + ``update``, added in float64, each entry in its own dtype.

    What ``update`` lacks, and every entry that is not floating, stays as it is. VectorError
    (``merge-overflow``) if a sum does not fit into its entry's dtype.
    """
    made = {}
    for name in sorted(weights):
        entry = weights[name]
        if name not in update or not is_floating(entry):
            made[name] = entry.copy()
            continue
        with np.errstate(over="ignore"):
            total = np.asarray(entry.astype(np.float64) + update[name])
            made[name] = total.astype(entry.dtype)
        if not np.isfinite(made[name]).all():
            raise VectorError(
                "merge-overflow",
                f"the merged model's entry '{name}' does not fit into {entry.dtype}",
                "lower the scale; look for a vector of great norm and exclude it",
            )
    return made


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most ``limit``; VectorError (``base-file``) otherwise."""
    try:
        large = path.stat().st_size > limit
        data = b"" if large else path.read_bytes()
    except OSError as error:
        raise VectorError(
            "base-file", f"{path} cannot be read ({error.strerror or error})", "check the path"
        ) from None
    if large:
        raise malformed(f"{path.name} is larger than {limit} bytes")
    return data

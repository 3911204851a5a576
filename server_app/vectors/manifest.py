"""What an ensemble's folder says of itself, ``ensemble.json``: each field of its type and range.

A manifest may come from elsewhere, so it chooses no file's name and no size that would fill the
memory. Errors are VectorErrors (``ensemble-…``).
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config import BY_NAME
from common.model import ModelSpec
from common.parsing import parse_json
from common.vectors import VectorError
from common.vectors.vector import MAX_BUCKET, check_hospital, check_serial

LIMIT = 4 * 1024 * 1024
"""Most bytes of a manifest."""

_FORMAT = 1
_KEYS = {"version", "run", "base", "base-version", "model", "classes", "members"}
_ID = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"\.?[0-9a-f]{32}-[0-9a-f]{16}\.safetensors(\..+)?")


@dataclass(frozen=True)
class Member:
    """One model. ``weight``: its vector's bucket; ``epsilon``, ``delta``: what that cost, or None.

    ``digest``: SHA-256 (hex) of its file, which has ``size`` bytes. VectorError for fields that
    are not of this form (``vector-format``, ``ensemble-format``).
    """

    serial: str
    hospital: str
    weight: int
    epsilon: float | None
    delta: float | None
    size: int
    digest: str

    def __post_init__(self) -> None:
        check_serial(self.serial)
        check_hospital(self.hospital)
        whole = all(type(n) is int and n > 0 for n in (self.weight, self.size))
        if not whole or self.weight > MAX_BUCKET:
            raise malformed(f"weight or size of {self.serial} is no whole number from 1")
        for cost in (self.epsilon, self.delta):
            if cost is not None and not (type(cost) is float and math.isfinite(cost)):
                raise malformed(f"epsilon or delta of {self.serial} is no number")
        if not isinstance(self.digest, str) or not _ID.fullmatch(self.digest):
            raise malformed(f"the digest of {self.serial} is none")

    @property
    def file(self) -> str:
        """Its name in the folder."""
        return f"{self.serial}-{self.digest[:16]}.safetensors"


def is_member_file(name: str) -> bool:
    """Whether a file is some member's, or what a kill has left of one that was being written."""
    return _FILE.fullmatch(name) is not None


@dataclass(frozen=True)
class Manifest:
    """``base``, ``base_version``: what the vectors were trained from. ``members``: by serial.

    ``classes``: their names, in the order of the model's outputs.
    """

    run: str
    base: str
    base_version: int
    spec: ModelSpec
    classes: tuple[str, ...]
    members: tuple[Member, ...]

    def to_json(self) -> str:
        """The file's text."""
        told = {
            "version": _FORMAT, "run": self.run, "base": self.base,
            "base-version": self.base_version, "model": asdict(self.spec),
            "classes": list(self.classes), "members": [asdict(m) for m in self.members],
        }  # fmt: skip
        return json.dumps(told, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """From a file; VectorError (``ensemble-file``, ``ensemble-format``)."""
        try:
            told = parse_json(read_at_most(path, LIMIT))
        except ValueError:
            raise malformed("it is no JSON") from None
        if not isinstance(told, dict) or set(told) != _KEYS or told["version"] != _FORMAT:
            raise malformed("it is none of this version")
        try:
            spec = ModelSpec(**told["model"])
            members = tuple(Member(**m) for m in told["members"])
        except TypeError:
            raise malformed("its model or a member lacks a field, or has another") from None
        return cls(told["run"], told["base"], told["base-version"], spec,
                   _names(told["classes"]), members)  # fmt: skip

    def __post_init__(self) -> None:
        if not isinstance(self.run, str) or not isinstance(self.base, str):
            raise malformed("its run or base is no text")
        if not _ID.fullmatch(self.base):
            raise malformed("its base is no id")
        if type(self.base_version) is not int or self.base_version < 0:
            raise malformed("its base-version is no whole number from 0")
        if not _may_be_built(self.spec) or len(self.classes) != self.spec.num_classes:
            raise malformed("there is no such model, or the names of its classes are not as many")
        serials = [m.serial for m in self.members]
        if not serials or serials != sorted(set(serials)):
            raise malformed("its members are none, or not in the order of their serials")


def read_at_most(path: Path, limit: int) -> bytes:
    """A file's bytes, ``limit`` + 1 at most, so that a longer one shows. ``ensemble-file``."""
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise VectorError(
            "ensemble-file",
            f"{path} cannot be read ({error.strerror or error})",
            "check the path; `consilium vectors ensemble` makes the ensemble anew",
        ) from None


def malformed(what: str) -> VectorError:
    """The refusal (``ensemble-format``) of a manifest."""
    return VectorError(
        "ensemble-format",
        f"the ensemble's manifest is malformed: {what}",
        "make the ensemble anew, with the version of consilium that reads it",
    )


def _names(classes: Any) -> tuple[str, ...]:
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise malformed("its classes are no names")
    return tuple(classes)


def _may_be_built(spec: ModelSpec) -> bool:
    """Within what a run's configuration allows."""
    width, kinds = BY_NAME["model-width"], BY_NAME["model"].choices
    counts = all(type(n) is int and 0 < n <= 1 << 16 for n in (spec.num_classes, spec.channels))
    number = type(spec.width) in (int, float)
    return number and counts and width.low <= spec.width <= width.high and spec.model in kinds

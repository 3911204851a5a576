"""Where the first base comes from, and how a base is handed to hospitals that work offline.

A published base is two files: ``base.safetensors`` (:class:`common.vectors.Base`) and
``base.json``, which says of which run it is and with what configuration it is to be fine-tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config import Value
from common.errors import ConfigError
from common.files import read_json, write_json
from common.model import ModelSpec
from common.vectors import Base


@dataclass(frozen=True)
class BaseNote:
    """What goes with a base's file: ``run`` and ``config`` are empty for a pre-trained one."""

    run: str
    version: int
    base: str
    model: Mapping[str, Any]
    config: Mapping[str, Value]
    made_from: str

    @property
    def spec(self) -> ModelSpec:
        """The model's specification."""
        return ModelSpec(**self.model)


def write_base(path: Path, base: Base, spec: ModelSpec, *, run: str = "",
               config: Mapping[str, Value] | None = None, made_from: str = "") -> None:  # fmt: skip
    """Write a base, then its note beside it (``.json``)."""
    base.save(path)
    note = BaseNote(run, base.version, base.id, asdict(spec), dict(config or {}), made_from)
    write_json(path.with_suffix(".json"), {"version": 1, **_named(note)})


def read_base(path: Path) -> tuple[Base, BaseNote]:
    """A base and its note; ConfigError or VectorError if one is missing, malformed or another's."""
    base, told = Base.load(path), read_json(path.with_suffix(".json"))
    names = ("run", "base-version", "base", "model", "config", "made-from")
    if not isinstance(told, dict) or set(told) != {"version", *names} or told["version"] != 1:
        raise ConfigError(f"{path.with_suffix('.json')} is no base's note", "get both files anew")
    note = BaseNote(*(told[name] for name in names))
    try:
        fits = note.spec.digest() == base.model_digest and note.base == base.id
    except TypeError:
        fits = False
    if not fits or note.version != base.version:
        raise ConfigError(
            f"{path} and {path.with_suffix('.json')} are not of the same base",
            "get both files anew, together",
        )
    return base, note


def _named(note: BaseNote) -> dict[str, Any]:
    return {
        "run": note.run, "base-version": note.version, "base": note.base,
        "model": dict(note.model), "config": dict(note.config), "made-from": note.made_from,
    }  # fmt: skip

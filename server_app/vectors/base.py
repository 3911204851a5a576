"""Where the first base comes from, and how a base is handed to hospitals that work offline.

A published base is two files: ``base.safetensors`` (:class:`common.vectors.Base`) and
``base.json``, which says of which run it is and with what configuration it is to be fine-tuned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from common.config import RunConfig, Value
from common.errors import ConfigError, ModelError, ProtocolError
from common.files import read_json, write_json
from common.messages import check_run_id
from common.model import ModelSpec, build, check_weights, get_weights
from common.vectors import Base, VectorError
from server_app.run_store import runs_directory


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


def first_base(config: RunConfig, spec: ModelSpec) -> Base:
    """What training starts from, in either mode: the base that ``config`` names.

    A base's file, any other .safetensors of the model, a run's best model, or random weights.
    ConfigError or ModelError if it is none of this model.
    """
    fresh = get_weights(build(spec, seed=config.seed))
    if not config.base:
        return _base(spec, fresh, pretrained=False)
    path = Path(config.base).expanduser()
    if not path.is_file():
        path = _of_run(config.base)
    try:
        made = Base.load(path)
    except VectorError:
        try:
            made = _base(spec, dict(load_file(path)), pretrained=True)
        except (OSError, SafetensorError, VectorError) as error:
            raise ModelError(f"{path} is no model: {error}", "give a .safetensors file") from None
    check_weights({k: tuple(v.shape) for k, v in fresh.items()}, made.weights)
    if made.model_digest != spec.digest():
        raise ConfigError(
            f"the base {path} is of another model than the run's ({spec})",
            "set model and model-width to the base's, and use data of the same classes",
        )
    return made


def is_file(base: str) -> bool:
    """Whether the key ``base`` names a file, which may have been trained on public images."""
    return bool(base) and Path(base).expanduser().is_file()


def _base(spec: ModelSpec, weights: Mapping[str, np.ndarray], *, pretrained: bool) -> Base:
    return Base(version=0, parent=None, model_digest=spec.digest(), weights=weights,
                pretrained=pretrained)  # fmt: skip


def _of_run(run: str) -> Path:
    try:
        directory = runs_directory() / check_run_id(run)
        for name in ("best.safetensors", "model.safetensors"):
            if (directory / name).is_file():
                return directory / name
    except ProtocolError:  # it cannot be a run's id: a path, then
        pass
    raise ConfigError(
        f"'base' is {run!r}, which is neither a file nor a run with a model",
        "give the absolute path of a .safetensors file, or a finished run's id",
    )

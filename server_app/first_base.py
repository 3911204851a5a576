"""What training starts from, in rounds and with task vectors: the run config's ``base``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common.config import RunConfig
from common.errors import ConfigError, ModelError, ProtocolError
from common.messages import check_run_id
from common.model import ModelSpec, build, check_weights, get_weights
from common.prior.model import on_prior
from common.prior.train import is_prior, load_prior
from common.tensors import load_tensors
from common.vectors import Base, VectorError
from server_app.run_store import runs_directory


def first_base(config: RunConfig, spec: ModelSpec) -> Base:
    """The base that ``config`` names.

    A base's file, any other .safetensors of the model, a run's best model, or random weights; for
    ``model=prior-head`` also a prior's file (`consilium prior`), with a head of zeros.
    ConfigError or ModelError if it is none of this model.
    """
    fresh = get_weights(build(spec, seed=config.seed))
    if not config.base:
        return _base(spec, fresh, pretrained=False)
    path = Path(config.base).expanduser()
    if not path.is_file():
        path = _of_run(config.base)
    if spec.model == "prior-head" and is_prior(path):
        return _base(spec, on_prior(fresh, load_prior(path)), pretrained=True)
    try:
        made = Base.load(path)
    except VectorError:
        try:
            kept = load_tensors(path)  # a published model's matrices may be in half precision
            weights = {n: a.astype(fresh[n].dtype) if n in fresh else a for n, a in kept.items()}
            made = _base(spec, weights, pretrained=True)
        except (OSError, ValueError, VectorError) as error:
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

"""Measure a model file on a data file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from common.config import BY_NAME, RunConfig
from common.datasets import SPLITS, load_npz
from common.errors import ConfigError, ModelError
from common.files import read_json
from common.model import ModelSpec
from server_app.evaluation import Evaluator


def spec_of(weights: dict[str, np.ndarray]) -> ModelSpec:
    """The specification of a model from its weights alone; ModelError if they are of none.

    Of a network that its weights do not tell (``resnet18``, options such as standardised filters)
    the run's config.json is needed: :func:`evaluate_file` looks for it beside the model.
    """
    if "head.weight" not in weights:
        raise ModelError("the file holds no model of consilium", "give a run's .safetensors file")
    classes, features = weights["head.weight"].shape
    if "matrix" in weights:
        return ModelSpec(
            model="prior-head",
            width=0.25,
            num_classes=classes,
            channels=3,
            hidden_units=features if "hidden.weight" in weights else 0,
        )
    first = "stem.0.weight" if "stem.0.weight" in weights else "conv1.0.weight"
    if first not in weights:
        raise ModelError("the file holds no model of consilium", "give a run's .safetensors file")
    return ModelSpec(
        model="dpresnet" if first.startswith("stem") else "resnet9",
        width=features / 512,
        num_classes=classes,
        channels=weights[first].shape[1],
    )


def _told(model: Path) -> ModelSpec | None:
    """What the run's configuration beside a model says that it is; None without one."""
    path = model.parent / "config.json"
    if not path.is_file():
        return None
    values = {k: v for k, v in read_json(path).items() if k in BY_NAME}
    tensors = load_file(model)
    first = next((a for a in tensors.values() if a.ndim == 4), None)
    return ModelSpec.of(
        RunConfig.parse(values | {"recipe": ""}),
        num_classes=len(tensors["head.weight"]),
        channels=3 if first is None else int(first.shape[1]),
    )


def evaluate_file(model: Path, data: Path, split: str = "test") -> dict[str, Any]:
    """All figures of ``model`` on one split of ``data``, JSON-ready, with both files' identity."""
    if split not in SPLITS:
        raise ConfigError(f"there is no split '{split}'", f"use one of: {', '.join(SPLITS)}")
    try:
        weights = dict(load_file(model))
    except (OSError, SafetensorError) as e:
        raise ModelError(f"{model} cannot be read: {e}", "give a .safetensors file") from None
    dataset = load_npz(data)
    spec = _told(model) or spec_of(weights)
    if spec.num_classes != dataset.num_classes or spec.channels != dataset.channels:
        raise ModelError(
            f"{model} tells {spec.num_classes} classes apart in {spec.channels}-channel images; "
            f"{data} has {dataset.num_classes} classes and {dataset.channels} channels",
            "evaluate on data of the kind that the model was trained on",
        )
    evaluator = Evaluator(spec, getattr(dataset, split), dataset.class_names)
    return {
        "model": str(model), "data": str(data), "data_sha256": dataset.sha256, "split": split,
        **evaluator(weights),
    }  # fmt: skip

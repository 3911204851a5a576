"""Measure a model file on a data file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from common.config import RunConfig
from common.datasets import SPLITS, load_npz
from common.errors import ConfigError, ModelError
from common.files import read_json
from common.model import ModelSpec
from common.tensors import load_tensors
from server_app.evaluation import Evaluator


def spec_of(weights: dict[str, np.ndarray]) -> ModelSpec:
    """The specification of a model from its weights alone; ModelError if they are of none.

    Of a network that its weights do not tell (``resnet18``, options such as standardised filters)
    the run's config.json is needed, or a NAME.model.json: :func:`evaluate_file` looks beside
    the model.
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


MODEL_KEYS = ("model", "model-width", "residual-norm", "weight-standardisation", "hidden-units",
              "test-views", "precision")  # fmt: skip
"""Of a run config: what a model is, and how the run measured it."""


def beside(model: Path) -> Path:
    """Where the model keys of a file stand that lies outside its run's folder."""
    return model.with_name(f"{model.stem}.model.json")


def _told(model: Path, weights: dict[str, np.ndarray]) -> tuple[ModelSpec, RunConfig] | None:
    """What stands beside a model, of its run or of itself; None without it."""
    path = next((p for p in (beside(model), model.parent / "config.json") if p.is_file()), None)
    if path is None or "head.weight" not in weights:
        return None
    values = {k: v for k, v in read_json(path).items() if k in MODEL_KEYS}
    config = RunConfig.parse(values | {"privacy": "none", "allow-random-base": True})
    # A file's entries are in the alphabet's order; the first convolution has the fewest inputs.
    inputs = [int(a.shape[1]) for a in weights.values() if a.ndim == 4]
    channels = 3 if config.model == "prior-head" else min(inputs, default=3)
    classes = len(weights["head.weight"])
    return ModelSpec.of(config, num_classes=classes, channels=channels), config


def evaluate_file(model: Path, data: Path, split: str = "test") -> dict[str, Any]:
    """All figures of ``model`` on one split of ``data``, JSON-ready, with both files' identity.

    Measured as its run did (views, precision) where what stands beside the model tells it.
    """
    if split not in SPLITS:
        raise ConfigError(f"there is no split '{split}'", f"use one of: {', '.join(SPLITS)}")
    try:
        weights = load_tensors(model)
    except (OSError, ValueError) as e:
        raise ModelError(f"{model} cannot be read: {e}", "give a .safetensors file") from None
    dataset = load_npz(data)
    told = _told(model, weights)
    spec, config = told or (spec_of(weights), RunConfig.parse({}))
    if spec.num_classes != dataset.num_classes or spec.channels != dataset.channels:
        raise ModelError(
            f"{model} tells {spec.num_classes} classes apart in {spec.channels}-channel images; "
            f"{data} has {dataset.num_classes} classes and {dataset.channels} channels",
            "evaluate on data of the kind that the model was trained on",
        )
    evaluator = Evaluator(spec, getattr(dataset, split), dataset.class_names,
                          views=config.test_views, precision=config.precision)  # fmt: skip
    return {
        "model": str(model), "data": str(data), "data_sha256": dataset.sha256, "split": split,
        **evaluator(weights),
    }  # fmt: skip

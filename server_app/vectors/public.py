"""Public images at the server: what bases are pre-trained on, and what candidates are judged by.

They are the ``val`` split of the data set (simulation) or of the coordinator's ``test-data``. A
base may have been pre-trained on them, and then looks better on them than anything that is merged
later: so pre-training leaves a quarter out, always the same one, and a run whose base is a file
judges by that quarter alone. The hospitals' own images have no part in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from common.config import RunConfig
from common.datasets import ImageSet, load_npz, split_train_val
from common.errors import ConfigError
from common.evaluation import evaluate
from common.model import ModelSpec, build
from common.simulation import load_dataset
from common.training import to_tensor
from server_app.first_base import is_file

HELD_OUT = 0.25
"""Share of the public images that pre-training never sees."""
_SEED = 0


def public_split(val: ImageSet) -> tuple[ImageSet, ImageSet]:
    """(for pre-training, held out to judge by): the same for the same images, everywhere."""
    return split_train_val(val, HELD_OUT, _SEED)


def judging_images(config: RunConfig) -> ImageSet | None:
    """The public images that a run's candidates are judged by; None if it has none."""
    if config.dataset != "hospitals":
        val = load_dataset(config).val
    elif config.test_data:
        val = load_npz(Path(config.test_data), class_names=config.class_names).val
        shape = (config.image_size, config.image_size, config.channels)
        if val.images.shape[1:] != shape:
            raise ConfigError(
                f"the images of test-data are {val.images.shape[1:]}, those of the run {shape}",
                "set image-size and channels to what the federation agreed on",
            )
    else:
        return None
    return public_split(val)[1] if is_file(config.base) else val


class Judge:
    """Accuracy of models on public images."""

    def __init__(self, spec: ModelSpec, images: ImageSet, *, threads: int = 1) -> None:
        self._model = build(spec)
        self._images, self._labels = to_tensor(images.images), torch.from_numpy(images.labels)
        self._threads = threads
        self.count = len(images.labels)

    def __call__(self, weights: Mapping[str, np.ndarray]) -> float:
        """From 0 to 1."""
        found = evaluate(self._model, weights, self._images, self._labels, threads=self._threads)
        return found.correct / found.examples

"""A first base, trained by the coordinator on public images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.config import RunConfig, Value
from common.datasets import Dataset, ImageSet, load_npz
from common.errors import ConfigError
from common.model import ModelSpec, Weights, build, get_weights
from common.prior.fitting import FOLDS, fit_prior
from common.prior.model import PriorHead
from common.simulation import load_dataset
from common.training import TrainSettings, to_tensor, train
from common.vectors import Base
from server_app.first_base import first_base
from server_app.vectors.base import write_base
from server_app.vectors.public import Judge, public_split

PHASES = ((0.6, 1.0), (0.25, 0.3), (0.15, 0.1))
"""(share of the epochs, factor on the learning rate): smaller steps towards the end."""


@dataclass(frozen=True)
class Pretrained:
    """What came of it: ``accuracy`` on the ``held_out`` images that no base is trained on."""

    base: Base
    images: int
    held_out: int
    accuracy: float
    source: str


def pretrain(
    values: Mapping[str, Value], out: Path, epochs: int, say: Callable[[str], None]
) -> Pretrained:
    """Train on the public images of ``values`` (run-config keys) and write the base to ``out``.

    They are the ``val`` split of the data set or of ``test-data``, less the quarter by which runs
    judge. Nothing is private here: the images must be public. With ``model=prior-head`` mean,
    whitening and head are fitted on the prior that ``base`` names, and ``epochs`` is not used.
    ConfigError where there are no public images, and for a head that is not linear.
    """
    head = values.get("model") == "prior-head"
    # A recipe for a head may ask for whitening, which is of private rounds; none are run here.
    how = {"privacy": "local", "server-step": True} if head else {"privacy": "none"}
    config = RunConfig.parse({**values, **how, "mode": "fedavg"})
    if config.hidden_units:
        raise ConfigError(
            f"the head that is fitted to public images is linear, and hidden-units is "
            f"{config.hidden_units}",
            "leave hidden-units out",
        )
    dataset = _public(config)
    images, held_out = public_split(dataset.val)
    spec = ModelSpec.of(config, num_classes=dataset.num_classes, channels=dataset.channels)
    judge = Judge(spec, held_out, threads=config.threads)
    say(f"{len(images)} public images ({dataset.source}), {len(held_out)} held out to judge by")
    if head:
        weights = _fitted(spec, config, images, say)
    else:
        weights = _descended(spec, config, images, epochs, judge, say)
    base = Base(
        version=0, parent=None, model_digest=spec.digest(), weights=weights, pretrained=True
    )
    write_base(out, base, spec, made_from=f"{len(images)} public images: {dataset.source}")
    return Pretrained(base, len(images), len(held_out), judge(weights), dataset.source)


def _fitted(
    spec: ModelSpec, config: RunConfig, images: ImageSet, say: Callable[[str], None]
) -> Weights:
    """On the prior that the key ``base`` names."""
    model, start = build(spec), first_base(config, spec).weights
    assert isinstance(model, PriorHead)
    labels = torch.from_numpy(images.labels)
    weights, decay = fit_prior(model, start, to_tensor(images.images), labels)
    say(f"mean, whitening and head fitted; weight decay {decay:g} by {FOLDS}-fold validation")
    return weights


def _descended(
    spec: ModelSpec, config: RunConfig, images: ImageSet, epochs: int, judge: Judge,
    say: Callable[[str], None],
) -> Weights:  # fmt: skip
    weights = get_weights(build(spec, seed=config.seed))
    for number, (share, factor) in enumerate(PHASES):
        part = max(1, round(share * epochs))
        weights = _trained(spec, weights, images, config, part, factor, number)
        say(f"{part} epochs at {factor * config.learning_rate:.2g}: {100 * judge(weights):.1f} %")
    return weights


def _public(config: RunConfig) -> Dataset:
    if config.dataset != "hospitals":
        return load_dataset(config)
    if not config.test_data:
        raise ConfigError(
            "there are no public images: dataset is 'hospitals', and test-data is empty",
            "give --data, an npz file of public images of the same classes",
        )
    return load_npz(Path(config.test_data), class_names=config.class_names)


def _trained(
    spec: ModelSpec, start: Weights, images: ImageSet, config: RunConfig, epochs: int,
    factor: float, number: int,
) -> Weights:  # fmt: skip
    settings = TrainSettings(
        epochs=epochs, batch_size=config.batch_size, threads=config.threads,
        learning_rate=factor * config.learning_rate, optimizer=config.optimizer,
        views=config.augmentation_multiplicity,
    )  # fmt: skip
    labels = torch.from_numpy(images.labels)
    model = build(spec)
    train(model, start, to_tensor(images.images), labels, settings,
          seed=int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0]))  # fmt: skip
    return get_weights(model)

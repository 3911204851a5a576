"""A hospital's part of a server step: which clipped sum a round asks for, and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from client_app.hospital import Hospital
from client_app.private import PrivateRun
from common.config import RunConfig
from common.devices import use_threads
from common.errors import ConfigError
from common.messages import Job
from common.model import ModelSpec, build_for, set_weights
from common.prior.kept import centred_features, features_of, head_alone
from common.prior.model import PriorHead
from common.privacy.clipped_sum import clipped_sum
from common.privacy.distributed import NoiseShares
from common.privacy.ledger import TRAINING
from common.privacy.plan import MEAN, shares_of
from common.privacy.randomness import SecureRandom
from common.privacy.statistics import NORM, statistic_length, statistic_sum


@dataclass(frozen=True)
class Sum:
    """A sum over the training images that may leave once, with its noise."""

    mechanism: str
    """As the ledger enters it: a step's gradient, or a statistic of the features."""
    shares: NoiseShares
    sampling_rate: float
    """q: of a statistic 1."""
    compute: Callable[[], Tensor]
    """(d,) float64: clipped by privacy unit, private until the noise is added."""


def sum_of(run: PrivateRun, spec: ModelSpec, job: Job) -> Sum:
    """What ``job``'s round sums, by the run's own plan: no request can ask for another sum."""
    promise, model = run.plan.promise, build_for(run.hospital.config, spec)
    statistic = promise.statistic_of(job.round)
    if statistic is None:
        dimension = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Sum(
            TRAINING,
            shares_of(promise, run.plan.noise_multiplier, dimension),
            run.plan.sampling_rate,
            lambda: _gradient(run, model, job),
        )
    if not isinstance(model, PriorHead):
        raise ConfigError(
            f"the run whitens features, and model '{spec.model}' has none",
            "ask the coordinator for model=prior-head, or whitening=false",
        )
    length = statistic_length(statistic, model.features.spec.dimension)
    return Sum(
        statistic,
        shares_of(promise, run.plan.statistics[statistic], length, clipping_norm=NORM),
        1.0,
        lambda: _statistic(run, model, job, statistic),
    )


def kept_features(hospital: Hospital) -> Path:
    """Where a hospital keeps its pictures' features: in its own home, for its owner only."""
    return hospital.home / "features"


def _gradient(run: PrivateRun, model: nn.Module, job: Job) -> Tensor:
    config, part = _ready(run), run.data.train
    network, weights, inputs = head_alone(
        model, job.model, part.images, kept_features(run.hospital)
    )
    return clipped_sum(
        network,
        weights,
        inputs,
        part.labels,
        sampling_rate=run.plan.sampling_rate,
        clipping_norm=run.plan.promise.clipping_norm,
        random=SecureRandom(),
        units=part.shared_units(config.privacy_unit),
        views=config.augmentation_multiplicity,
        clipping=config.clipping,
        precision=config.precision,
        device=config.device,
        expected_batch_size=run.plan.train_count * run.plan.sampling_rate,
    )


def _statistic(run: PrivateRun, model: PriorHead, job: Job, name: str) -> Tensor:
    config, part = _ready(run), run.data.train
    set_weights(model, job.model)
    of = features_of if name == MEAN else centred_features
    features = of(model, part.images, kept_features(run.hospital))
    return statistic_sum(name, features, part.shared_units(config.privacy_unit))


def _ready(run: PrivateRun) -> RunConfig:
    use_threads(run.hospital.config.threads)
    return run.hospital.config

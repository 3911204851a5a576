"""What goes into a securely aggregated vector: the same at the server and at every hospital.

A hospital builds the layout and the parameters from the run config and compares them with the
server's invitation: a round cannot ask for another scale, weight or segment than the run began
with, and no two hospitals of a round can have been told different run configs. The run config
itself is the coordinator's; a hospital's limits on it are its policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from common.config import RunConfig, config_digest
from common.errors import ConfigError
from common.secagg import (
    WEIGHT,
    RoundTerms,
    SecAggParams,
    Segment,
    VectorLayout,
    update_layout,
)

if TYPE_CHECKING:
    from common.privacy.distributed import NoiseShares

TRAIN = "train"
VALIDATE = "validate"
JUDGE = "judge"
"""Purpose of an exchange in which hospitals compare a candidate with the current base."""

GAINED, LOST = "gained", "lost"
"""Validation images that only the candidate gets right, and that only the current base does."""
MOST_CANDIDATES = 16
"""Candidates that hospitals compare with one base: each sum tells a little more of them."""

GRADIENT = "gradient"
"""The segment of a server step: a clipped sum with noise, in multiples of the noise's grid."""

LARGEST_LOSS = 20.0
"""Cross-entropy of one image above which its share of a loss sum is clipped (e^-20 ~ 2e-9)."""


def params_for(config: RunConfig, cohort: int) -> SecAggParams:
    """The protocol's parameters for ``cohort`` hospitals asked.

    Raises ConfigError when the cohort can never work: fewer hospitals than min-cohort, or fewer
    than num-shares.
    """
    if cohort < config.min_cohort:
        raise ConfigError(
            f"secure aggregation over {cohort} hospitals: at least {config.min_cohort} are needed "
            f"(min-cohort; reconstruction-threshold {config.reconstruction_threshold})",
            "ask more hospitals; or, where you accept that less is hidden, lower "
            "reconstruction-threshold, num-shares and min-cohort together (3 is the floor), or "
            "set secagg=false and let the server see every update",
        )
    if config.num_shares > cohort:
        raise ConfigError(
            f"num-shares {config.num_shares} exceeds the {cohort} hospitals asked: there are not "
            "so many holders",
            f"set num-shares={cohort}",
        )
    params = SecAggParams(
        num_shares=config.num_shares,
        reconstruction_threshold=config.reconstruction_threshold,
        min_cohort=config.min_cohort,
        max_cohort=cohort,
        ring_bits=config.ring_bits,
    )
    params.validate()
    return params


def layout_for(purpose: str, length: int, config: RunConfig, *, grid: float = 0.0) -> VectorLayout:
    """The vector's segments; ``length``: number of weights in an update (0 to validate only).

    ``grid``: where a round is a server step, the step γ of its noise's grid. It is in the layout,
    so hospitals that would add multiples of another γ refuse.

    ``weight`` is the number of training images; the metrics are sums over images, so that sums
    over hospitals give the means. Under differential privacy numbers and sums carry noise, the
    validation sums may lie a little beyond what is possible, and no training loss is told.

    A comparison of two models (``JUDGE``) sums two counts and no more. What a hospital has, and how
    many it gets right by each, would be in the next base's sum as well, over other hospitals, and
    could be subtracted; these two counts belong to one pair of models, and decide by themselves.
    """
    most = config.max_examples
    if purpose == JUDGE:
        names = (GAINED, LOST)
        return VectorLayout(
            tuple(Segment(name=n, length=1, bound=most, kind="integer") for n in names), 1
        )
    private = config.privacy != "none"
    validation = (
        Segment(name="val-examples", length=1, bound=most, kind="integer"),
        Segment(name="val-correct", length=1, bound=2 * most, kind="real")
        if private
        else Segment(name="val-correct", length=1, bound=most, kind="integer"),
        Segment(name="val-loss-sum", length=1, bound=LARGEST_LOSS * most),
    )
    if purpose == VALIDATE:
        return VectorLayout(validation, 1)
    train_loss = Segment(name="train-loss-sum", length=1, bound=LARGEST_LOSS * most)
    metrics = validation if private else (train_loss, *validation)
    if config.server_step:
        gradient = Segment(name=GRADIENT, length=length, bound=1.0, kind="modular", step=grid)
        weight = Segment(name=WEIGHT, length=1, bound=most, kind="integer")
        return VectorLayout((gradient, weight, *metrics), most)
    return update_layout(length, bound=config.update_range, max_weight=most, metrics=metrics)


def terms_for(
    config: RunConfig, shares: NoiseShares | None = None, *, sampling_rate: float = 0.0
) -> RoundTerms:
    """What decides, beside the layout, how the vectors of a round of this run are made.

    ``shares``: the noise of a server step's sum, of units that are sampled at ``sampling_rate``.
    """
    if shares is None:
        return RoundTerms(config=config_digest(config))
    return RoundTerms(
        config=config_digest(config),
        noise_multiplier=shares.noise_multiplier,
        clipping_norm=shares.clipping_norm,
        sampling_rate=sampling_rate,
    )


def flatten(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The floating-point entries, in their order, as one float32 vector.

    Counters (batch norm's) are left out: their mean means nothing, and no output depends on it.
    """
    parts = [a.reshape(-1) for a in arrays.values() if np.issubdtype(a.dtype, np.floating)]
    return np.concatenate(parts).astype(np.float32, copy=False)


def flat_length(template: Mapping[str, np.ndarray]) -> int:
    """Length of :func:`flatten` of a model's weights."""
    return sum(a.size for a in template.values() if np.issubdtype(a.dtype, np.floating))


def unflatten(vector: np.ndarray, template: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """:func:`flatten` undone, in ``vector``'s dtype; zeros for the entries that were left out."""
    arrays, start = {}, 0
    for name, like in template.items():
        if np.issubdtype(like.dtype, np.floating):
            arrays[name] = vector[start : start + like.size].reshape(like.shape)
            start += like.size
        else:
            arrays[name] = np.zeros(like.shape)
    return arrays

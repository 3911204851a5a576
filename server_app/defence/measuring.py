"""From a round's outcome to the figures that the defence judges."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from common.config import RunConfig
from common.privacy.plan import Promise, validation_noise
from server_app.defence.figures import Validated, of_sums
from server_app.defence.sums import Measured
from server_app.rounds import Outcome
from server_app.server_step import ServerStep


def measured(outcome: Outcome, round: int, step: ServerStep | None) -> Measured:
    """One opened sum. Of a server step, whose noise is known, with that noise."""
    examples = outcome.sums["examples"]
    noise = 0.0
    if step is None:
        assert outcome.mean_update is not None
        arrays: Sequence[np.ndarray] = list(outcome.mean_update.values())
    else:
        assert outcome.total is not None
        divisor = max(examples, 1.0)
        if not step.is_statistic(round):
            divisor *= step.config.sampling_rate
        arrays = [outcome.total / divisor]
        noise = step.shares(round).std * math.sqrt(len(outcome.contributed)) / divisor
    squares = sum(float(np.sum(np.square(a, dtype=np.float64))) for a in arrays)
    return Measured(
        members=tuple(outcome.contributed),
        weight=examples,
        norm=math.sqrt(squares),
        largest=max((float(np.abs(a).max()) for a in arrays if a.size), default=0.0),
        noise=noise,
        length=sum(a.size for a in arrays),
    )


def validated(outcome: Outcome, config: RunConfig) -> Validated | str | None:
    """The hospitals' figures of the model that a round started from; see :func:`of_sums`."""
    noise = 0.0
    if config.privacy != "none" and outcome.sums.get("val-examples"):
        noise = validation_noise(Promise.of(config))
    return of_sums(outcome.sums, noise=noise, hospitals=max(len(outcome.contributed), 1))

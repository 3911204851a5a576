"""An exponential moving average of a model's weights over rounds.

Averaging evens out the noise of private steps, and costs no privacy: it is made of
weights that are public already (De et al. 2022, *Unlocking High-Accuracy Differentially Private
Image Classification through Scale*, on parameter averaging).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from common.errors import ConfigError
from common.model import Weights, check_weights


def decay_at(decay: float, averaged: int) -> float:
    """min(decay, (1 + t) / (10 + t)), where t = ``averaged`` weights went in before.

    The usual warm-up: without it the average would stay near its start for 1 / (1 − decay)
    rounds. ConfigError for a decay outside [0, 1) or a negative t.
    """
    if not (0.0 <= decay < 1.0 and averaged >= 0):
        raise ConfigError(
            f"no moving average has the decay {decay} after {averaged} weights",
            "use a decay from 0 (the latest weights alone) to below 1, such as 0.9",
        )
    return min(decay, (1 + averaged) / (10 + averaged))


def moving_average(
    average: Mapping[str, np.ndarray],
    latest: Mapping[str, np.ndarray],
    *,
    decay: float,
    averaged: int,
) -> Weights:
    """d·``average`` + (1 − d)·``latest`` with d = ``decay_at(decay, averaged)``, in new arrays.

    Begin with ``average`` = the weights before the first round and ``averaged`` = 0. Computed in
    float64; each entry of the result has the type and shape of ``latest``'s. What is not floating
    point (batch norm's counters) is taken from ``latest``. ModelError for weights that do not
    fit each other or are not finite; neither is changed.
    """
    d = decay_at(decay, averaged)
    shapes = {name: tuple(values.shape) for name, values in latest.items()}
    check_weights(shapes, latest)
    check_weights(shapes, average)
    result: Weights = {}
    for name, new in latest.items():
        if np.issubdtype(new.dtype, np.floating):
            mixed = d * average[name].astype(np.float64) + (1.0 - d) * new.astype(np.float64)
            result[name] = np.asarray(mixed, dtype=new.dtype)  # scalars become arrays again
        else:
            result[name] = new.copy()
    return result

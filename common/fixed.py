"""The entries of a model that rounds do not move, in groups that are sent and kept by digest.

A group is a part of the model (the first component of its entries' names): a prior's features stay
for good, while its mean and whitening are released by a run's first rounds.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from common.model import Weights, weights_digest


def groups_of(fixed: Mapping[str, np.ndarray]) -> dict[str, Weights]:
    """Digest (:func:`~common.model.weights_digest`) → the entries of one part of the model."""
    parts: dict[str, Weights] = {}
    for name, array in fixed.items():
        parts.setdefault(name.split(".")[0], {})[name] = array
    return {weights_digest(entries): entries for entries in parts.values()}

"""Sums over features that a run releases once: their mean and second moment, clipped by unit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.errors import PrivacyError
from common.fixed_shape import padded
from common.privacy.batches import PoissonBatches
from common.privacy.clipping import add_clipped, unit_sums
from common.privacy.plan import MEAN, STATISTICS
from common.privacy.randomness import SecureRandom

NORM = 1.0
"""Largest L2 norm of one privacy unit's part of a statistic."""
_AT_ONCE = 64
"""Images whose second moments are held at once, each d (d + 1) / 2 numbers of float32: always so
many, filled up with zeros (:mod:`common.fixed_shape`). The sum is as long, in float64."""


def statistic_length(name: str, dimension: int) -> int:
    """Coordinates of a statistic of features in ``dimension`` coordinates."""
    _check(name)
    return dimension if name == MEAN else dimension * (dimension + 1) // 2


def statistic_sum(name: str, features: Tensor, units: Tensor | None = None) -> Tensor:
    """Σ over all privacy units of their part, clipped to :data:`NORM`: float64, no noise yet.

    ``features`` (N, d) float32. ``feature-mean``: (d,), a unit's part is the sum of its images'
    features. ``feature-second-moment``: (d (d + 1) / 2,), the upper triangle of Σ φ φᵀ, what is off
    the diagonal times √2, so that a part's norm is that of the whole matrix (‖φ‖² for one image).
    ``units`` as in :func:`common.training.train`. A unit whose part is not finite counts as none.
    """
    d = features.shape[1]
    total = torch.zeros(statistic_length(name, d), dtype=torch.float64)
    parts = PoissonBatches(
        features, torch.zeros(len(features), dtype=torch.int64), sampling_rate=1.0, steps=1,
        expected_batch_size=1.0, random=SecureRandom(), units=units, most_images=_AT_ONCE,
    )  # fmt: skip
    unfinished: Tensor | None = None
    for part in parts:
        whole = padded(part.images, _AT_ONCE)
        rows = whole if name == MEAN else _packed_squares(whole)
        if part.units is not None and len(part.units):
            rows = padded(unit_sums(rows[: len(part.units)], part.units), _AT_ONCE)
        if unfinished is not None:  # of the one unit that this part goes on with
            rows = rows + unfinished
        unfinished = None if part.finished else rows
        if part.finished:
            add_clipped([total], [rows], NORM)  # zeros add zeros
    return total


def _packed_squares(features: Tensor) -> Tensor:
    d = features.shape[1]
    rows, columns = torch.triu_indices(d, d)
    scale = torch.where(rows == columns, 1.0, math.sqrt(2)).to(features)
    return features[:, rows] * features[:, columns] * scale


def _check(name: str) -> None:
    if name not in STATISTICS:
        raise PrivacyError(f"'{name}' is no statistic", f"use one of: {', '.join(STATISTICS)}")

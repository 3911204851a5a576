"""Statistics of features: what one privacy unit can move, and what they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.prior.whitening import moment_matrix
from common.privacy.plan import MEAN, SECOND_MOMENT, STATISTICS
from common.privacy.statistics import NORM, statistic_length, statistic_sum


def features(n: int, d: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(STATISTICS), st.integers(2, 20), st.integers(1, 9), st.integers(0, 99),
    st.sampled_from([1e-3, 0.3, 1.0, 1e6]), st.booleans(),
)  # fmt: skip
def test_one_unit_more_moves_a_statistic_by_at_most_its_norm(
    name: str, n: int, d: int, seed: int, scale: float, patients: bool
) -> None:
    x = features(n, d, seed, scale)
    units = torch.arange(n) // 3 if patients else None
    kept = torch.arange(n) > 0 if units is None else units > 0
    if not bool(kept.any()):
        return
    fewer = statistic_sum(name, x[kept], None if units is None else units[kept])
    moved = statistic_sum(name, x, units) - fewer
    assert float(moved.norm()) <= NORM
    assert moved.shape == (statistic_length(name, d),)


def test_of_features_of_norm_one_they_are_the_plain_sums() -> None:
    x = torch.nn.functional.normalize(features(700, 12, 0), dim=1)  # three parts of a batch
    mean = statistic_sum(MEAN, x)
    np.testing.assert_allclose(mean, x.double().sum(0), atol=2e-2)
    square = moment_matrix(statistic_sum(SECOND_MOMENT, x), 12)
    np.testing.assert_allclose(square, x.double().T @ x.double(), atol=2e-2)


def test_a_unit_that_is_larger_than_a_part_is_clipped_as_a_whole() -> None:
    x = features(600, 5, 1)
    total = statistic_sum(MEAN, x, torch.zeros(600, dtype=torch.int64))
    expected = x.double().sum(0) / x.double().sum(0).norm()
    np.testing.assert_allclose(total, expected, atol=1e-4)


def test_a_unit_that_is_not_finite_counts_as_none() -> None:
    x = features(4, 3, 2)
    x[1, 1] = torch.nan
    np.testing.assert_allclose(statistic_sum(MEAN, x), statistic_sum(MEAN, x[[0, 2, 3]]))


def test_an_unknown_statistic_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no statistic"):
        statistic_sum("median", features(2, 2, 0))

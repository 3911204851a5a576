"""Partitions: each image exactly once, minima honoured, groups whole, the paper's sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import PartitionError
from common.partition import SCHEMES, partition


def check(parts: list[np.ndarray], total: int, hospitals: int, min_size: int) -> None:
    """Assert what every partition guarantees."""
    assert len(parts) == hospitals
    assert sorted(np.concatenate(parts).tolist()) == list(range(total))
    for part in parts:
        assert part.dtype == np.int64
        assert len(part) >= min_size
        assert (np.diff(part) > 0).all()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=200),
    st.integers(1, 12),
    st.sampled_from(SCHEMES),
    st.floats(0.05, 100),
    st.integers(1, 20),
    st.integers(-3, 2**40),
)
def test_partition_properties(
    labels: list[int], hospitals: int, scheme: str, alpha: float, min_size: int, seed: int
) -> None:
    """Exactly once, sorted, the minimum honoured or refused, the same again."""

    def divide() -> list[np.ndarray]:
        return partition(labels, hospitals, scheme, alpha=alpha, min_size=min_size, seed=seed)

    if hospitals * min_size > len(labels):
        with pytest.raises(PartitionError, match="too few"):
            divide()
        return
    try:
        parts = divide()
    except PartitionError:
        assert scheme == "dirichlet"  # the others can always honour a possible minimum
        return
    check(parts, len(labels), hospitals, min_size)
    for one, other in zip(parts, divide(), strict=True):
        assert np.array_equal(one, other)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 30)), min_size=1, max_size=150),
    st.integers(1, 6),
    st.sampled_from(SCHEMES),
    st.integers(0, 99),
)
def test_groups_stay_together(
    rows: list[tuple[int, int]], hospitals: int, scheme: str, seed: int
) -> None:
    """No patient is in two hospitals; where groups are too coarse the partition is refused."""
    labels, groups = [r[0] for r in rows], np.array([r[1] for r in rows])
    try:
        parts = partition(labels, hospitals, scheme, seed=seed, groups=groups, alpha=1.0)
    except PartitionError:
        return
    check(parts, len(rows), hospitals, 1)
    homes = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, homes)) == len(set(groups.tolist()))


@pytest.mark.parametrize("seed", range(20))
def test_paper_sizes(seed: int) -> None:
    """Ten hospitals on BloodMNIST's 11,959 images: 761 to 1631 in the paper."""
    labels = np.arange(11959) % 8
    parts = partition(labels, 10, "size-skew", seed=seed)
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 595
    assert max(sizes) <= 1796
    assert max(sizes) - min(sizes) > 200
    for first in range(0, 10, 2):
        assert sizes[first] + sizes[first + 1] in (2391, 2392)
    # Skewed in size only: each hospital sees each class about equally.
    for part in parts:
        shares = np.bincount(labels[part], minlength=8) / len(part)
        assert np.abs(shares - 0.125).max() < 0.07


def test_odd_hospital_is_in_no_pair() -> None:
    """Of five the last one keeps its slice."""
    for seed in range(10):
        sizes = [len(p) for p in partition(np.zeros(100, int), 5, "size-skew", seed=seed)]
        assert sizes[4] == 20
        assert sizes[0] + sizes[1] == sizes[2] + sizes[3] == 40


def test_size_skew_honours_the_minimum_first() -> None:
    """With the minimum at the slice's size nothing moves."""
    parts = partition(np.zeros(100, int), 4, "size-skew", min_size=25, seed=1)
    assert [len(part) for part in parts] == [25] * 4


def test_iid_is_even() -> None:
    """Sizes differ by one at most, whatever the order of classes."""
    labels = np.repeat(np.arange(8), 130)
    parts = partition(labels, 7, "iid", seed=5)
    assert {len(part) for part in parts} <= {148, 149}
    assert all((np.bincount(labels[part], minlength=8) > 5).all() for part in parts)


def test_dirichlet_alpha_sets_the_skew() -> None:
    """A small alpha concentrates classes, a large one does not."""
    labels = np.arange(8000) % 8

    def dominance(alpha: float) -> float:
        parts = partition(labels, 5, "dirichlet", alpha=alpha, seed=2, min_size=10)
        return float(np.mean([np.bincount(labels[p]).max() / len(p) for p in parts]))

    assert dominance(0.1) > 0.4
    assert dominance(1000.0) < 0.16


@pytest.mark.parametrize("scheme", SCHEMES)
def test_seeds_differ(scheme: str) -> None:
    """Another seed is another partition."""
    labels = np.arange(400) % 4
    one, two = partition(labels, 4, scheme, seed=1), partition(labels, 4, scheme, seed=2)
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"scheme": "pathological"}, "no partition scheme"),
        ({"num_hospitals": 0}, "0 hospitals"),
        ({"min_size": 0}, "at least 0"),
        ({"num_hospitals": 11}, "too few"),
        ({"labels": []}, "no images"),
        ({"labels": [0.5, 1.0]}, "labels are float64"),
        ({"labels": [[0, 1]]}, "labels are int64"),
        ({"labels": [0, -1, 2]}, "negative"),
        ({"groups": [1, 2]}, "groups"),
        ({"groups": []}, "0 groups"),
        ({"scheme": "dirichlet", "alpha": 0.0}, "alpha is 0"),
        ({"scheme": "dirichlet", "alpha": float("nan")}, "alpha is nan"),
        ({"scheme": "iid", "groups": [1] * 10}, "0 image"),
    ],
)
def test_impossible_arguments(arguments: dict[str, Any], complaint: str) -> None:
    """Each with its own message and a remedy."""
    given_all: dict[str, Any] = {"labels": [0, 1] * 5, "num_hospitals": 2, "scheme": "iid"}
    given_all |= arguments
    with pytest.raises(PartitionError, match=complaint) as caught:
        partition(
            given_all.pop("labels"),
            given_all.pop("num_hospitals"),
            given_all.pop("scheme"),
            **given_all,
        )
    assert caught.value.remedy


def test_dirichlet_refuses_after_bounded_tries() -> None:
    """One class, a tiny alpha and a high minimum cannot be met: the remedies are named."""
    with pytest.raises(PartitionError, match="minimum is 20") as caught:
        partition(np.zeros(100, int), 4, "dirichlet", alpha=0.01, min_size=20)
    assert "larger alpha" in caught.value.remedy

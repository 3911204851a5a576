"""Training and validation: by group, stratified, deterministic, never empty."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.datasets import ImageSet, split_train_val
from common.datasets.splitting import make_units, split_three
from common.errors import DataError


def image_set(labels: list[int], groups: list[int] | None = None) -> ImageSet:
    """Return images that carry their number in two pixels."""
    n = len(labels)
    images = np.zeros((n, 1, 2, 1), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(n) % 256
    images[:, 0, 1, 0] = np.arange(n) // 256
    array = np.array(labels, dtype=np.int64)
    if groups is None:
        return ImageSet(images, array)
    return ImageSet(images, array, np.array(groups, dtype=np.int64))


def numbers(images: ImageSet) -> list[int]:
    """Return the numbers that the images carry."""
    flat = images.images.reshape(len(images), 2).astype(int)
    return [int(a + 256 * b) for a, b in flat]


pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=2, max_size=120)


@settings(max_examples=100, deadline=None)
@given(pairs, st.floats(0.01, 0.99), st.integers(-5, 2**40))
def test_split_properties(rows: list[tuple[int, int]], fraction: float, seed: int) -> None:
    """Exactly once, no group on both sides, neither side empty, the same again."""
    whole = image_set([r[0] for r in rows], [r[1] for r in rows])
    if len({r[1] for r in rows}) < 2:
        with pytest.raises(DataError):
            split_train_val(whole, fraction, seed)
        return
    train, val = split_train_val(whole, fraction, seed)
    assert sorted(numbers(train) + numbers(val)) == list(range(len(rows)))
    assert not set(train.groups.tolist()) & set(val.groups.tolist())
    assert len(train)
    assert len(val)
    again = split_train_val(whole, fraction, seed)
    assert numbers(again[0]) == numbers(train)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=25, max_size=300), st.integers(0, 99))
def test_stratified_without_groups(labels: list[int], seed: int) -> None:
    """Each class gives its fraction to within one image, and keeps one for training."""
    whole = image_set(labels)
    train, val = split_train_val(whole, 0.2, seed)
    counts, held = whole.class_counts(5), val.class_counts(5)
    assert (np.abs(held - counts * 0.2) <= 1).all()
    assert (train.class_counts(5)[counts > 0] >= 1).all()


def test_seeds_differ() -> None:
    """Another seed divides otherwise, at the same size."""
    whole = image_set([0, 1] * 50)
    first, second = split_train_val(whole, 0.2, 1)[1], split_train_val(whole, 0.2, 2)[1]
    assert len(first) == len(second) == 20
    assert numbers(first) != numbers(second)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_impossible_fraction(fraction: float) -> None:
    """A fraction is strictly between 0 and 1."""
    with pytest.raises(DataError, match="fraction"):
        split_train_val(image_set([0, 1, 0]), fraction)


def test_too_few_groups() -> None:
    """One patient, one image or none cannot be divided."""
    for whole in (image_set([0, 1, 0], [5, 5, 5]), image_set([0]), image_set([])):
        with pytest.raises(DataError, match="cannot be divided"):
            split_train_val(whole)


def test_units_take_the_most_frequent_class() -> None:
    """Ties go to the lowest class."""
    units = make_units(np.array([2, 1, 1, 0, 3, 0]), np.array([7, 7, 7, 9, 9, 1]))
    assert units.labels.tolist() == [0, 1, 0]
    assert [m.tolist() for m in units.members] == [[5], [0, 1, 2], [3, 4]]


def test_three_way_split_of_small_classes() -> None:
    """One image: train; two: train and test; three: everywhere."""
    labels = np.array([0, 1, 1, 2, 2, 2])
    keys = [f"{i:02d}" for i in range(6)]
    train, val, test = split_three(labels, np.arange(6), keys)
    assert labels[train].tolist() == [0, 1, 2]
    assert labels[val].tolist() == [2]
    assert labels[test].tolist() == [1, 2]

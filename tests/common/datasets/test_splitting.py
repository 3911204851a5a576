"""Training and validation: by group, stratified, deterministic, never empty."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.datasets import ImageSet, UInt8Array, split_independently, split_train_val
from common.datasets.identity import patient_digests
from common.datasets.splitting import make_units, split_three
from common.errors import DataError

Row = tuple[bytes, bytes, int]


def image_set(labels: list[int], groups: list[int] | None = None) -> ImageSet:
    """Return images that carry their number in two pixels; no two are each other's mirror image."""
    n = len(labels)
    images = np.full((n, 1, 3, 1), 255, dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(n) % 256
    images[:, 0, 1, 0] = np.arange(n) // 256
    array = np.array(labels, dtype=np.int64)
    if groups is None:
        return ImageSet(images, array)
    return ImageSet(images, array, np.array(groups, dtype=np.int64))


def numbers(images: ImageSet) -> list[int]:
    """Return the numbers that the images carry."""
    flat = images.images.reshape(len(images), 3).astype(int)
    return [int(a + 256 * b) for a, b, _ in flat]


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


def keys(digests: UInt8Array) -> set[bytes]:
    """Return the rows that are not zero."""
    return {row.tobytes() for row in digests if row.any()}


rows_of = st.tuples(
    st.integers(0, 3),  # label
    st.integers(0, 20),  # which picture
    st.integers(0, 7),  # how it is turned
    st.one_of(st.none(), st.integers(0, 9)),  # patient
    st.integers(0, 15),  # group
)


@settings(max_examples=100, deadline=None)
@given(st.lists(rows_of, min_size=2, max_size=60), st.floats(0.05, 0.95), st.booleans())
def test_no_patient_group_or_picture_is_on_both_sides(
    rows: list[tuple[int, int, int, int | None, int]], fraction: float, grouped: bool
) -> None:
    """Whatever the source says of groups: copies, turned copies and patients stay together."""
    originals = np.random.default_rng(0).integers(0, 256, (21, 4, 4, 3), dtype=np.uint8)
    turned = [np.rot90(originals[p][:, :: 1 - t // 4 * 2], t % 4) for _, p, t, _, _ in rows]
    whole = ImageSet(
        np.stack(turned),
        np.array([row[0] for row in rows], dtype=np.int64),
        np.array([row[4] for row in rows if grouped], dtype=np.int64),
        patient_digests("" if row[3] is None else str(row[3]) for row in rows),
    )
    if len(np.unique(whole.linked())) < 2:
        with pytest.raises(DataError, match="cannot be divided"):
            split_train_val(whole, fraction)
        return
    train, val = split_train_val(whole, fraction)
    assert len(train) + len(val) == len(rows)
    assert not keys(train.digests) & keys(val.digests)
    assert not keys(train.patients) & keys(val.patients)
    assert not set(train.groups.tolist()) & set(val.groups.tolist())


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=3, max_size=150),
    st.integers(0, 4),
    st.sampled_from([0.1, 0.2, 0.5, 0.8]),
    st.integers(0, 99),
)
def test_a_further_picture_moves_two_others_at_most(
    labels: list[int], label: int, fraction: float, seed: int
) -> None:
    """Pictures keep their side from one version of the data to the next."""
    before = split_train_val(image_set(labels), fraction, seed)[1]
    after = split_train_val(image_set([*labels, label]), fraction, seed)[1]
    assert len((set(numbers(before)) ^ set(numbers(after))) - {len(labels)}) <= 2


def test_a_growing_set_keeps_its_split() -> None:
    """From 100 to 200 pictures, one by one: four in five old ones never move at all."""
    labels = np.random.default_rng(0).integers(0, 4, 200).tolist()
    sides = [
        set(numbers(split_train_val(image_set(labels[:n]))[1])) & set(range(100))
        for n in range(100, 201)
    ]
    steady = sum(len({number in side for side in sides}) == 1 for number in range(100))
    assert steady >= 80


def test_a_further_picture_of_a_patient_moves_few_other_patients() -> None:
    """On average less than one picture in three hundred changes sides."""
    rng = np.random.default_rng(0)
    moved = 0
    for seed in range(50):
        whose = np.repeat(np.arange(60), rng.geometric(0.2, 60))
        n = len(whose)
        extra = int(rng.integers(60))
        sets = []
        for patients in (whose, np.append(whose, extra)):
            plain = image_set((patients % 4).tolist())
            known = patient_digests(str(p) for p in patients)
            sets.append(ImageSet(plain.images, plain.labels, patients=known))
        vals = [set(numbers(split_train_val(whole, 0.2, seed)[1])) for whole in sets]
        moved += len((vals[0] ^ vals[1]) - {n})
    assert moved / 50 <= 1.0


def test_order_and_other_images_do_not_decide_the_side() -> None:
    """Shuffled images fall as before."""
    whole = image_set([0, 1, 2] * 40)
    order = np.random.default_rng(0).permutation(120)
    val = split_train_val(whole)[1]
    assert sorted(numbers(split_train_val(whole.subset(order))[1])) == numbers(val)


def test_a_patient_too_large_for_validation_does_not_keep_out_smaller_ones() -> None:
    """Every class is validated where it has patients small enough."""
    groups = [0] * 30 + list(range(1, 31))
    for seed in range(10):
        train, val = split_train_val(image_set([0] * 60, groups), 0.2, seed)
        assert len(val) == 12
        assert 0 in train.groups


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
    ranks = [b"%02d" % i for i in range(6)]
    train, val, test = split_three(labels, np.arange(6), ranks)
    assert labels[train].tolist() == [0, 1, 2]
    assert labels[val].tolist() == [2]
    assert labels[test].tolist() == [1, 2]


def sides_of(images: ImageSet, seed: int, *, by_patient: bool) -> tuple[list[Row], list[Row]]:
    """The rows (picture, patient, label) of both sides, in order; none if all were to validate."""
    try:
        parts = split_independently(images, 0.3, seed, by_patient=by_patient)
    except DataError:
        parts = (images.subset([]), images)
    train, val = (
        [
            (digest.tobytes(), patient.tobytes(), int(label))
            for digest, patient, label in zip(part.digests, part.patients, part.labels, strict=True)
        ]
        for part in parts
    )
    return train, val


@given(seed=st.integers(0, 2**32), size=st.integers(1, 60), extra=st.integers(1, 4))
def test_a_picture_more_moves_no_other_where_each_goes_by_itself(
    seed: int, size: int, extra: int
) -> None:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (size + extra, 4, 4, 1), dtype=np.uint8)
    labels = rng.integers(0, 3, size + extra)
    more = ImageSet(pictures, labels)
    fewer = more.subset(np.arange(size))
    for by_patient in (False, True):
        (train, val), (train_more, val_more) = (
            sides_of(images, seed, by_patient=by_patient) for images in (fewer, more)
        )
        assert set(train) <= set(train_more)
        assert set(val) <= set(val_more)


PICTURES = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
held = st.lists(
    st.tuples(st.integers(0, 11), st.integers(0, 7), st.integers(0, 9), st.integers(0, 2)),
    min_size=1,
    max_size=40,
)
"""(picture, how it is turned, patient, label): patients hold many of each other's pictures."""


def of_patients(rows: list[tuple[int, int, int, int]]) -> ImageSet:
    """As a hospital's folder yields them: with groups that join whoever shares a picture."""
    turned = [np.rot90(PICTURES[p][:, :: 1 - t // 4 * 2], t % 4) for p, t, _, _ in rows]
    pixels = np.stack(turned) if rows else np.empty((0, 4, 4, 3), np.uint8)
    plain = ImageSet(
        pixels,
        np.array([row[3] for row in rows], dtype=np.int64),
        patients=patient_digests(str(row[2]) for row in rows),
    )
    return replace(plain, groups=plain.linked())


@settings(max_examples=200, deadline=None)
@given(held, st.integers(0, 9), st.integers(0, 99))
def test_a_patient_more_or_less_changes_nothing_about_another_patient(
    rows: list[tuple[int, int, int, int]], patient: int, seed: int
) -> None:
    """Neither a side nor which pictures are used, whoever holds copies of whose pictures."""
    others = [row for row in rows if row[2] != patient]
    gone = patient_digests([str(patient)])[0].tobytes()
    everyone = sides_of(of_patients(rows), seed, by_patient=True)
    without = sides_of(of_patients(others), seed, by_patient=True)
    for before, after in zip(everyone, without, strict=True):
        assert [row for row in before if row[1] != gone] == after
    assert not {row[1] for row in everyone[0]} & {row[1] for row in everyone[1]}


@settings(max_examples=200, deadline=None)
@given(held, st.integers(0, 11), st.integers(0, 99))
def test_a_picture_more_or_less_changes_nothing_about_another_picture(
    rows: list[tuple[int, int, int, int]], picture: int, seed: int
) -> None:
    """Where the unit is the picture: whoever holds it, all of its rows are on one side."""
    others = [row for row in rows if row[0] != picture]
    gone = of_patients([(picture, 0, 0, 0)]).digests[0].tobytes()
    everyone = sides_of(of_patients(rows), seed, by_patient=False)
    without = sides_of(of_patients(others), seed, by_patient=False)
    for before, after in zip(everyone, without, strict=True):
        assert [row for row in before if row[0] != gone] == after
    assert not {row[0] for row in everyone[0]} & {row[0] for row in everyone[1]}


def test_where_each_goes_by_itself_about_the_fraction_is_validated() -> None:
    rng = np.random.default_rng(0)
    many = ImageSet(rng.integers(0, 256, (4000, 4, 4, 1), dtype=np.uint8), np.zeros(4000, np.int64))
    _, val = split_independently(many, 0.2, 1)
    assert 700 < len(val) < 900


def test_a_side_may_be_empty_where_each_goes_by_itself_but_something_is_trained_on() -> None:
    """Whoever was put there to fill it would go back when another one comes."""
    one, refused = image_set([0]), 0
    for seed in range(40):
        try:
            train, val = split_independently(one, 0.2, seed)
        except DataError:
            refused += 1
            continue
        assert (len(train), len(val)) == (1, 0)
    assert 0 < refused < 40
    with pytest.raises(DataError, match="none is left"):
        split_independently(image_set([]))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_impossible_fraction_where_each_goes_by_itself(fraction: float) -> None:
    with pytest.raises(DataError, match="fraction"):
        split_independently(image_set([0, 1, 0]), fraction)

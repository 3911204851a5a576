"""ImageSet and Dataset: what they guarantee and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from common.datasets import Dataset, ImageSet
from common.datasets.identity import patient_digests
from common.errors import DataError


def image_set(n: int, channels: int = 3, size: int = 4) -> ImageSet:
    """Return n images whose first pixel is their number."""
    images = np.zeros((n, size, size, channels), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(n)
    return ImageSet(images, np.arange(n, dtype=np.int64) % 2)


def test_groups_default_to_one_an_image() -> None:
    """Without groups every image is its own."""
    assert image_set(5).groups.tolist() == [0, 1, 2, 3, 4]
    assert len(image_set(0)) == 0


def test_subset_keeps_order_labels_and_groups() -> None:
    """A subset is in the order asked for, and independent of the original."""
    whole = image_set(6)
    part = whole.subset([5, 0, 3])
    assert part.images[:, 0, 0, 0].tolist() == [5, 0, 3]
    assert part.labels.tolist() == [1, 0, 1]
    assert part.groups.tolist() == [5, 0, 3]
    part.images[0] = 99
    assert whole.images[5, 0, 0, 0] == 5
    assert len(whole.subset([])) == 0


def with_patients(*whose: str) -> ImageSet:
    """Return an image of each of these patients ("": unknown)."""
    plain = image_set(len(whose))
    return ImageSet(plain.images, plain.labels, patients=patient_digests(whose))


def test_digests_are_computed_on_first_use_and_kept() -> None:
    """Not before, not twice, and a subset made afterwards does not compute them again."""
    whole = image_set(6)
    assert "digests" not in vars(whole)
    assert whole.subset([1]).known_digests is None
    digests = whole.digests
    assert digests.dtype == np.uint8
    assert digests.shape == (6, 16)
    assert whole.digests is digests
    assert len(np.unique(digests, axis=0)) == 6
    part = whole.subset([4, 2])
    assert part.known_digests is not None
    assert np.array_equal(part.digests, digests[[4, 2]])
    assert np.array_equal(image_set(6).subset([4, 2]).digests, digests[[4, 2]])
    assert image_set(0).digests.shape == (0, 16)


def test_known_digests_stand_for_the_originals() -> None:
    """A source that saw the full picture is believed, through subsets."""
    known = np.arange(48, dtype=np.uint8).reshape(3, 16)
    plain = image_set(3)
    whole = ImageSet(plain.images, plain.labels, known_digests=known)
    assert np.array_equal(whole.digests, known)
    assert np.array_equal(whole.subset([2, 0]).digests, known[[2, 0]])


def test_has_patients_only_if_every_image_has_one() -> None:
    """None, some, all, and no image at all."""
    assert with_patients("x", "y", "x").has_patients
    assert not with_patients("x", "", "x").has_patients
    assert not image_set(3).has_patients
    assert not image_set(0).has_patients
    assert not with_patients("x").subset([]).has_patients
    assert with_patients("x", "", "y").subset([2, 0]).has_patients
    assert image_set(3).patients.shape == (3, 16)


def test_units_are_patients_whatever_pictures_they_share() -> None:
    """Numbers run from 0 without a gap, in order of first appearance."""
    whole = with_patients("x", "y", "x", "z", "y")
    units = whole.units()
    assert units.dtype == np.int64
    assert units.tolist() == [0, 1, 0, 2, 1]
    whole.images[3] = whole.images[2]  # z's picture is one of x's, too
    shared = ImageSet(whole.images, whole.labels, patients=whole.patients)
    assert shared.units().tolist() == [0, 1, 0, 2, 1]
    assert shared.linked().tolist() == [0, 1, 0, 0, 1]  # a split keeps the copies together
    assert shared.subset([1, 3, 4, 0]).units().tolist() == [0, 1, 0, 2]


def test_units_are_refused_where_a_patient_is_unknown() -> None:
    """A promise to patients needs to know whose pictures they are."""
    for images, who in ((with_patients("x", ""), "1 of 2"), (image_set(3), "3 of 3")):
        with pytest.raises(DataError, match=f"unknown for {who}") as caught:
            images.units()
        assert "manifest.csv" in caught.value.remedy
    with pytest.raises(DataError, match="0 of 0"):
        image_set(0).units()


@pytest.mark.parametrize("shape", [(2, 16), (3, 15), (3,)])
@pytest.mark.parametrize("name", ["patients", "known_digests"])
def test_impossible_identities_are_refused(name: str, shape: tuple[int, ...]) -> None:
    """One row of sixteen bytes for each image."""
    plain = image_set(3)
    fields: dict[str, Any] = {name: np.ones(shape, dtype=np.uint8)}
    with pytest.raises(DataError, match="for 3 images"):
        ImageSet(plain.images, plain.labels, **fields)
    fields = {name: np.ones((3, 16), dtype=np.int64)}
    with pytest.raises(DataError, match="int64"):
        ImageSet(plain.images, plain.labels, **fields)


@pytest.mark.parametrize("indices", [[6], [-1], [0.5], [[0, 1]], np.ones(6, dtype=bool)])
def test_subset_refuses_what_is_no_index(indices: Any) -> None:
    """Negative numbers and masks would silently pick other images."""
    with pytest.raises(DataError):
        image_set(6).subset(indices)


def test_class_counts() -> None:
    """Counts cover absent classes; a label beyond the number of classes is an error."""
    counts = image_set(5).class_counts(4)
    assert counts.tolist() == [3, 2, 0, 0]
    assert counts.dtype == np.int64
    with pytest.raises(DataError, match="1 classes"):
        image_set(5).class_counts(1)


@pytest.mark.parametrize(
    ("images", "labels", "groups"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, np.int64), None),
        (np.zeros((2, 4, 4, 2), np.uint8), np.zeros(2, np.int64), None),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int64), None),
        (np.zeros((2, 0, 4, 1), np.uint8), np.zeros(2, np.int64), None),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int64), None),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32), None),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, -1]), None),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64), np.zeros(3, np.int64)),
    ],
)
def test_impossible_image_sets_are_refused(images: Any, labels: Any, groups: Any) -> None:
    """Each of the class's guarantees is checked."""
    with pytest.raises(DataError):
        ImageSet(images, labels) if groups is None else ImageSet(images, labels, groups)


def dataset(**changes: Any) -> Dataset:
    """Return a small valid data set with some fields changed."""
    fields: dict[str, Any] = {
        "name": "x",
        "source": "a test",
        "sha256": "00",
        "class_names": ("a", "b"),
        "train": image_set(4),
        "val": image_set(2),
        "test": image_set(2),
    }
    return Dataset(**(fields | changes))


def test_describe_is_json() -> None:
    """The account survives JSON unchanged."""
    account = dataset(notes=("n",)).describe()
    assert json.loads(json.dumps(account)) == account
    assert account["splits"]["train"] == {"images": 4, "groups": 4, "per_class": {"a": 2, "b": 2}}
    assert account["image_shape"] == [4, 4, 3]
    assert dataset().channels == 3
    assert dataset().num_classes == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"val": image_set(0)},
        {"test": image_set(2, channels=1)},
        {"val": image_set(2, size=5)},
        {"class_names": ("a",)},
        {"class_names": ("a", "a")},
    ],
)
def test_impossible_datasets_are_refused(changes: dict[str, Any]) -> None:
    """Empty splits, differing shapes and nameless labels are errors."""
    with pytest.raises(DataError):
        dataset(**changes)


def test_unknown_split() -> None:
    """A split is train, val or test."""
    with pytest.raises(DataError, match="holdout"):
        dataset().split("holdout")


def test_import_is_light() -> None:
    """Key stages import this package: no torch, Flower, Pillow or medmnist may come along."""
    code = (
        "import sys, common.datasets, common.partition; "
        "heavy = {'torch', 'flwr', 'PIL', 'pooch', 'medmnist', 'sklearn', 'requests'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

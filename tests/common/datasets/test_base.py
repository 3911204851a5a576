"""ImageSet and Dataset: what they guarantee and what they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from common.datasets import Dataset, ImageSet
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

"""load and load_cached: dispatch, refusals, and a cache that notices changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common.datasets import dataset_names, load, load_cached
from common.errors import DataError
from tests.common.datasets.test_folder import classes, picture
from tests.common.datasets.test_npz import write


def test_dispatch(tmp_path: Path) -> None:
    """Each source by its name."""
    assert load("synthetic", synthetic_size=96, image_size=14).image_shape == (14, 14, 3)
    assert load("npz", str(write(tmp_path / "x.npz")), image_size=5).num_classes == 3
    assert load("folder", str(classes(tmp_path / "f")), image_size=6).image_shape == (6, 6, 3)
    assert dataset_names()[:3] == ("synthetic", "npz", "folder")


@pytest.mark.parametrize("dataset", ["", "mnist", "NPZ"])
def test_unknown_names_list_the_valid_ones(dataset: str) -> None:
    """The remedy is complete."""
    with pytest.raises(DataError, match="There is no data set") as caught:
        load(dataset)
    for name in dataset_names():
        assert name in caught.value.remedy


def test_path_and_source_must_fit(tmp_path: Path) -> None:
    """A path too few and a path too many are errors; so is another image size."""
    for dataset in ("npz", "folder"):
        with pytest.raises(DataError, match="data-path is empty"):
            load(dataset)
    for dataset in ("synthetic", "bloodmnist"):
        with pytest.raises(DataError, match="takes no path"):
            load(dataset, "somewhere")
        with pytest.raises(DataError, match="takes no path"):
            load_cached(dataset, "somewhere")
    with pytest.raises(DataError, match="5 x 5, but image-size is 28") as caught:
        load("npz", str(write(tmp_path / "x.npz")))
    assert caught.value.remedy == "Set image-size=5."


def test_cache_returns_the_same_until_something_changes(tmp_path: Path) -> None:
    """Files are compared by size and time of change, folders by all their files."""
    assert load_cached("synthetic", synthetic_size=96) is load_cached(
        "synthetic", synthetic_size=96
    )
    path = write(tmp_path / "x.npz")
    first = load_cached("npz", str(path), image_size=5)
    assert load_cached("npz", str(path), image_size=5) is first
    os.utime(path, ns=(1, 1))
    assert load_cached("npz", str(path), image_size=5) is not first
    root = classes(tmp_path / "f")
    folder = load_cached("folder", str(root))
    assert load_cached("folder", str(root)) is folder
    picture(root / "a" / "new.png", 77)
    assert len(load_cached("folder", str(root)).train.images) > 0
    assert load_cached("folder", str(root)) is not folder


def test_cache_errors_are_loads_errors(tmp_path: Path) -> None:
    """A missing file is reported as such."""
    with pytest.raises(DataError, match="There is no file"):
        load_cached("npz", str(tmp_path / "none.npz"))
    with pytest.raises(DataError, match="There is no data set"):
        load_cached("mnist")

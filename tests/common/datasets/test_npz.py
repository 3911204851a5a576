"""Files in MedMNIST's form: what is read, and each way in which a file can be wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.datasets import load_npz, patient_digest
from common.errors import DataError

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "bloodmnist_rebuilt.npz"


def write(path: Path, *, classes: int = 3, **changes: Any) -> Path:
    """Write a small valid file with some keys changed (None: left out)."""
    arrays: dict[str, Any] = {}
    for split, n in (("train", 12), ("val", 6), ("test", 6)):
        n = max(n, classes)
        arrays[f"{split}_images"] = np.full((n, 5, 5, 3), 7, dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % classes).astype(np.uint8)[:, None]
    arrays |= changes
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_reads_labels_of_both_shapes(tmp_path: Path) -> None:
    """(N, 1) and (N,) labels come out as int64 (N,); the digest is the file's."""
    path = write(tmp_path / "x.npz", val_labels=np.array([0, 1, 2, 0, 1, 2], np.int32))
    data = load_npz(path)
    assert data.train.labels.tolist() == [0, 1, 2] * 4
    assert data.val.labels.tolist() == [0, 1, 2] * 2
    assert data.class_names == ("class 0", "class 1", "class 2")
    assert data.image_shape == (5, 5, 3)
    assert data.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert data.source == "npz file x.npz"


def test_grey_images_get_a_channel_axis(tmp_path: Path) -> None:
    """(N, H, W) becomes (N, H, W, 1)."""
    grey: dict[str, Any] = {
        f"{s}_images": np.zeros((n, 5, 5), np.uint8)
        for s, n in (("train", 12), ("val", 6), ("test", 6))
    }
    assert load_npz(write(tmp_path / "x.npz", **grey)).channels == 1


def test_blood_names(tmp_path: Path) -> None:
    """Eight classes and blood in the name: MedMNIST's names; else numbers."""
    names = load_npz(write(tmp_path / "my_Blood.npz", classes=8)).class_names
    assert names[0] == "basophil"
    assert names[3] == "immature granulocytes"
    assert load_npz(write(tmp_path / "blood.npz", classes=7)).class_names[0] == "class 0"
    assert load_npz(write(tmp_path / "cells.npz", classes=8)).class_names[0] == "class 0"


def test_stored_class_names_and_groups(tmp_path: Path) -> None:
    """Names and patients may be stored; a patient in two splits is noted."""
    path = write(
        tmp_path / "x.npz",
        class_names=np.array(["a", "b", "c", "d"]),
        train_groups=np.repeat([1, 2, 3, 4], 3),
        val_groups=np.full(6, 4),
        test_groups=np.full(6, 9),
    )
    data = load_npz(path)
    assert data.class_names == ("a", "b", "c", "d")
    assert data.train.groups.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert any("train has no image of: d" in note for note in data.notes)
    assert any("1 group(s) occur in more than one split" in note for note in data.notes)
    assert data.train.has_patients
    assert data.train.patients[0].tobytes() == patient_digest("1")
    assert np.array_equal(data.train.patients[-1], data.val.patients[0])
    assert data.train.units().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    # All of the file's images are the same plain colour: one picture, so one side of a split.
    assert data.train.linked().tolist() == [0] * 12


def test_a_patient_and_a_picture_are_the_same_in_another_file(tmp_path: Path) -> None:
    """A new version of a file: more images, other places, the same identities."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 5, 5, 3), dtype=np.uint8)
    groups: dict[str, Any] = {"val_groups": np.full(6, 40), "test_groups": np.full(6, 50)}
    whose = np.arange(12) // 4 - 1
    first = load_npz(write(tmp_path / "1.npz", train_images=images, train_groups=whose, **groups))
    turned = slice(None, None, -1)
    second = load_npz(
        write(tmp_path / "2.npz", train_images=images[turned], train_groups=whose[turned], **groups)
    )
    assert np.array_equal(first.train.digests, second.train.digests[turned])
    assert np.array_equal(first.train.patients, second.train.patients[turned])
    assert first.train.units().tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_without_groups_no_patient_is_known(tmp_path: Path) -> None:
    """And nothing is hashed until somebody asks."""
    data = load_npz(write(tmp_path / "x.npz"))
    assert not data.train.has_patients
    assert not data.train.patients.any()
    assert "digests" not in vars(data.train)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"val_labels": None}, "lacks the key.*val_labels"),
        ({"train_images": np.zeros((12, 5, 5, 3))}, "train_images is float64"),
        ({"train_images": np.zeros((12, 5, 5, 5, 3), np.uint8)}, "train_images has the shape"),
        ({"train_images": np.zeros((12, 5, 5, 2), np.uint8)}, "train_images has the shape"),
        ({"train_images": np.zeros((12, 0, 5, 3), np.uint8)}, "train_images has the shape"),
        ({"val_images": np.zeros((6, 5, 5), np.uint8)}, "val images have the shape"),
        ({"test_images": np.zeros((0, 5, 5, 3), np.uint8)}, "test_images is empty"),
        ({"test_labels": np.zeros(5, np.uint8)}, "test_labels has 5 entries for 6 images"),
        ({"test_labels": np.zeros(6)}, "test_labels is float64"),
        ({"test_labels": np.zeros(6, bool)}, "test_labels is bool"),
        ({"test_labels": np.zeros((6, 14), np.uint8)}, "several labels an image"),
        ({"test_labels": np.array([0, 1, 2, 0, 1, -1])}, "negative label -1"),
        ({"test_labels": np.full(6, 2**64 - 1, np.uint64)}, "over 64 bits"),
        ({"test_labels": np.array([0, 1, 2, 0, 1, 9])}, "has the label 3"),
        ({"train_groups": np.zeros(12, np.int64)}, "train_groups only"),
        ({"class_names": np.array(["a", "b"])}, "has the label 2"),
        ({"class_names": np.array([1, 2, 3])}, "class_names is int64"),
        ({"train_labels": np.array([{}] * 12, dtype=object)}, "at the key train_labels"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    """The error names the file and what is wrong in it."""
    path = write(tmp_path / "x.npz", **changes)
    with pytest.raises(DataError, match=complaint) as caught:
        load_npz(path)
    if "val images" not in complaint:
        assert str(path) in caught.value.what
    assert caught.value.remedy


def test_labels_counted_from_one_are_refused(tmp_path: Path) -> None:
    """They would train a class 0 that does not exist."""
    ones: dict[str, Any] = {
        f"{s}_labels": np.arange(n) % 3 + 1 for s, n in (("train", 12), ("val", 6), ("test", 6))
    }
    with pytest.raises(DataError, match="has the label 0"):
        load_npz(write(tmp_path / "x.npz", **ones))


def test_missing_damaged_and_foreign_files(tmp_path: Path) -> None:
    """No file, a folder, text, a plain array, a cut archive: each a DataError."""
    with pytest.raises(DataError, match="There is no file"):
        load_npz(tmp_path / "none.npz")
    with pytest.raises(DataError, match="not a file"):
        load_npz(tmp_path)
    text = tmp_path / "text.npz"
    text.write_text("hello")
    with pytest.raises(DataError, match="not an npz archive"):
        load_npz(text)
    with (tmp_path / "array.npz").open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(DataError, match="not an npz archive"):
        load_npz(tmp_path / "array.npz")
    whole = write(tmp_path / "whole.npz").read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError):
        load_npz(cut)
    bent = bytearray(whole)
    bent[whole.index(b"\x07" * 50) + 3] ^= 0xFF
    cut.write_bytes(bytes(bent))
    with pytest.raises(DataError, match="cannot be read at the key train_images"):
        load_npz(cut)


@pytest.mark.skipif(not REAL.is_file(), reason="../shared/data has no bloodmnist_rebuilt.npz")
def test_rebuilt_bloodmnist() -> None:
    """The real file: counts as its README states."""
    data = load_npz(REAL)
    assert (len(data.train), len(data.val), len(data.test)) == (11959, 1712, 1712)
    expected = [852, 2181, 1085, 2026, 849, 993, 2330, 1643]
    assert data.train.class_counts(8).tolist() == expected
    assert data.class_names[7] == "platelet"
    # The source has 17 pairs of identical files; not all of them are within train.
    assert 0 < len(data.train) - len(np.unique(data.train.digests, axis=0)) <= 17

"""The demonstration is a whole federation, joined, with every picture in one hospital."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import Result

from client_app.hospital_file import HospitalFile, HospitalFolder
from client_app.policy import HospitalPolicy
from common.datasets import load_folder_as_one, load_npz, make_synthetic
from common.datasets.identity import digest_keys
from common.errors import ConfigError, PartitionError
from common.roster import load_roster
from deploy.provision.keys import load_identity
from tests.deploy.provision.conftest import snapshot

NAMES = ["hospital-00", "hospital-01", "hospital-02"]


def pictures(root: Path, names: list[str]) -> Counter[tuple[bytes | None, str]]:
    """Which pictures the hospitals hold, by the federation's class, as their nodes read them."""
    found: Counter[tuple[bytes | None, str]] = Counter()
    for name in names:
        folder = HospitalFolder(root / name)
        told, file = folder.load_federation().description, HospitalFile.load(folder.file)
        own, numbers = file.own_classes(told.classes)
        images, _, _ = load_folder_as_one(
            file.folder, own, image_size=told.image_size, channels=told.channels, crop=file.crop
        )
        labels = [told.classes[number] for number in np.array(numbers)[images.labels]]
        found.update(zip(digest_keys(images.digests), labels, strict=True))
    return found


def test_three_hospitals_have_joined_and_know_each_other(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    said = run("federation", "demo", tmp_path / "demo", "--hospitals", 3, "--images", 240).output
    assert all(f"{name}: " in said for name in NAMES)
    known = {}
    for name in NAMES:
        folder = HospitalFolder(tmp_path / "demo" / name)
        known[name] = load_identity(folder.identity_key).public
        assert HospitalPolicy.load(folder.policy) == HospitalPolicy()
    for name in NAMES:
        folder = HospitalFolder(tmp_path / "demo" / name)
        assert load_roster(folder.roster, folder.coordinator.read_text().strip()) == known


def test_every_training_picture_is_at_one_hospital_under_its_class(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    run("federation", "demo", tmp_path / "demo", "--hospitals", 3, "--images", 240)
    dataset = make_synthetic(240)
    labels = [dataset.class_names[label] for label in dataset.train.labels]
    expected = Counter(zip(digest_keys(dataset.train.digests), labels, strict=True))
    assert pictures(tmp_path / "demo", NAMES) == expected


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Grey pictures of patients, in MedMNIST's form."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {"class_names": np.array(["ill", "well"])}
    for split, n in (("train", 60), ("val", 4), ("test", 4)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 20, 20), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 2).astype(np.uint8)
        arrays[f"{split}_groups"] = np.arange(n) // 3 + {"train": 0, "val": 100, "test": 200}[split]
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def test_a_file_of_ones_own_keeps_its_form_and_its_patients(
    tmp_path: Path, file: Path, run: Callable[..., Result]
) -> None:
    run("federation", "demo", tmp_path / "demo", "--hospitals", 2, "--data", file)
    told = HospitalFolder(tmp_path / "demo" / "hospital-00").load_federation().description
    assert (told.classes, told.image_size, told.channels) == (("ill", "well"), 20, 1)
    dataset = load_npz(file)
    seen: list[set[bytes | None]] = []
    for name in NAMES[:2]:
        data = tmp_path / "demo" / name / "data"
        images, _, _ = load_folder_as_one(data, told.classes, image_size=20, channels=1)
        assert images.has_patients
        seen.append(set(digest_keys(images.patients)))
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(digest_keys(dataset.train.patients))


def test_repeated_it_changes_nothing_and_with_other_arguments_it_is_refused(
    tmp_path: Path, file: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = tmp_path / "demo"
    run("federation", "demo", demo, "--hospitals", 2, "--data", file)
    before = snapshot(demo)
    run("federation", "demo", demo, "--hospitals", 2, "--data", file)
    assert snapshot(demo) == before
    with pytest.raises(ConfigError, match="other hospitals or data"):
        run("federation", "demo", demo, "--hospitals", 3, "--data", file)
    with pytest.raises(ConfigError, match="other settings"):
        run("federation", "demo", demo, "--hospitals", 2, "--data", file, "--name", "other")
    assert snapshot(demo) == before


def test_one_that_a_crash_left_half_done_is_completed(
    tmp_path: Path, file: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    class Killed(BaseException):
        pass

    real, left = Image.Image.save, 40

    def save(self: Image.Image, path: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        real(self, path)

    demo = tmp_path / "demo"
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(Killed):
        run("federation", "demo", demo, "--hospitals", 2, "--data", file)
    monkeypatch.undo()
    assert not (demo / "hospital-01" / "data").exists()
    run("federation", "demo", demo, "--hospitals", 2, "--data", file)
    assert sum(1 for _ in demo.rglob("*.png")) == 60
    assert not list(demo.rglob(".data.new"))


def test_too_many_hospitals_for_the_pictures_are_refused_before_anything_is_made(
    tmp_path: Path, file: Path, run: Callable[..., Result]
) -> None:
    with pytest.raises(PartitionError):
        run("federation", "demo", tmp_path / "demo", "--hospitals", 30, "--data", file)
    assert not (tmp_path / "demo").exists()


def test_the_real_pictures_survive_their_way_into_folders(
    tmp_path: Path, blood: Path, run: Callable[..., Result]
) -> None:
    with np.load(blood) as whole:
        part = {name: whole[name][:200] for name in whole.files}
    np.savez(tmp_path / "blood.npz", **part)
    run("federation", "demo", tmp_path / "demo", "--hospitals", 3, "--data", tmp_path / "blood.npz")
    dataset = load_npz(tmp_path / "blood.npz")
    labels = [dataset.class_names[label] for label in dataset.train.labels]
    expected = Counter(zip(digest_keys(dataset.train.digests), labels, strict=True))
    assert pictures(tmp_path / "demo", NAMES) == expected

"""Folders of pictures: layouts, modes, splits without leaks, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.datasets import (
    SPLITS,
    ImageSet,
    load,
    load_folder,
    load_folder_as_one,
    patient_digest,
)
from common.datasets import pictures as pictures_module
from common.datasets.pictures import read_picture
from common.errors import DataError

SAMPLE = Path(__file__).resolve().parents[4] / "shared" / "data" / "pbc_sample"


def picture(path: Path, value: int, mode: str = "RGB", size: tuple[int, int] = (9, 7)) -> Path:
    """Save a plain picture whose content depends on ``value``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour: int | tuple[int, ...] = value if mode == "L" else (value, 255 - value, 10)
    Image.new(mode, size, colour).save(path)
    return path


def classes(root: Path, per_class: int = 10, names: tuple[str, ...] = ("a", "b")) -> Path:
    """Make class folders with distinct pictures."""
    for c, name in enumerate(names):
        for i in range(per_class):
            picture(root / name / f"{i}.png", 100 * c + i)
    return root


def test_split_is_stratified_and_deterministic(tmp_path: Path) -> None:
    """70/10/20 of each class; the same pictures fall the same way whatever their names."""
    root = classes(tmp_path / "x")
    data = load_folder(root, image_size=4)
    assert data.class_names == ("a", "b")
    assert data.image_shape == (4, 4, 3)
    for split, count in (("train", 7), ("val", 1), ("test", 2)):
        assert data.split(split).class_counts(2).tolist() == [count, count]
    for file in (root / "a").iterdir():
        file.rename(file.with_name(f"renamed-{file.name}"))
    again = load_folder(root, image_size=4)
    assert np.array_equal(again.test.images, data.test.images)
    assert np.array_equal(again.train.images, data.train.images)
    assert again.sha256 != data.sha256
    other = load("folder", str(root), image_size=4, seed=1)
    assert not np.array_equal(other.test.images, data.test.images)


def test_identical_files_stay_together(tmp_path: Path) -> None:
    """Copies, even under two classes, are on one side of every split, and noted."""
    root = classes(tmp_path / "x", per_class=12)
    for i in range(12):
        (root / "a" / f"copy-{i}.png").write_bytes((root / "a" / f"{i}.png").read_bytes())
    (root / "b" / "torn.png").write_bytes((root / "a" / "3.png").read_bytes())
    for seed in range(5):
        data = load_folder(root, image_size=4, seed=seed)
        seen = [
            {tuple(image.ravel()) for image in data.split(s).images}
            for s in ("train", "val", "test")
        ]
        assert not seen[0] & seen[1]
        assert not seen[0] & seen[2]
        assert not seen[1] & seen[2]
        assert sum(len(data.split(s)) for s in ("train", "val", "test")) == 37
    assert any("13 file(s) repeat" in note for note in data.notes)
    assert any("contradicting labels" in note for note in data.notes)


def test_patient_folders_are_groups(tmp_path: Path) -> None:
    """A folder in a class folder is a patient, across classes, and is never split."""
    value = 0
    for name in ("a", "b"):
        for patient in range(6):
            for i in range(3):
                visit = "visit/" if i else ""
                picture(tmp_path / name / f"p{patient}" / f"{visit}{i}.png", value)
                value += 1
    images, names, _ = load_folder_as_one(tmp_path, image_size=2)
    assert names == ("a", "b")
    assert len(images) == 36
    assert len(np.unique(images.groups)) == 6
    assert images.has_patients
    assert np.array_equal(images.units(), images.groups)
    expected = {patient_digest(f"p{patient}") for patient in range(6)}
    assert {row.tobytes() for row in images.patients} == expected
    data = load_folder(tmp_path, image_size=2)
    groups = [set(data.split(s).groups.tolist()) for s in ("train", "val", "test")]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]


def test_pictures_outside_patient_folders_have_no_patient(tmp_path: Path) -> None:
    """A mix of both: zeros for the loose ones, a note, and no promise to patients."""
    picture(tmp_path / "a" / "p1" / "1.png", 1)
    picture(tmp_path / "a" / "loose.png", 2)
    picture(tmp_path / "b" / "p1" / "1.png", 3)
    images, _, notes = load_folder_as_one(tmp_path, image_size=2)
    assert np.sort(images.patients.any(axis=1)).tolist() == [False, True, True]
    assert not images.has_patients
    assert "the patient of 1 in 3 pictures is unknown" in notes
    with pytest.raises(DataError, match="unknown for 1 of 3 images"):
        images.units()


def test_the_same_pixels_in_other_files_are_one_picture(tmp_path: Path) -> None:
    """Another format, another name, a turned copy: never in train and test at once."""
    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = Image.fromarray(rng.integers(0, 256, (8, 6, 3), dtype=np.uint8))
        for suffix in ("png", "bmp"):
            path = tmp_path / "ab"[i % 2] / f"{i}.{suffix}"
            path.parent.mkdir(exist_ok=True)
            pixels.save(path)
        pixels.transpose(Image.Transpose.ROTATE_90).save(path.with_name(f"{i}-turned.png"))
    images, _, notes = load_folder_as_one(tmp_path, image_size=4)
    assert (len(images), len(np.unique(images.groups))) == (60, 20)
    assert np.array_equal(np.unique(images.digests, axis=0, return_inverse=True)[1], images.groups)
    assert "40 file(s) repeat the picture of another one (kept together)" in notes
    for seed in range(3):
        data = load_folder(tmp_path, image_size=4, seed=seed)
        seen = [{row.tobytes() for row in data.split(s).digests} for s in SPLITS]
        assert sum(map(len, seen)) == len(set.union(*seen)) == 20


def test_further_pictures_leave_the_others_where_they_are(tmp_path: Path) -> None:
    """One more picture moves at most two old ones between train, val and test."""
    root = classes(tmp_path / "x", per_class=30)

    def places() -> dict[bytes, str]:
        data = load_folder(root, image_size=2)
        return {row.tobytes(): s for s in SPLITS for row in data.split(s).digests}

    before = places()
    for value in range(60, 75):
        picture(root / "a" / f"{value}.png", value)
        after = places()
        assert sum(after[key] != place for key, place in before.items()) <= 2
        before = after


def test_given_splits_are_kept(tmp_path: Path) -> None:
    """train, val and test folders are the splits; a class may be absent from val."""
    for s, (split, names) in enumerate((("train", "abc"), ("val", "ab"), ("test", "abc"))):
        for c, name in enumerate(names):
            picture(tmp_path / split / name / "1.png", 60 * s + 10 * c)
    data = load_folder(tmp_path, image_size=4)
    assert data.class_names == ("a", "b", "c")
    assert (len(data.train), len(data.val), len(data.test)) == (3, 2, 3)
    assert any("val has no image of: c" in note for note in data.notes)
    leak = tmp_path / "test" / "a" / "leak.png"
    leak.write_bytes((tmp_path / "train" / "a" / "1.png").read_bytes())
    with pytest.raises(DataError, match="are the same picture, in different splits"):
        load_folder(tmp_path)
    leak.unlink()
    Image.open(tmp_path / "train" / "a" / "1.png").save(leak.with_suffix(".bmp"))
    with pytest.raises(DataError, match="are the same picture, in different splits"):
        load_folder(tmp_path)
    leak.with_suffix(".bmp").unlink()
    picture(tmp_path / "train" / "a" / "who" / "1.png", 205)
    picture(tmp_path / "test" / "b" / "who" / "1.png", 206)
    with pytest.raises(DataError, match="share the patient who, in different splits"):
        load_folder(tmp_path)
    (tmp_path / "test" / "b" / "who" / "1.png").unlink()
    (tmp_path / "test" / "b" / "who").rmdir()
    picture(tmp_path / "val" / "d" / "1.png", 200)
    with pytest.raises(DataError, match="no class: d"):
        load_folder(tmp_path)


def test_some_splits_only(tmp_path: Path) -> None:
    """train and test without val is neither layout."""
    classes(tmp_path / "train")
    classes(tmp_path / "test")
    with pytest.raises(DataError, match="train, test but not all"):
        load_folder(tmp_path)


def test_foreign_and_hidden_files(tmp_path: Path) -> None:
    """Hidden things are ignored; other files are ignored with a note."""
    root = classes(tmp_path)
    (root / "a" / "notes.txt").write_text("x")
    (root / "a" / ".thumb.png").write_text("x")
    (root / ".cache").mkdir()
    data = load_folder(root)
    assert data.num_classes == 2
    assert any("1 file(s) that are no pictures were ignored: a/notes.txt" in n for n in data.notes)


def test_broken_layouts(tmp_path: Path) -> None:
    """Missing folder, file, no classes, an empty class, one class."""
    with pytest.raises(DataError, match="There is no folder"):
        load_folder(tmp_path / "none")
    file = picture(tmp_path / "one" / "a" / "1.png", 1)
    with pytest.raises(DataError, match="not a folder"):
        load_folder(file)
    with pytest.raises(DataError, match="no class folders"):
        load_folder(file.parent)
    for i in range(5):
        picture(tmp_path / "one" / "a" / f"{i}.png", i)
    with pytest.raises(DataError, match="two classes"):
        load_folder(tmp_path / "one")
    (tmp_path / "one" / "b").mkdir()
    with pytest.raises(DataError, match=r"one/b has no pictures"):
        load_folder(tmp_path / "one")


def test_unreadable_pictures_are_named(tmp_path: Path) -> None:
    """Text, a cut file, an empty file, and a format that is not allowed."""
    for name, content in (("text.png", b"no picture"), ("empty.jpg", b"")):
        bad = tmp_path / name
        bad.write_bytes(content)
        with pytest.raises(DataError, match=name):
            read_picture(bad, 8)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg", "cut.tif", "cut.bmp"):
        bad = tmp_path / name
        Image.fromarray(noise).save(bad)
        bad.write_bytes(bad.read_bytes()[:700])
        with pytest.raises(DataError, match=name):
            read_picture(bad, 8)
    gif = tmp_path / "gif.png"
    Image.fromarray(noise).save(gif, format="GIF")
    with pytest.raises(DataError, match="cannot be read"):
        read_picture(gif, 8)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a single pixel is decoded, by this limit and by Pillow's own."""
    bomb = picture(tmp_path / "bomb.png", 1, size=(200, 200))
    monkeypatch.setattr(pictures_module, "MAX_PIXELS", 10_000)
    with pytest.raises(DataError, match=r"bomb.png has 200 x 200 pixels"):
        read_picture(bomb, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(DataError, match="too many pixels"):
        read_picture(bomb, 8)


def test_centre_crop_then_resize(tmp_path: Path) -> None:
    """The middle square counts, the sides do not; ``crop`` takes a smaller square."""
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    wide[4:6, 14:16] = 100
    path = tmp_path / "wide.png"
    Image.fromarray(wide).save(path)
    assert np.array_equal(read_picture(path, 10).pixels, wide[:, 10:20])
    assert (read_picture(path, 3, crop=2).pixels == 100).all()
    assert (read_picture(path, 20).pixels[0] == 200).all()
    with pytest.raises(DataError, match="smaller than the crop of 11"):
        read_picture(path, 3, crop=11)


def test_modes(tmp_path: Path) -> None:
    """Grey, 1-bit, palette, transparent, CMYK and 16-bit pictures come out right."""

    def read(image: Image.Image, name: str) -> tuple[list[int], bool]:
        image.save(tmp_path / name)
        found = read_picture(tmp_path / name, 4)
        assert (found.pixels == found.pixels[0, 0]).all()
        return found.pixels[0, 0].tolist(), found.colour

    assert read(Image.new("L", (6, 6), 40), "l.png") == ([40] * 3, False)
    assert read(Image.new("1", (6, 6), 1), "1.png") == ([255] * 3, False)
    assert read(Image.new("LA", (6, 6), (9, 0)), "la.png") == ([255] * 3, False)
    assert read(Image.new("RGBA", (6, 6), (9, 8, 7, 0)), "rgba.png") == ([255] * 3, True)
    assert read(Image.new("RGBA", (6, 6), (9, 8, 7, 255)), "full.png") == ([9, 8, 7], True)
    palette = Image.new("RGB", (6, 6), (200, 30, 60)).convert("P", palette=Image.Palette.ADAPTIVE)
    assert read(palette, "p.png") == ([200, 30, 60], True)
    assert read(Image.new("CMYK", (6, 6), (0, 255, 255, 0)), "c.tif")[0][0] > 200
    for name in ("16.png", "16.tif"):
        deep = Image.fromarray(np.full((6, 6), 300 * 100, dtype=np.uint16))
        assert read(deep, name) == ([117] * 3, False)
    floating = Image.fromarray(np.zeros((6, 6), dtype=np.float32))
    with pytest.raises(DataError, match="floating-point"):
        read(floating, "f.tif")
    pages = [Image.new("L", (6, 6), v) for v in (1, 2)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match="2 pages"):
        read_picture(tmp_path / "pages.tif", 4)


def test_grey_folders_have_one_channel(tmp_path: Path) -> None:
    """One channel only if every picture is grey; a federation may ask for three, or one."""
    for i in range(6):
        picture(tmp_path / "a" / f"{i}.png", i, "L")
        picture(tmp_path / "b" / f"{i}.png", 100 + i, "L")
    assert load_folder(tmp_path).channels == 1
    assert load_folder_as_one(tmp_path, channels=3)[0].images.shape[3] == 3
    picture(tmp_path / "b" / "colour.png", 50)
    assert load_folder(tmp_path).channels == 3
    grey = load_folder_as_one(tmp_path, channels=1)[0].images
    assert grey.shape == (13, 28, 28, 1)
    assert sorted(grey[:, 0, 0, 0].tolist())[:6] == [0, 1, 2, 3, 4, 5]


def test_as_one_follows_the_federations_classes(tmp_path: Path) -> None:
    """Labels follow the given list; a class may be missing, a stranger may not."""
    root = classes(tmp_path, per_class=3, names=("b", "d"))
    images, names, notes = load_folder_as_one(root, ("d", "c", "b"), image_size=4)
    assert isinstance(images, ImageSet)
    assert names == ("d", "c", "b")
    assert images.class_counts(3).tolist() == [3, 0, 3]
    assert any("no image of: c" in note for note in notes)
    with pytest.raises(DataError, match="no class: d"):
        load_folder_as_one(root, ("a", "b"))
    with pytest.raises(DataError, match="channels"):
        load_folder_as_one(root, channels=2)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="../shared/data has no pbc_sample")
def test_real_sample() -> None:
    """Ninety-six real pictures, twelve a class."""
    data = load_folder(SAMPLE, crop=200)
    assert data.train.class_counts(8).tolist() == [9] * 8
    assert (len(data.train), len(data.val), len(data.test)) == (72, 8, 16)
    assert data.image_shape == (28, 28, 3)
    assert 100 < data.train.images.mean() < 230
    assert len(load_folder_as_one(SAMPLE)[0]) == 96

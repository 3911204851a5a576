"""Digests: the same picture and patient for ever, whatever else changes."""

from __future__ import annotations

import hashlib
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from common.datasets import load_folder_as_one, patient_digest, picture_digest
from common.datasets.identity import digest_keys, link, patient_digests, split_keys
from common.datasets.pictures import read_picture
from common.errors import DataError

SAMPLE = Path(__file__).resolve().parents[4] / "shared" / "data" / "pbc_sample"
needs_sample = pytest.mark.skipif(
    not SAMPLE.is_dir(), reason="../shared/data has no pbc_sample on this machine"
)

arrays = hnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3])),
    elements=st.integers(0, 3),
)


def views(pixels: np.ndarray) -> list[np.ndarray]:
    """Return the eight ways to turn and mirror a picture."""
    turned = [np.rot90(pixels, k) for k in range(4)]
    return turned + [view[::-1] for view in turned]


def reference(pixels: np.ndarray) -> bytes:
    """Compute a picture's digest by the letter of the documentation."""
    if pixels.shape[2] == 3 and all(np.ptp(pixels, axis=2).ravel() == 0):
        pixels = pixels[..., :1]
    wide = [view for view in views(pixels) if view.shape[0] <= view.shape[1]]
    content = min(view.tobytes() for view in wide)
    shape = struct.pack("<3Q", *wide[0].shape)
    return hashlib.blake2b(
        shape + content, digest_size=16, salt=b"consilium", person=b"picture"
    ).digest()


def test_digests_are_the_same_in_every_version_of_this_software() -> None:
    """A ledger lives for years: these values must never change."""
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert picture_digest(pixels).hex() == "9aa2f5d9aa131dd838d12d64b54af792"
    assert patient_digest("4711").hex() == "a978600ceeddc4ac56af31a5768bc82d"


@settings(max_examples=200, deadline=None)
@given(arrays)
def test_picture_digest_is_as_documented_and_blind_to_turns(pixels: np.ndarray) -> None:
    """All eight views, and grey as three channels, are one picture."""
    expected = reference(pixels)
    assert {picture_digest(view) for view in views(pixels)} == {expected}
    if pixels.shape[2] == 1:
        assert picture_digest(np.repeat(pixels, 3, axis=2)) == expected


@settings(max_examples=200, deadline=None)
@given(arrays, arrays)
def test_other_pixels_or_shapes_are_other_pictures(one: np.ndarray, two: np.ndarray) -> None:
    """Two digests are equal only for two views of one picture."""

    def plain(pixels: np.ndarray) -> np.ndarray:
        grey = pixels.shape[2] == 3 and not np.ptp(pixels, axis=2).any()
        return pixels[..., :1] if grey else pixels

    same = any(np.array_equal(view, plain(two)) for view in views(plain(one)))
    assert (picture_digest(one) == picture_digest(two)) == same


def test_a_single_grey_level_is_another_picture() -> None:
    """No tolerance: a lossy copy is a new picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    changed = pixels.copy()
    changed[17, 23, 1] ^= 1
    assert picture_digest(pixels) != picture_digest(changed)


def test_patients_are_told_apart_by_their_text_only() -> None:
    """Blanks around it and the Unicode form do not count; zeros and case do."""
    assert patient_digest(" M\u00fcller ") == patient_digest("Mu\u0308ller")
    names = ["7", "07", "x", "X", "x y", "xy", "\udcff"]
    assert len({patient_digest(name) for name in names}) == len(names)
    for name in ("", "  "):
        with pytest.raises(DataError, match="id is empty"):
            patient_digest(name)


def test_unknown_patients_are_zeros() -> None:
    """Which are no key: two unknown patients are not the same patient."""
    rows = patient_digests(["x", "", "y", "", "x"])
    assert rows.shape == (5, 16)
    assert digest_keys(rows)[1] is None
    assert digest_keys(rows)[0] == patient_digest("x")
    assert link(digest_keys(rows)).tolist() == [0, 1, 2, 3, 0]


def test_pictures_and_patients_never_share_a_digest() -> None:
    """Not even where the bytes that are hashed are the same."""
    pixels = np.full((1, 1, 1), 65, dtype=np.uint8)
    hashed = (struct.pack("<3Q", 1, 1, 1) + b"A").decode()
    assert hashed.strip() == hashed
    assert picture_digest(pixels) != patient_digest(hashed)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.one_of(st.none(), st.integers(0, 15)), st.one_of(st.none(), st.text("ab"))),
        max_size=40,
    )
)
def test_link_is_the_transitive_closure(rows: list[tuple[int | None, str | None]]) -> None:
    """Against the definition: joined by a shared key or a chain of such."""
    n = len(rows)
    joined = np.eye(n, dtype=bool)
    for i in range(n):
        for j in range(n):
            joined[i, j] |= any(
                a is not None and a == b for a, b in zip(rows[i], rows[j], strict=True)
            )
    for k in range(n):
        joined |= joined[:, k : k + 1] & joined[k : k + 1]
    numbers = link([row[0] for row in rows], [row[1] for row in rows])
    assert np.array_equal(numbers[:, None] == numbers[None, :], joined)
    firsts = [int(x) for i, x in enumerate(numbers) if x not in numbers[:i]]
    assert firsts == list(range(len(firsts)))


def test_split_keys_follow_the_patient_where_one_is_known() -> None:
    """Two pictures of a patient have one key; a seed gives other keys."""
    pictures = np.arange(48, dtype=np.uint8).reshape(3, 16)
    patients = patient_digests(["x", "x", ""])
    keys = split_keys(pictures, patients, 0)
    assert keys[0] == keys[1] != keys[2]
    assert split_keys(pictures[::-1], patients[::-1], 0) == keys[::-1]
    assert not set(keys) & set(split_keys(pictures, patients, 1))
    assert split_keys(pictures, patients, -1) == split_keys(pictures, patients, 2**64 - 1)


def test_format_name_and_metadata_make_no_new_picture(tmp_path: Path) -> None:
    """PNG, BMP, TIFF, WebP without loss; comments; grey as RGB or palette; an orientation tag."""
    rng = np.random.default_rng(0)
    for mode, shape in (("RGB", (20, 30, 3)), ("L", (20, 30)), ("L", (20, 20))):
        original = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode)
        forms = [original, original.convert("RGB")]
        if mode == "L":
            forms.append(original.convert("P"))
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees to look at it
        exif[0x010E] = "a description"
        found = set()
        for i, form in enumerate(forms):
            for suffix in ("png", "bmp", "tif"):
                form.save(tmp_path / f"{i}.{suffix}")
            form.save(tmp_path / f"{i}.webp", lossless=True, exact=True)
            form.save(tmp_path / f"{i}-tagged.png", exif=exif, dpi=(300, 300))
            form.transpose(Image.Transpose.ROTATE_270).save(tmp_path / f"{i}-turned.png")
        for path in tmp_path.iterdir():
            found |= {read_picture(path, size).digest for size in (4, 9)}
            found.add(read_picture(path, 4, crop=7).digest)
            path.unlink()
        assert found == {picture_digest(np.asarray(original).reshape(*original.size[::-1], -1))}


@needs_sample
def test_real_pictures_keep_their_digests(tmp_path: Path) -> None:
    """Size, crop, channels, folder, name and a lossless copy: nothing of that is a new picture."""
    for i, path in enumerate(sorted(SAMPLE.glob("*/*.jpg"))[::4]):
        for kind, suffix in (("original", "jpg"), ("copy", "png")):
            file = tmp_path / kind / "ab"[i % 2] / f"{i}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            if suffix == "jpg":
                shutil.copyfile(path, file)
            else:
                Image.open(path).save(file, compress_level=1)
    whole = load_folder_as_one(tmp_path / "original")[0]
    assert len(np.unique(whole.digests, axis=0)) == 24
    options: list[dict[str, Any]] = [{"image_size": 64}, {"crop": 200}, {"channels": 1}]
    for option in options:
        other = load_folder_as_one(tmp_path / "original", **option)[0]
        assert np.array_equal(other.digests, whole.digests)
    assert np.array_equal(load_folder_as_one(tmp_path / "copy")[0].digests, whole.digests)


@needs_sample
def test_a_jpegs_digest_is_the_same_for_every_version_of_the_decoder() -> None:
    """A decoder that gave other pixels would make every picture a new one to the ledger."""
    path = SAMPLE / "basophil" / "BA_580.jpg"
    assert read_picture(path, 28).digest.hex() == "f56e1d7049aba1f53e0560cd279de379"

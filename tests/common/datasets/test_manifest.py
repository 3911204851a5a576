"""Manifests: what a table may look like, what it changes, and each way in which it can be wrong."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.datasets import (
    MANIFEST,
    SPLITS,
    load,
    load_cached,
    load_folder,
    load_folder_as_one,
    patient_digest,
)
from common.datasets.manifest import list_manifest
from common.errors import DataError
from tests.common.datasets.test_folder import SAMPLE, classes, picture


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a flat folder with the pictures 0.png to 5.png."""
    for i in range(6):
        picture(tmp_path / "flat" / f"{i}.png", 20 * i)
    return tmp_path / "flat"


def write(root: Path, text: str, encoding: str = "utf-8") -> Path:
    """Write the folder's manifest."""
    path = root / MANIFEST
    path.write_bytes(text.encode(encoding))
    return path


FULL = "file,label,patient\n0.png,b,x\n1.png,a,y\n2.png,b,x\n3.png,a,z\n4.png,a,x\n5.png,b,w\n"


def test_a_manifest_names_labels_and_patients(root: Path) -> None:
    """Pictures may lie flat; classes are the labels in alphabetical order."""
    write(root, FULL)
    images, names, notes = load_folder_as_one(root, image_size=2)
    assert names == ("a", "b")
    assert notes == ()
    assert images.class_counts(2).tolist() == [3, 3]
    assert images.has_patients
    found = {
        (int(image[0, 0, 0]), int(label), patient.tobytes())
        for image, label, patient in zip(images.images, images.labels, images.patients, strict=True)
    }
    whose = dict(enumerate("xyxzxw"))
    labels = dict(enumerate((1, 0, 1, 0, 0, 1)))
    assert found == {(20 * i, labels[i], patient_digest(whose[i])) for i in range(6)}
    assert len(np.unique(images.groups)) == 4
    assert np.array_equal(images.units(), images.groups)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace(",", ";"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("file,label,patient", " File , LABEL,Patient"),
        lambda text: "\n".join(",".join(f'"{c}"' for c in r.split(",")) for r in text.split()),
        lambda text: text.replace("\n", ",,\n").replace("4.png", "./4.png") + "\n,,,,\n\n",
        lambda text: "\n".join(
            ",".join(reversed(row.split(","))) for row in reversed(text.split()[1:])
        ).join(["patient,label,file\n", ""]),
    ],
    ids=["bom", "semicolon", "crlf", "case", "quotes", "empty cells and rows", "order"],
)
def test_spreadsheets_ways_of_writing_make_no_difference(
    root: Path, change: Callable[[str], str]
) -> None:
    """Separator, byte order mark, quotes, line ends, blank rows, order of columns and rows."""
    write(root, FULL)
    plain = load_folder_as_one(root, image_size=2)[0]
    write(root, change(FULL))
    images, names, notes = load_folder_as_one(root, image_size=2)
    assert names == ("a", "b")
    assert notes == ()
    assert np.array_equal(images.digests, plain.digests)
    assert np.array_equal(images.labels, plain.labels)
    assert np.array_equal(images.patients, plain.patients)


cell = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")) | st.sampled_from(",;\"'\n"),
    min_size=1,
).filter(lambda text: text.strip())


@settings(max_examples=60, deadline=None)
@given(st.lists(cell, min_size=6, max_size=6), st.lists(cell, min_size=6, max_size=6), st.data())
def test_whatever_a_spreadsheet_can_write_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    labels: list[str],
    patients: list[str],
    data: st.DataObject,
) -> None:
    """Any label and patient survive the csv module's Excel dialect."""
    root = tmp_path_factory.mktemp("any")
    delimiter = data.draw(st.sampled_from(",;"))
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig"]))
    for i in range(6):
        (root / f"{i}.png").touch()
    with (root / MANIFEST).open("w", newline="", encoding=encoding) as stream:
        writer = csv.writer(stream, delimiter=delimiter)
        writer.writerow(["file", "label", "patient"])
        for i in range(6):
            writer.writerow([f"{i}.png", labels[i], patients[i]])
    listing = list_manifest(root, root / MANIFEST, splits=True)
    assert [file.label for file in listing.files] == [label.strip() for label in labels]
    assert [file.patient for file in listing.files] == [whose.strip() for whose in patients]
    assert listing.classes == tuple(sorted({label.strip() for label in labels}))


def test_folders_and_manifest_yield_the_same(tmp_path: Path) -> None:
    """A table that says what the folders say changes neither images nor identities nor split."""
    folders, table = tmp_path / "folders", tmp_path / "table"
    rows = ["file,label,patient"]
    for value in range(60):
        name, whose = "ab"[value % 2], f"p{value % 20}"
        path = picture(folders / name / whose / f"{value}.png", value)
        flat = table / "deep" / f"{value}.png"
        flat.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, flat)
        rows.append(f"deep\\{value}.png,{name},{whose}")
    write(table, "\n".join(rows))
    one, other = load_folder_as_one(folders)[0], load_folder_as_one(table)[0]
    for name in ("images", "labels", "patients", "digests", "groups"):
        assert np.array_equal(getattr(one, name), getattr(other, name))
    first, second = load_folder(folders), load("folder", str(table))
    for split in SPLITS:
        assert np.array_equal(first.split(split).digests, second.split(split).digests)
        assert np.array_equal(first.split(split).patients, second.split(split).patients)
    patients = [{row.tobytes() for row in first.split(s).patients} for s in SPLITS]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 20


def test_without_the_column_no_patient_is_known(root: Path) -> None:
    """A missing column, and an empty one (with a note)."""
    write(root, "file,label\n0.png,a\n1.png,b\n")
    assert not load_folder_as_one(root)[0].patients.any()
    write(root, "file,label,patient\n0.png,a,\n1.png,b,\n")
    images, _, notes = load_folder_as_one(root)
    assert not images.has_patients
    assert "the column patient of manifest.csv is empty: no patient is known" in notes


def test_what_is_not_used_is_noted(root: Path) -> None:
    """Pictures that are not listed, and further columns."""
    picture(root / "more" / "6.png", 150)
    picture(root / ".trash" / "7.png", 160)
    (root / "notes.txt").write_text("x")
    write(root, "file,age,label,split\n0.png,50,a,train\n1.png,60,b,\n")
    images, _, notes = load_folder_as_one(root)
    assert len(images) == 2
    assert "5 picture(s) that manifest.csv does not list were left out" in notes
    assert "column(s) of manifest.csv that were not used: age, split" in notes


def test_class_folders_do_not_matter_beside_a_manifest(tmp_path: Path) -> None:
    """The table's labels count, wherever the pictures lie."""
    root = classes(tmp_path / "x", per_class=2)
    write(root, "file,label\na/0.png,q\nb/1.png,r\n")
    assert load_folder_as_one(root)[1] == ("q", "r")
    (root / MANIFEST).unlink()
    assert load_folder_as_one(root)[1] == ("a", "b")
    (root / MANIFEST).mkdir()
    picture(root / MANIFEST / "1.png", 250)
    assert load_folder_as_one(root)[1] == ("a", "b", MANIFEST)


def test_a_manifest_may_lie_elsewhere(root: Path, tmp_path: Path) -> None:
    """It takes the place of the folder's own; files are relative to the folder all the same."""
    write(root, FULL)
    elsewhere = tmp_path / "table.csv"
    elsewhere.write_text("file,label\n0.png,k\n5.png,l\n")
    images, names, notes = load_folder_as_one(root, manifest=elsewhere)
    assert names == ("k", "l")
    assert len(images) == 2
    assert any("4 picture(s) that table.csv does not list" in note for note in notes)
    assert len(load_folder_as_one(root, manifest=str(elsewhere))[0]) == 2
    with pytest.raises(DataError, match=r"none\.csv cannot be read"):
        load_folder_as_one(root, manifest=tmp_path / "none.csv")


def test_the_federations_classes(root: Path) -> None:
    """Labels follow the given list; one that is not on it is an error with its line."""
    write(root, FULL)
    images, names, notes = load_folder_as_one(root, ("b", "c", "a"))
    assert names == ("b", "c", "a")
    assert images.class_counts(3).tolist() == [3, 0, 3]
    assert any("no image of: c" in note for note in notes)
    with pytest.raises(DataError, match="line 3: 'a' is no class") as caught:
        load_folder_as_one(root, ("b", "c"))
    assert "b, c" in caught.value.remedy


SPLIT = (
    "file,label,patient,split\n0.png,a,x,train\n1.png,b,x,TRAIN\n2.png,a,y,val\n"
    "3.png,a,z,test\n4.png,b,z,test\n5.png,b,x,train\n"
)


def test_a_column_makes_the_splits(root: Path) -> None:
    """Train, val and test as the table says; a class may be absent from val."""
    write(root, SPLIT)
    data = load_folder(root)
    assert [len(data.split(s)) for s in SPLITS] == [3, 1, 2]
    assert data.class_names == ("a", "b")
    assert data.notes[0] == "split as found"
    assert any("val has no image of: b" in note for note in data.notes)
    assert data.train.has_patients
    assert data.val.patients[0].tobytes() == patient_digest("y")


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("2.png,a,y,val", "2.png,a,z,val", r"2\.png \(.*line 4\).*share the patient z"),
        ("2.png,a,y,val", "copy.bmp,a,y,val", "are the same picture, in different splits"),
        ("2.png,a,y,val", "2.png,a,y,", "line 4: the column split is empty"),
        ("2.png,a,y,val", "2.png,a,y,valid", "line 4: 'valid' is no split"),
        ("2.png,a,y,val", "2.png,a,y,test", "line 1: the column split has no row for val"),
        ("2.png,a,y,val", "2.png,c,y,val", "line 4: train has no picture of 'c'"),
    ],
)
def test_impossible_splits_are_refused(root: Path, old: str, new: str, complaint: str) -> None:
    """A patient or a picture in two splits, an empty or unknown split, a class never taught."""
    from PIL import Image

    Image.open(root / "0.png").save(root / "copy.bmp")
    write(root, SPLIT.replace(old, new))
    with pytest.raises(DataError, match=complaint) as caught:
        load_folder(root)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"line 1: there is no header.*the file is empty"),
        ("0.png,a\n1.png,b\n", r"line 1: there is no header.*file, label.*found: 0\.png, a"),
        ("file,class\n0.png,a\n", r"line 1: .*column\(s\) label"),
        ("file\tlabel\n0.png\ta\n", "line 1: there is no header"),
        ("file,label,Label\n0.png,a,b\n", "line 1: two columns are called label"),
        ("file,label\n", "line 1: there are no rows"),
        ("file,label\n,,\n", "line 1: there are no rows"),
        ("file,label\n0.png,a\n1.png,\n", "line 3: the column label is empty"),
        ("file,label\n0.png,a\n1.png\n", "line 3: the column label is empty"),
        ("file,label\n0.png,a\n,b\n", "line 3: the column file is empty"),
        ("file,label\n0.png,a,b\n", "line 2: there are 3 cells under a header of 2"),
        ("file,label,patient\n0.png,a,x\n\n1.png,b,\n", "line 4: the column patient is empty"),
        ("file,label,patient\n0.png,a,\n1.png,b,x\n", "line 2: the column patient is empty"),
        ("file,label\n0.png,a\nnone.png,b\n", r"line 3: there is no file .*none\.png"),
        ("file,label\n.,a\n", "line 2: there is no file"),
        ("file,label\nsub,a\n", "line 2: there is no file"),
        ("file,label\n" + "x" * 5000 + ",a\n", "line 2: there is no file"),
        ("file,label\nnull\0.png,a\n", "line 2: there is no file"),
        ("file,label\nloop.png,a\n", "line 2: "),
        ("file,label\n0.png,a\n0.png,b\n", "line 3: 0.png is already listed in line 2"),
        ("file,label\n0.png,a\n./0.png,b\n", "line 3: ./0.png is already listed in line 2"),
        ("file,label\n0.png,a\nsame.png,b\n", "line 3: same.png is already listed in line 2"),
        ("file,label\n../outside.png,a\n", "line 2: ../outside.png lies outside"),
        ("file,label\n..\\outside.png,a\n", "line 2: .* lies outside"),
        ("file,label\nsub/../0.png,a\n", "line 2: .* lies outside"),
        ("file,label\n/etc/hostname,a\n", "line 2: /etc/hostname lies outside"),
        ("file,label\nC:\\0.png,a\n", "line 2: .* lies outside"),
        ("file,label\n\\\\server\\share\\0.png,a\n", "line 2: .* lies outside"),
        ("file,label\nlink.png,a\n", "line 2: link.png lies outside"),
        ("file,label\nlinked/outside.png,a\n", "line 2: .* lies outside"),
        ('file,label\n0.png,a\n"1.png,b\n', "line 3: the row cannot be read"),
        ('file,label\n0.png,a\n"1".png,b\n', "line 3: the row cannot be read"),
        ("file,label\nbroken.png,a\n0.png,b\n", r"line 2: .*broken\.png cannot be read as a pict"),
    ],
)
def test_wrong_tables_are_refused_with_file_and_line(
    root: Path, tmp_path: Path, text: str, complaint: str
) -> None:
    """Each error says where, what, and what to do; by both ways to load."""
    (root / "sub").mkdir()
    (root / "broken.png").write_text("no picture")
    outside = picture(tmp_path / "outside.png", 1)
    (root / "link.png").symlink_to(outside)
    (root / "linked").symlink_to(tmp_path)
    (root / "same.png").symlink_to("0.png")
    (root / "loop.png").symlink_to("loop.png")
    write(root, text)
    for read in (load_folder, load_folder_as_one):
        with pytest.raises(DataError, match=complaint) as caught:
            read(root)
        assert MANIFEST in caught.value.what
        assert caught.value.remedy


def test_other_encodings_are_refused_with_their_line(root: Path) -> None:
    """Old spreadsheets write Latin-1 or UTF-16."""
    write(root, "file,label\n0.png,a\n1.png,M\u00fcller\n", "latin-1")
    with pytest.raises(DataError, match="line 3: the text is not UTF-8") as caught:
        load_folder_as_one(root)
    assert "UTF-8" in caught.value.remedy
    write(root, "file,label\n0.png,a\n", "utf-16")
    with pytest.raises(DataError, match="line 1: the text is not UTF-8"):
        load_folder_as_one(root)


def test_lines_are_counted_as_an_editor_shows_them(root: Path) -> None:
    """Also below a cell with a line break in it."""
    write(root, 'file,label,note\n0.png,a,"two\nlines"\n\n1.png,,\n')
    with pytest.raises(DataError, match="line 5: the column label is empty"):
        load_folder_as_one(root)


def test_a_dead_link_is_no_absence(root: Path) -> None:
    """A manifest that cannot be reached must not change what the labels are."""
    (root / MANIFEST).symlink_to("gone.csv")
    with pytest.raises(DataError, match=r"manifest\.csv cannot be read"):
        load_folder(root)


def test_links_within_the_folder_are_fine(root: Path) -> None:
    """What counts is where they lead."""
    (root / "sub").mkdir()
    (root / "sub" / "link.png").symlink_to(root / "0.png")
    write(root, "file,label\nsub/link.png,a\n1.png,b\n")
    assert len(load_folder_as_one(root)[0]) == 2


def test_the_data_sets_digest_covers_the_table(tmp_path: Path) -> None:
    """Another label or patient is another data set; so is the cache's."""
    root = tmp_path / "x"
    for i in range(8):
        picture(root / f"{i}.png", i)
    text = "file,label,patient\n" + "".join(f"{i}.png,{'ab'[i % 2]},p{i}\n" for i in range(8))
    write(root, text)
    first = load_cached("folder", str(root))
    write(root, text.replace("p3", "p33"))
    second = load_cached("folder", str(root))
    assert first.sha256 != second.sha256
    write(root, text)
    assert load_cached("folder", str(root)).sha256 == first.sha256


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="../shared/data has no pbc_sample on this machine")
def test_real_pictures_with_patients(tmp_path: Path) -> None:
    """A table written for the real pictures, which lie in class folders."""
    rows = ["file;label;patient;split"]
    for i, path in enumerate(sorted(SAMPLE.glob("*/*.jpg"))):
        split = ("train", "train", "val", "test")[i % 4]
        rows.append(f"{path.relative_to(SAMPLE)};{path.parent.name};{split} {i // 16};{split}")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows))
    images, names, notes = load_folder_as_one(SAMPLE, manifest=table, crop=200)
    assert (len(images), len(names)) == (96, 8)
    assert len(np.unique(images.units())) == 18
    assert notes == ("column(s) of table.csv that were not used: split",)

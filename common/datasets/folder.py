"""A folder of pictures, one folder a class, as a hospital keeps them.

``DIR/<class>/*.jpg``, or ``DIR/{train,val,test}/<class>/*.jpg`` where the split is already made.
A folder inside a class folder is one patient: ``DIR/<class>/<patient>/*.jpg``; the same patient
name under two classes is the same patient. Byte-identical files belong together, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.datasets.base import (
    SPLITS,
    Dataset,
    ImageSet,
    IntArray,
    UInt8Array,
    absent_class_notes,
    file_digest,
)
from common.datasets.pictures import SUFFIXES, read_picture
from common.datasets.splitting import split_three
from common.errors import DataError

_LAYOUT = "Make one folder for each class and put its pictures there: DIR/<class>/*.jpg."


@dataclass(frozen=True)
class _File:
    """A picture that was found: where, of which class and patient, and its content's digest."""

    path: Path
    label: int
    patient: str
    digest: str


def load_folder(path: str | Path, *, image_size: int = 28, seed: int = 0, crop: int = 0) -> Dataset:
    """Load a folder of pictures as a data set; classes are its folders in alphabetical order.

    With folders train, val and test those are the splits, and the same file in two of them is an
    error. Otherwise 70/10/20, stratified, by content digest (and ``seed``): the same pictures
    always fall the same way, whatever they are called. Images are in digest order, so classes
    are mixed. Grey (one channel) only if every picture is. ``crop`` as in
    :func:`~common.datasets.pictures.read_picture`. The digest covers names and contents.

    Raises :class:`DataError`, naming the folder or file, for a missing folder, no class folders,
    a class without pictures, an unreadable picture, or some but not all of train, val, test.
    """
    root = _directory(path)
    names = [folder.name for folder in _subfolders(root)]
    made = [split for split in SPLITS if split in names]
    ignored: list[Path] = []
    if made and set(made) != set(SPLITS):
        raise DataError(
            f"{root} has the folder(s) {', '.join(made)} but not all of {', '.join(SPLITS)}.",
            "Make all three, or leave them out and have the split made.",
        )
    if made:
        classes = _class_folders(root / "train")
        lists = []
        for split in SPLITS:
            present = set(_class_folders(root / split))
            _refuse_unknown(root / split, present, classes)
            here = [name for name in classes if name in present]
            lists.append(_find(root / split, here, classes, ignored))
        _refuse_leaks(lists)
        how = "split as found"
        if beside := sorted(set(names) - set(SPLITS)):
            how += f"; folders beside train, val and test ignored: {', '.join(beside)}"
    else:
        classes = _class_folders(root)
        files = _find(root, classes, classes, ignored)
        labels = np.array([file.label for file in files], dtype=np.int64)
        keys = [hashlib.sha256(f"{seed}:{file.digest}".encode()).hexdigest() for file in files]
        lists = [[files[i] for i in part] for part in split_three(labels, _groups(files), keys)]
        how = f"split 70/10/20 by content, seed {seed}"
    everything = [file for part in lists for file in part]
    groups = _groups(everything)
    pixels = _read(everything, image_size, crop, channels=0)
    ends = np.cumsum([len(part) for part in lists])
    sets = []
    for part, end in zip(lists, ends, strict=True):
        order = np.array(
            sorted(range(end - len(part), end), key=lambda i: everything[i].digest), dtype=np.int64
        )
        labels = np.array([everything[i].label for i in order], dtype=np.int64)
        sets.append(ImageSet(pixels[order], labels, groups[order]))
    notes = (how, *_notes(root, everything, ignored))
    return Dataset(
        name="folder",
        source=f"folder of pictures {root.name}",
        sha256=_digest(root, everything),
        class_names=tuple(classes),
        train=sets[0],
        val=sets[1],
        test=sets[2],
        notes=notes + absent_class_notes(tuple(classes), zip(SPLITS, sets, strict=True)),
    )


def load_folder_as_one(
    path: str | Path,
    class_names: Sequence[str] = (),
    *,
    image_size: int = 28,
    channels: int = 0,
    crop: int = 0,
) -> tuple[ImageSet, tuple[str, ...], tuple[str, ...]]:
    """Load a hospital's own folder without splitting it; return (images, class names, notes).

    ``class_names`` is the federation's list, in its order: a hospital may lack a class, but a
    folder that is not on the list is an error. Without it the folders are the classes.
    ``channels`` is 1 or 3 as the federation's network takes, or 0 for what the pictures have.
    Groups are patients and identical files, as for :func:`load_folder`; so are the errors.
    """
    root = _directory(path)
    present = _class_folders(root)
    classes = list(class_names) or present
    _refuse_unknown(root, present, classes)
    ignored: list[Path] = []
    files = _find(root, [name for name in classes if name in present], classes, ignored)
    files.sort(key=lambda file: (file.digest, str(file.path)))
    labels = np.array([file.label for file in files], dtype=np.int64)
    images = ImageSet(_read(files, image_size, crop, channels), labels, _groups(files))
    notes = _notes(root, files, ignored)
    return images, tuple(classes), notes + absent_class_notes(tuple(classes), [(root.name, images)])


def _directory(path: str | Path) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        what = f"{root} is not a folder." if root.exists() else f"There is no folder {root}."
        raise DataError(what, "Point data-path at the folder that holds the class folders.")
    return root


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, hidden things left out, in name order."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed ({error.strerror or error}).",
            "Check that this user may read the folder.",
        ) from error


def _subfolders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _class_folders(folder: Path) -> list[str]:
    names = [entry.name for entry in _subfolders(folder)]
    if not names:
        raise DataError(f"{folder} has no class folders.", _LAYOUT)
    return names


def _refuse_unknown(root: Path, present: Iterable[str], classes: Sequence[str]) -> None:
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise DataError(
            f"{root} has folder(s) that are no class: {', '.join(unknown)}.",
            f"Rename or move them; the classes are {', '.join(classes)}.",
        )


def _find(
    root: Path, present: Sequence[str], classes: Sequence[str], ignored: list[Path]
) -> list[_File]:
    """List the pictures of the classes that are present; what is none goes to ``ignored``."""
    found: list[_File] = []
    for name in present:
        before = len(found)
        stack = [(entry, "") for entry in reversed(_entries(root / name))]
        while stack:
            entry, patient = stack.pop()
            if entry.is_dir():
                # Deeper folders (a patient's visits) still belong to the patient.
                who = patient or entry.name
                stack.extend((inner, who) for inner in reversed(_entries(entry)))
            elif entry.suffix.lower() in SUFFIXES:
                found.append(_File(entry, classes.index(name), patient, file_digest(entry)))
            else:
                ignored.append(entry)
        if len(found) == before:
            raise DataError(
                f"The class folder {root / name} has no pictures.",
                "Add pictures to it, or remove the folder.",
            )
    return found


def _refuse_leaks(lists: Sequence[Sequence[_File]]) -> None:
    """Refuse the same content, or the same patient, in two splits: it would flatter results."""
    seen: dict[str, tuple[int, Path]] = {}
    for number, files in enumerate(lists):
        for file in files:
            for key in (file.digest, f"patient {file.patient}" if file.patient else ""):
                if not key:
                    continue
                split, first = seen.setdefault(key, (number, file.path))
                if split != number:
                    same = "are the same picture" if key == file.digest else f"share the {key}"
                    raise DataError(
                        f"{first} and {file.path} {same}, in different splits.",
                        "Keep them in one split only: a test on what was trained on says nothing.",
                    )


def _groups(files: Sequence[_File]) -> IntArray:
    """Number the groups: files are joined by the same patient or the same content."""
    parent = list(range(len(files)))

    def root_of(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    seen: dict[tuple[str, str], int] = {}
    for i, file in enumerate(files):
        for key in (("content", file.digest), ("patient", file.patient)):
            if key[1]:
                a, b = root_of(seen.setdefault(key, i)), root_of(i)
                parent[max(a, b)] = min(a, b)
    roots = np.array([root_of(i) for i in range(len(files))], dtype=np.int64)
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def _read(files: Sequence[_File], image_size: int, crop: int, channels: int) -> UInt8Array:
    """Return uint8 (N, size, size, C); ``channels`` 0 means 1 only if every picture is grey."""
    if channels not in (0, 1, 3):
        raise DataError(f"{channels} channels were asked for.", "Choose 1 (grey) or 3 (RGB).")
    if image_size < 1:
        raise DataError(f"The image size is {image_size}.", "Choose 1 or more pixels.")
    pixels = np.empty((len(files), image_size, image_size, 3), dtype=np.uint8)
    colour = False
    for i, file in enumerate(files):
        pixels[i], has_colour = read_picture(file.path, image_size, crop)
        colour = colour or has_colour
    if channels == 3 or (channels == 0 and colour):
        return pixels
    if not colour:
        return pixels[..., :1].copy()
    # The usual luma weights in integers, as Pillow's own conversion.
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)
    luma = (pixels.astype(np.uint32) @ weights + 32768) >> 16
    return luma.astype(np.uint8)[..., np.newaxis]


def _digest(root: Path, files: Iterable[_File]) -> str:
    lines = sorted(f"{file.path.relative_to(root).as_posix()}\0{file.digest}" for file in files)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _notes(root: Path, files: Sequence[_File], ignored: Sequence[Path]) -> tuple[str, ...]:
    notes = []
    if ignored:
        some = ", ".join(str(path.relative_to(root)) for path in ignored[:3])
        notes.append(f"{len(ignored)} file(s) that are no pictures were ignored: {some}")
    labels: dict[str, set[int]] = {}
    for file in files:
        labels.setdefault(file.digest, set()).add(file.label)
    copies = len(files) - len(labels)
    if copies:
        notes.append(f"{copies} file(s) repeat another one byte for byte (kept together)")
    torn = sum(len(found) > 1 for found in labels.values())
    if torn:
        notes.append(f"{torn} picture(s) lie under more than one class: contradicting labels")
    return tuple(notes)

"""The pictures of a folder and what is known of each, by the folders in which they lie.

``DIR/<class>/*.jpg``, or ``DIR/{train,val,test}/<class>/*.jpg`` where the split is already made.
A folder inside a class folder is one patient: ``DIR/<class>/<patient>/*.jpg``; the same patient
name under two classes is the same patient. Where a manifest says so instead, see
:mod:`common.datasets.manifest`, which yields the same :class:`Listing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.datasets.base import SPLITS
from common.datasets.pictures import SUFFIXES
from common.errors import DataError

_LAYOUT = (
    "Make one folder for each class and put its pictures there (DIR/<class>/*.jpg), or write a "
    "manifest.csv with the columns file, label and patient."
)


@dataclass(frozen=True)
class Listed:
    """A picture: its file, class name, patient and split ("": unknown), and who says so."""

    path: Path
    label: str
    patient: str = ""
    split: str = ""
    line: str = ""

    def __str__(self) -> str:
        return f"{self.path} ({self.line})" if self.line else str(self.path)


@dataclass(frozen=True)
class Listing:
    """The pictures of ``root``, the names of the classes in label order, and notes on both.

    Either every file has a split or none. ``sha256`` is the manifest's, "" where there is none.
    """

    root: Path
    files: tuple[Listed, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    sha256: str = ""


def list_folders(root: Path, class_names: Sequence[str] = (), *, splits: bool) -> Listing:
    """List ``root`` by its folders; the classes are ``class_names``, or else the folders' names.

    With ``splits``, folders train, val and test are not classes but splits. Files that are no
    pictures are left out with a note; hidden ones without. Raises :class:`DataError`, naming the
    folder, for no class folders, a folder that is no class, a class without pictures, or some but
    not all of train, val and test.
    """
    names = [folder.name for folder in _subfolders(root)]
    made = [split for split in SPLITS if split in names] if splits else []
    if made and set(made) != set(SPLITS):
        raise DataError(
            f"{root} has the folder(s) {', '.join(made)} but not all of {', '.join(SPLITS)}.",
            "Make all three, or leave them out and have the split made.",
        )
    places = {split: root / split for split in made} or {"": root}
    classes = list(class_names) or _class_folders(next(iter(places.values())))
    files: list[Listed] = []
    ignored: list[Path] = []
    for split, place in places.items():
        present = set(_class_folders(place))
        if unknown := sorted(present - set(classes)):
            raise DataError(
                f"{place} has folder(s) that are no class: {', '.join(unknown)}.",
                f"Rename or move them; the classes are {', '.join(classes)}.",
            )
        for name in classes:
            if name in present:
                files += _class_folder(place / name, split, ignored)
    notes = []
    if made and (beside := sorted(set(names) - set(SPLITS))):
        notes.append(f"folders beside train, val and test ignored: {', '.join(beside)}")
    if ignored:
        some = ", ".join(str(path.relative_to(root)) for path in ignored[:3])
        notes.append(f"{len(ignored)} file(s) that are no pictures were ignored: {some}")
    return Listing(root, tuple(files), tuple(classes), tuple(notes))


def _class_folder(folder: Path, split: str, ignored: list[Path]) -> list[Listed]:
    """List the pictures of one class; what is none goes to ``ignored``."""
    found = []
    stack = [(entry, "") for entry in reversed(_entries(folder))]
    while stack:
        entry, patient = stack.pop()
        if entry.is_dir():
            # Deeper folders (a patient's visits) still belong to the patient.
            who = patient or entry.name
            stack.extend((inner, who) for inner in reversed(_entries(entry)))
        elif is_picture(entry):
            found.append(Listed(entry, folder.name, patient, split))
        else:
            ignored.append(entry)
    if not found:
        raise DataError(
            f"The class folder {folder} has no pictures.", "Add pictures to it, or remove it."
        )
    return found


def is_picture(path: Path) -> bool:
    """Tell by its name whether a file is a picture."""
    return path.suffix.lower() in SUFFIXES


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

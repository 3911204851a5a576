"""A table that says of each picture in a folder which class it is, and whose.

``DIR/manifest.csv`` with the header ``file,label,patient``: the file relative to the folder, the
name of the class, and any text that names the patient (the same text for the same patient, in
every version of the table). ``patient`` may be left out; a further column ``split`` (train, val or
test in every row) makes the splits. As Excel writes it: UTF-8 with or without a byte order mark,
``,`` or ``;`` between the cells, cells in quotation marks where needed. Backslashes in file names
are taken for slashes; blanks around a cell do not count.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from common.datasets.base import SPLITS, file_digest
from common.datasets.listing import Listed, Listing, is_picture
from common.errors import DataError

MANIFEST = "manifest.csv"
_COLUMNS = ("file", "label", "patient", "split")
_HEADER = "Write the header file,label,patient (or with ; between) into the first line."


def find_manifest(root: Path, manifest: str | Path = "") -> Path | None:
    """Return ``manifest``, or else the one in ``root``, or None where there is none."""
    if str(manifest):
        return Path(manifest).expanduser()
    path = root / MANIFEST
    # A dead link is a manifest that cannot be read, not the absence of one.
    return path if os.path.lexists(path) and not path.is_dir() else None


def list_manifest(
    root: Path, path: Path, class_names: Sequence[str] = (), *, splits: bool
) -> Listing:
    """List the pictures of ``root`` that the manifest ``path`` names, in its order.

    The classes are ``class_names``, or else the labels in alphabetical order. Pictures that it
    does not name are left out, with a note; so are columns that have no use here, and ``split``
    where ``splits`` is False. Raises :class:`DataError`, with file and line, for a table that
    cannot be read, a header without file and label, no rows, a label that is empty or no class, a
    file that is missing, listed twice or outside ``root``, and patients or splits in some rows
    only.
    """
    table = _read(path)
    if not table.rows:
        raise table.error(1, "there are no rows below the header.", "List a picture in each row.")
    used = _COLUMNS if splits else _COLUMNS[:-1]
    whose = table.column("patient", "Name the patient in every row, or leave the column out.")
    made = [""] * len(table.rows)
    if splits:
        remedy = "Write train, val or test into every row, or leave the column out."
        made = [split.casefold() for split in table.column("split", remedy)]
    labels = table.column("label", "Write the name of the class into every row.", needed=True)
    names = table.column("file", "Write the picture's file name into the row.", needed=True)
    lines = [line for line, _ in table.rows]
    _check_splits(table, lines, made)
    taught = {label for label, split in zip(labels, made, strict=True) if split in ("", "train")}
    classes = tuple(class_names) or tuple(sorted(taught))
    files = []
    seen: dict[Path, int] = {}
    real_root = root.resolve()
    for line, name, label, patient, split in zip(lines, names, labels, whose, made, strict=True):
        if label not in classes:
            raise table.error(
                line,
                f"{label!r} is no class." if class_names else f"train has no picture of {label!r}.",
                f"Correct the label; the classes are {', '.join(classes)}.",
            )
        file, real = _inside(table, line, root, real_root, name)
        if real in seen:
            raise table.error(
                line, f"{name} is already listed in line {seen[real]}.", "Keep one of the rows."
            )
        seen[real] = line
        files.append(Listed(file, label, patient, split, f"{path.name}, line {line}"))
    notes = []
    if others := [name for name in table.header if name and name not in used]:
        notes.append(f"column(s) of {path.name} that were not used: {', '.join(others)}")
    if not whose[0] and "patient" in table.header:
        notes.append(f"the column patient of {path.name} is empty: no patient is known")
    if left := _unlisted(root, {file.path for file in files}):
        notes.append(f"{left} picture(s) that {path.name} does not list were left out")
    return Listing(root, tuple(files), classes, tuple(notes), file_digest(path))


@dataclass(frozen=True)
class _Table:
    """A manifest's header and its rows: line number and cells, as many as the header's."""

    path: Path
    header: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]

    def error(self, line: int, what: str, remedy: str) -> DataError:
        return DataError(f"{self.path}, line {line}: {what}", remedy)

    def column(self, name: str, remedy: str, *, needed: bool = False) -> list[str]:
        """Return a column's cells; all empty or, where ``needed`` or any is filled, none."""
        if name not in self.header:
            return [""] * len(self.rows)
        at = self.header.index(name)
        cells = [row[at] for _, row in self.rows]
        if needed or any(cells):
            for (line, _), cell in zip(self.rows, cells, strict=True):
                if not cell:
                    raise self.error(line, f"the column {name} is empty.", remedy)
        return cells


def _read(path: Path) -> _Table:
    """Read and check the table's form: encoding, quoting, header, number of cells."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(
            f"The manifest {path} cannot be read ({error.strerror or error}).",
            "Check that the file exists and that this user may read it.",
        ) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: the text is not UTF-8.",
            "Save it as UTF-8 (in Excel: CSV UTF-8).",
        ) from error
    lines = _records(path, text)
    at, first = next(lines, (1, ()))
    header = tuple(n.casefold() if n.casefold() in _COLUMNS else n for n in first)
    table = _Table(path, header, ())
    missing = [name for name in ("file", "label") if name not in header]
    if missing:
        found = f"found: {', '.join(first)}" if first else "the file is empty"
        what = f"there is no header with the column(s) {', '.join(missing)} ({found})."
        raise table.error(at, what, _HEADER)
    for name in _COLUMNS:
        if header.count(name) > 1:
            raise table.error(at, f"two columns are called {name}.", "Rename or remove one.")
    rows = []
    for line, cells in lines:
        if any(cells[len(header) :]):
            what = f"there are {len(cells)} cells under a header of {len(header)}."
            raise table.error(line, what, "Put cells that hold a separator in quotation marks.")
        filled = (*cells, *[""] * len(header))
        rows.append((line, filled[: len(header)]))
    return _Table(path, header, tuple(rows))


def _records(path: Path, text: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the line number and the stripped cells of every row that is not blank."""
    first = text.lstrip().partition("\n")[0]
    delimiter = ";" if first.count(";") > first.count(",") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        for row in reader:
            cells = tuple(cell.strip() for cell in row)
            if any(cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: the row cannot be read ({error}).",
            "Check the quotation marks: one before and one after a cell, doubled inside it.",
        ) from error


def _check_splits(table: _Table, lines: Sequence[int], made: Sequence[str]) -> None:
    """Refuse what is no split, and a split without pictures, where splits are given at all."""
    if not made[0]:
        return
    for line, split in zip(lines, made, strict=True):
        if split not in SPLITS:
            raise table.error(
                line, f"{split!r} is no split.", f"Choose one of {', '.join(SPLITS)}."
            )
    if absent := [split for split in SPLITS if split not in made]:
        raise table.error(
            1,
            f"the column split has no row for {', '.join(absent)}.",
            "Use all three, or leave the column out and have the split made.",
        )


def _inside(table: _Table, line: int, root: Path, real_root: Path, name: str) -> tuple[Path, Path]:
    """Return the file ``name`` below ``root`` and where it really lies, inside ``root``."""
    relative = Path(name.replace("\\", "/"))
    outside = table.error(
        line,
        f"{name} lies outside the folder {root}.",
        "Put the picture into the folder and give its name relative to it, without '..'.",
    )
    if relative.is_absolute() or PureWindowsPath(name).is_absolute() or ".." in relative.parts:
        raise outside
    file = root / relative
    try:
        real, found = file.resolve(), file.is_file()
    except (OSError, RuntimeError, ValueError):  # a name too long, a loop of links, a zero byte
        real, found = real_root, False
    if not real.is_relative_to(real_root):
        raise outside
    if not found:
        raise table.error(
            line,
            f"there is no file {file}.",
            "Correct the name (upper and lower case count), or take the row out.",
        )
    return file, real


def _unlisted(root: Path, listed: set[Path]) -> int:
    """Count the pictures below ``root`` that are not ``listed``, hidden ones left out."""
    count = 0
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        count += sum(is_picture(path) and path not in listed for path in paths)
    return count

"""A file in MedMNIST's form: ``{train,val,test}_{images,labels}`` in one npz archive.

Images are uint8 (N, H, W) or (N, H, W, 1 or 3), labels integers (N,) or (N, 1) from 0 without a
gap. Two keys may be added: ``{split}_groups``, integers (N,), the same number for images of the
same patient, and ``class_names``, an array of strings. A patient keeps its number in every version
of the file: it is the patient's identity, as if it stood as text in a manifest. Nothing in the
file is ever unpickled.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from common.datasets.base import (
    SPLITS,
    Dataset,
    ImageSet,
    IntArray,
    UInt8Array,
    absent_class_notes,
    file_digest,
)
from common.datasets.identity import patient_digests
from common.errors import DataError

_FORM = (
    "Use MedMNIST's form: {train,val,test}_images as uint8 (N, H, W) or (N, H, W, 3) and "
    "{train,val,test}_labels as integers (N,) or (N, 1), written with numpy.savez_compressed."
)
MAX_BYTES = 64 * 2**30
"""Of one array, at most: the largest set of MedMNIST has 16 GiB. And no more than there is memory
in the machine: an archive of a megabyte may hold a gigabyte of zeros."""
_MAX_HEADER = 10_000
_MOST_NAMES = 10_000
_LONGEST_NAME = 1000


def load_npz(
    path: str | Path,
    *,
    name: str = "npz",
    source: str = "",
    class_names: tuple[str, ...] = (),
) -> Dataset:
    """Load a MedMNIST-form file; the digest is the file's SHA-256.

    Class names are ``class_names`` (which may hold classes that the file lacks), or the file's
    own, or MedMNIST's blood-cell names for a file with eight classes and "blood" in its name, or
    "class 0" and so on. Raises :class:`DataError`, naming the file and the key, for a missing or
    damaged file, a missing key, a wrong dtype or shape, lengths that differ, an empty split,
    negative labels, several labels an image, or a class number without a single image.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(
            f"{path} is not a file." if path.exists() else f"There is no file {path}.",
            "Point data-path at the npz file.",
        )
    arrays = _read(path)
    parts = {split: _split(path, arrays, split) for split in SPLITS}
    labels = np.concatenate([part.labels for part in parts.values()])
    names = class_names or _class_names(path, arrays, labels)
    if int(labels.max()) >= len(names):
        raise DataError(
            f"{path} has the label {int(labels.max())}, but there are {len(names)} class names.",
            "Number the classes from 0, or name every class.",
        )
    sets = [np.unique(part.groups) for part in parts.values()]
    notes = absent_class_notes(names, parts.items())
    if "train_groups" in arrays:
        shared = sum(len(s) for s in sets) - len(np.unique(np.concatenate(sets)))
        if shared:
            notes += (f"{shared} group(s) occur in more than one split of the file",)
    return Dataset(
        name=name,
        source=source or f"npz file {path.name}",
        sha256=file_digest(path),
        class_names=names,
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        notes=notes,
    )


def _read(path: Path) -> dict[str, Any]:
    """Read the known arrays of an archive, refusing anything that would need unpickling."""
    needed = [f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")]
    optional = [f"{split}_groups" for split in SPLITS] + ["class_names"]
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is not an npz archive.", _FORM)
    key = ""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            missing = [key for key in needed if f"{key}.npy" not in names]
            if missing:
                raise DataError(f"{path} lacks the key(s) {', '.join(missing)}.", _FORM)
            arrays = {}
            for key in needed + optional:
                if f"{key}.npy" in names:
                    arrays[key] = _array(archive, key)
    except DataError:
        raise
    except Exception as error:  # a decoder fed with damaged bytes may raise anything at all
        at = f" at the key {key}" if key else ""
        raise DataError(
            f"{path} cannot be read{at} ({error or type(error).__name__}).",
            "The file is damaged, or holds Python objects, which are never loaded; get it again "
            "or write it anew as plain arrays.",
        ) from error
    given = [key for key in optional[:3] if key in arrays]
    if given and len(given) < 3:
        raise DataError(f"{path} has {', '.join(given)} only.", "Give groups for all splits.")
    return arrays


def _array(archive: zipfile.ZipFile, key: str) -> Any:
    """One array of an archive; ValueError for a header that claims what it may not, or has not.

    Memory is taken for what its type and length can be, within :data:`MAX_BYTES` and the
    machine's memory, and for no more than the archive can unpack to.
    """
    entry = archive.getinfo(f"{key}.npy")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("it is compressed by a method that numpy does not write")
    with archive.open(entry) as file:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"its version is {version}")
        shape, fortran, dtype = read(file, max_header_size=_MAX_HEADER)
        _check_type(key, dtype, shape)
        size = dtype.itemsize * math.prod(shape)
        packed = Path(str(archive.filename)).stat().st_size
        # Deflate makes at most 1032 bytes of one; an entry has no more bytes than its archive.
        if size > min(MAX_BYTES, _memory(), 1032 * min(entry.compress_size, packed)):
            raise ValueError(f"it claims {size} bytes, more than there can be")
        flat = np.frombuffer(_exactly(file, size), dtype)
        return flat.reshape(shape, order="F" if fortran else "C")


def _check_type(key: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if key == "class_names":
        wrong = math.prod(shape) > _MOST_NAMES or dtype.itemsize > 4 * _LONGEST_NAME
    else:
        wrong = len(shape) > 8
    # Objects would be unpickled; text without a length, or records, are none of the keys'.
    if wrong or dtype.hasobject or dtype.kind not in "biufcSU" or not dtype.itemsize:
        raise ValueError(f"it is {dtype} of shape {shape}")


def _exactly(file: IO[bytes], size: int) -> bytearray:
    """``size`` bytes, taken as they come; ValueError where there are fewer, or more."""
    content = bytearray()
    while len(content) <= size and (piece := file.read(min(1 << 20, size + 1 - len(content)))):
        content += piece
    if len(content) != size:
        raise ValueError(f"it is not {size} bytes long, as its header says")
    return content


def _memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _split(path: Path, arrays: Mapping[str, Any], split: str) -> ImageSet:
    """Check one split and bring it to the shapes and dtypes of an :class:`ImageSet`."""
    images: UInt8Array = arrays[f"{split}_images"]
    if images.dtype != np.uint8:
        raise DataError(
            f"{path}: {split}_images is {images.dtype}, not uint8.",
            "Store 8-bit images with values 0 to 255.",
        )
    if images.ndim == 3:
        images = images[..., np.newaxis]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        raise DataError(
            f"{path}: {split}_images has the shape {arrays[f'{split}_images'].shape}.",
            "Store 2D images as (N, H, W) or (N, H, W, 3); volumes are not supported.",
        )
    if not len(images):
        raise DataError(f"{path}: {split}_images is empty.", "Give every split an image or more.")
    labels = _integers(path, arrays[f"{split}_labels"], f"{split}_labels", len(images))
    if int(labels.min()) < 0:
        raise DataError(
            f"{path}: {split}_labels has the negative label {int(labels.min())}.",
            "Number the classes from 0.",
        )
    if f"{split}_groups" in arrays:
        groups = _integers(path, arrays[f"{split}_groups"], f"{split}_groups", len(images))
        return ImageSet(images, labels, groups, patient_digests(str(n) for n in groups.tolist()))
    return ImageSet(images, labels)


def _integers(path: Path, array: Any, key: str, length: int) -> IntArray:
    """Return ``array`` as int64 (length,)."""
    if array.ndim == 2 and array.shape[1] > 1:
        raise DataError(
            f"{path}: {key} has {array.shape[1]} columns: several labels an image.",
            "Multi-label data is not supported; give each image one class number.",
        )
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2) or array.size != len(array):
        raise DataError(
            f"{path}: {key} is {array.dtype} of shape {array.shape}.",
            "Store integers of shape (N,) or (N, 1).",
        )
    if len(array) != length:
        raise DataError(
            f"{path}: {key} has {len(array)} entries for {length} images.",
            "Give one entry for each image.",
        )
    if array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{path}: {key} has a number over 64 bits.", "Use smaller numbers.")
    flat: IntArray = array.reshape(-1).astype(np.int64)
    return flat


def _class_names(path: Path, arrays: Mapping[str, Any], labels: IntArray) -> tuple[str, ...]:
    """Name the classes of a file for which the caller gave no names."""
    if "class_names" in arrays:
        stored = arrays["class_names"]
        if stored.dtype.kind != "U" or stored.ndim != 1:
            raise DataError(
                f"{path}: class_names is {stored.dtype} of shape {stored.shape}.",
                "Store a flat array of strings, one for each class.",
            )
        names = tuple(str(name) for name in stored)
        for name in names:
            if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
                raise DataError(
                    f"{path}: class_names has the name {name!r}.",
                    "Give each class a name of printable characters; they stand in reports.",
                )
        return names
    present = np.unique(labels)
    expected = np.arange(len(present))
    if not np.array_equal(present, expected):
        # Labels counted from 1 would otherwise train a phantom class 0 without a word.
        gap = int(expected[present != expected][0])
        raise DataError(
            f"{path}: no image in any split has the label {gap}, though labels go up "
            f"to {int(present[-1])}.",
            "Number the classes from 0 without a gap, or store their names as class_names.",
        )
    if len(present) == 8 and "blood" in path.name.lower():
        from common.datasets.medmnist_source import class_names

        return class_names("bloodmnist")
    return tuple(f"class {number}" for number in present)

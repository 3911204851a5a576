"""What every source of images yields: an :class:`ImageSet` a split, a :class:`Dataset` in all.

NumPy only: server, hospitals and command-line tools import this without a deep-learning library.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.datasets.identity import DIGEST_BYTES, digest_keys, link, picture_digests
from common.errors import DataError

UInt8Array = NDArray[np.uint8]
IntArray = NDArray[np.int64]

SPLITS = ("train", "val", "test")


def _no_groups() -> IntArray:
    return np.empty(0, dtype=np.int64)


def _no_patients() -> UInt8Array:
    return np.empty((0, DIGEST_BYTES), dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with labels, groups and identities, all of the same length N (which may be 0).

    ``images`` is uint8 of shape (N, H, W, C) with C = 1 or 3; ``labels`` is int64 (N,), never
    negative; ``groups`` is int64 (N,): images with the same number belong together (one patient,
    or identical pictures) and are not separated by a split, except where each privacy unit goes by
    itself (:func:`~common.datasets.splitting.split_independently`). Without groups every image is
    its own. ``patients`` is uint8 (N, 16): whose picture it is
    (:func:`~common.datasets.identity.patient_digest`), zeros where no patient is known.
    ``known_digests``, uint8 (N, 16), says which picture it is where the source has a larger
    original than ``images``; readers use :attr:`digests`. Sets may share memory (a cache, a
    view): treat the arrays as read-only.

    Raises :class:`DataError` when shapes, dtypes or lengths are not as above.
    """

    images: UInt8Array
    labels: IntArray
    groups: IntArray = field(default_factory=_no_groups)
    patients: UInt8Array = field(default_factory=_no_patients)
    known_digests: UInt8Array | None = None

    def __post_init__(self) -> None:
        """Check every guarantee that the class states."""
        images, labels = self.images, self.labels
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise DataError(
                f"Images are {images.dtype} of shape {images.shape}, not uint8 (N, H, W, 1 or 3).",
                "Convert the images to 8-bit grey or RGB with the channel as the last axis.",
            )
        if images.shape[1] < 1 or images.shape[2] < 1:
            raise DataError(
                f"Images of shape {images.shape} have no pixels.", "Give images a height and width."
            )
        if labels.dtype != np.int64 or labels.shape != (len(images),):
            raise DataError(
                f"Labels are {labels.dtype} of shape {labels.shape} for {len(images)} images.",
                "Give one int64 class number for each image.",
            )
        if len(labels) and int(labels.min()) < 0:
            raise DataError(
                f"A label is negative ({int(labels.min())}).", "Number the classes from 0."
            )
        if self.groups.size == 0:
            object.__setattr__(self, "groups", np.arange(len(images), dtype=np.int64))
        elif self.groups.dtype != np.int64 or self.groups.shape != (len(images),):
            raise DataError(
                f"Groups are {self.groups.dtype} of shape {self.groups.shape} "
                f"for {len(images)} images.",
                "Give one int64 group (patient) number for each image, or none at all.",
            )
        if self.patients.size == 0:
            nobody = np.zeros((len(images), DIGEST_BYTES), dtype=np.uint8)
            object.__setattr__(self, "patients", nobody)
        for what, array in (("Patients", self.patients), ("Digests", self.known_digests)):
            if array is None:
                continue
            if array.dtype != np.uint8 or array.shape != (len(images), DIGEST_BYTES):
                raise DataError(
                    f"{what} are {array.dtype} of shape {array.shape} for {len(images)} images.",
                    f"Give one row of {DIGEST_BYTES} bytes for each image, or none at all.",
                )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    @cached_property
    def digests(self) -> UInt8Array:
        """Which pictures they are: uint8 (N, 16), equal rows for identical pictures.

        See :func:`~common.datasets.identity.picture_digest`. Of the picture as its source holds
        it, before any crop or resize; where the source holds nothing but the array (npz, MedMNIST,
        synthetic) it is the array's, computed on first use (about 15 µs an image of 28 x 28).
        """
        return picture_digests(self.images) if self.known_digests is None else self.known_digests

    @property
    def has_patients(self) -> bool:
        """True only if there are images and the patient of every one is known."""
        return len(self) > 0 and bool(self.patients.any(axis=1).all())

    def linked(self) -> IntArray:
        """Return int64 (N,), numbers 0…U−1 of what no split may separate.

        Images share a number when they share their group, their patient or their picture, or are
        joined by a chain of such images. Asks for :attr:`digests`.
        """
        return link(self.groups.tolist(), digest_keys(self.patients), digest_keys(self.digests))

    def units(self) -> IntArray:
        """Return int64 (N,), numbers 0…U−1 of the privacy units where the unit is the patient.

        A unit is a patient, whatever pictures patients share: joined by shared pictures, patients
        would come apart again when one of them goes, and more than one unit would change. Raises
        :class:`DataError` unless :attr:`has_patients`: a promise to patients without knowing
        whose the pictures are would be false.
        """
        if not self.has_patients:
            unknown = int((~self.patients.any(axis=1)).sum())
            raise DataError(
                f"The patient is unknown for {unknown} of {len(self)} images, so that privacy "
                "cannot be promised to patients.",
                "Name the patient of every picture (a column patient in manifest.csv, or one "
                "folder a patient inside each class folder), or choose the image as privacy unit.",
            )
        return link(digest_keys(self.patients))

    def subset(self, indices: ArrayLike) -> ImageSet:
        """Return a copy of the images at integer ``indices``, in that order, identities kept.

        Raises :class:`DataError` for anything but a flat list of integers within range.
        """
        array = np.asarray(indices)
        if array.size == 0:
            array = array.astype(np.int64).reshape(-1)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(
                f"Indices are {array.dtype} of shape {array.shape}.",
                "Give a flat sequence of image numbers (for a mask: np.flatnonzero(mask)).",
            )
        if array.size and (int(array.min()) < 0 or int(array.max()) >= len(self)):
            raise DataError(
                f"Indices run from {int(array.min())} to {int(array.max())} "
                f"in a set of {len(self)} images.",
                "Give image numbers from 0 to the number of images less one.",
            )
        # What was computed once is handed on; what nobody asked for stays uncomputed.
        digests = self.__dict__.get("digests", self.known_digests)
        return ImageSet(
            self.images[array],
            self.labels[array],
            self.groups[array],
            self.patients[array],
            None if digests is None else digests[array],
        )

    def class_counts(self, num_classes: int) -> IntArray:
        """Return int64 (num_classes,): images of each class; DataError for a label beyond it."""
        if len(self) and int(self.labels.max()) >= num_classes:
            raise DataError(
                f"A label is {int(self.labels.max())}, but there are {num_classes} classes.",
                "Check that the number of classes belongs to this data set.",
            )
        return np.bincount(self.labels, minlength=num_classes).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in three splits, none of them empty, all of one image shape.

    ``source`` says in words where the images come from (so that no table can pass off synthetic
    or rebuilt images as something else), ``sha256`` is the hex digest of the content (for npz:
    of the file), ``notes`` are things a reader of results should know.
    Raises :class:`DataError` when a split is empty, shapes differ or a label has no class name.
    """

    name: str
    source: str
    sha256: str
    class_names: tuple[str, ...]
    train: ImageSet
    val: ImageSet
    test: ImageSet
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every guarantee that the class states."""
        if len(self.class_names) < 2 or len(set(self.class_names)) != len(self.class_names):
            raise DataError(
                f"{self.source} has the classes {list(self.class_names)}.",
                "A classifier needs two classes or more, each with a name of its own.",
            )
        for split in SPLITS:
            images = self.split(split)
            if not len(images):
                raise DataError(
                    f"{self.source} has no image in its {split} split.",
                    f"Provide images for {split}; every split needs at least one.",
                )
            if images.images.shape[1:] != self.image_shape:
                raise DataError(
                    f"{self.source}: {split} images have the shape {images.images.shape[1:]}, "
                    f"train images {self.image_shape}.",
                    "Bring all splits to one size and number of channels.",
                )
            images.class_counts(self.num_classes)

    def split(self, name: str) -> ImageSet:
        """Return the split called ``name`` (train, val or test)."""
        if name not in SPLITS:
            raise DataError(f"There is no split {name!r}.", f"Choose one of {', '.join(SPLITS)}.")
        return {"train": self.train, "val": self.val, "test": self.test}[name]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one image: (H, W, C)."""
        _, height, width, channels = self.train.images.shape
        return int(height), int(width), int(channels)

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return self.image_shape[2]

    def describe(self) -> dict[str, Any]:
        """Return a JSON-ready account: source, digest, shape, classes, counts a split, notes."""
        splits: dict[str, Any] = {}
        for split in SPLITS:
            images = self.split(split)
            counts = images.class_counts(self.num_classes)
            splits[split] = {
                "images": len(images),
                "groups": len(np.unique(images.groups)),
                "per_class": {n: int(c) for n, c in zip(self.class_names, counts, strict=True)},
            }
        return {
            "name": self.name,
            "source": self.source,
            "sha256": self.sha256,
            "image_shape": list(self.image_shape),
            "num_classes": self.num_classes,
            "class_names": list(self.class_names),
            "splits": splits,
            "notes": list(self.notes),
        }


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Return the hex digest of a file, read in pieces; DataError where it cannot be read."""
    import hashlib

    # Flagged as "not for security", or a FIPS build refuses MD5, which MedMNIST publishes.
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}).",
            "Check that the file exists and that this user may read it.",
        ) from error
    return digest.hexdigest()


def absent_class_notes(
    class_names: tuple[str, ...], splits: Iterable[tuple[str, ImageSet]]
) -> tuple[str, ...]:
    """Return a note for each split that lacks images of some class."""
    notes = []
    for split, images in splits:
        counts = images.class_counts(len(class_names))
        absent = [n for n, c in zip(class_names, counts, strict=True) if c == 0]
        if absent:
            notes.append(f"{split} has no image of: {', '.join(absent)}")
    return tuple(notes)

"""A folder of pictures as a hospital keeps it: by class folders, or with a manifest.

What is in it comes from :mod:`common.datasets.manifest` where there is a ``manifest.csv``, and
from :mod:`common.datasets.listing` (one folder a class) otherwise. From there on there is no
difference. The pictures of one patient belong together; so do identical pictures, which are those
with the same decoded pixels, whatever their files look like.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.datasets.base import (
    SPLITS,
    Dataset,
    ImageSet,
    UInt8Array,
    absent_class_notes,
    file_digest,
)
from common.datasets.identity import digest_keys, link, patient_digests, split_keys, stack_digests
from common.datasets.listing import Listed, Listing, list_folders
from common.datasets.manifest import find_manifest, list_manifest
from common.datasets.pictures import Picture, read_picture
from common.datasets.splitting import split_three
from common.errors import DataError


def load_folder(path: str | Path, *, image_size: int = 28, seed: int = 0, crop: int = 0) -> Dataset:
    """Load a folder of pictures as a data set; classes are in alphabetical order.

    With folders train, val and test, or a manifest's column split, those are the splits, and the
    same picture or patient in two of them is an error. Otherwise 70/10/20, stratified, by patient
    or decoded pixels (and ``seed``): the same pictures always fall the same way, whatever they
    are called. Images are in the order of their digests, so classes are mixed. Grey (one channel)
    only if every picture is. ``crop`` as in :func:`~common.datasets.pictures.read_picture`. The
    data set's SHA-256 covers names, contents and the manifest.

    Raises :class:`DataError`, naming the folder or file, for a missing folder, an unreadable
    picture, and all that :func:`~common.datasets.listing.list_folders` and
    :func:`~common.datasets.manifest.list_manifest` refuse.
    """
    listing = _list(path, splits=True)
    images, files, hashes = _load(listing, image_size, crop, channels=0)
    if files[0].split:
        _refuse_leaks(files, images)
        parts = [np.flatnonzero([file.split == split for file in files]) for split in SPLITS]
        how = "split as found"
    else:
        keys = split_keys(images.digests, images.patients, seed)
        parts = list(split_three(images.labels, images.groups, keys))
        how = f"split 70/10/20 by content, seed {seed}"
    sets = [images.subset(part) for part in parts]
    absent = absent_class_notes(listing.classes, zip(SPLITS, sets, strict=True))
    return Dataset(
        name="folder",
        source=f"folder of pictures {listing.root.name}",
        sha256=_digest(listing, files, hashes),
        class_names=listing.classes,
        train=sets[0],
        val=sets[1],
        test=sets[2],
        notes=(how, *listing.notes, *_notes(images), *absent),
    )


def load_folder_as_one(
    path: str | Path,
    class_names: Sequence[str] = (),
    *,
    image_size: int = 28,
    channels: int = 0,
    crop: int = 0,
    manifest: str | Path = "",
) -> tuple[ImageSet, tuple[str, ...], tuple[str, ...]]:
    """Load a hospital's own folder without splitting it; return (images, class names, notes).

    ``class_names`` is the federation's list, in its order: a hospital may lack a class, but a
    folder or label that is not on the list is an error. Without it what is found are the classes.
    ``channels`` is 1 or 3 as the federation's network takes, or 0 for what the pictures have.
    ``manifest`` is a manifest that lies elsewhere; its files are relative to ``path`` all the
    same. Groups, patients, order and errors are as for :func:`load_folder`.
    """
    listing = _list(path, class_names, manifest=manifest, splits=False)
    images, _, _ = _load(listing, image_size, crop, channels)
    absent = absent_class_notes(listing.classes, [(listing.root.name, images)])
    return images, listing.classes, (*listing.notes, *_notes(images), *absent)


def _list(
    path: str | Path, class_names: Sequence[str] = (), *, manifest: str | Path = "", splits: bool
) -> Listing:
    root = Path(path).expanduser()
    if not root.is_dir():
        what = f"{root} is not a folder." if root.exists() else f"There is no folder {root}."
        raise DataError(
            what, "Point data-path at the folder that holds manifest.csv or the class folders."
        )
    if table := find_manifest(root, manifest):
        return list_manifest(root, table, class_names, splits=splits)
    return list_folders(root, class_names, splits=splits)


def _load(
    listing: Listing, image_size: int, crop: int, channels: int
) -> tuple[ImageSet, list[Listed], list[str]]:
    """Read all pictures; return them, their files and the files' SHA-256, all in digest order."""
    pixels, digests = _read(listing.files, image_size, crop, channels)
    hashes = [file_digest(file.path) for file in listing.files]
    # Identical pictures (the same digest) in an order that does not hang on their names.
    order = sorted(
        range(len(hashes)), key=lambda i: (digests[i], hashes[i], str(listing.files[i].path))
    )
    files = [listing.files[i] for i in order]
    known = stack_digests([digests[i] for i in order])
    patients = patient_digests(file.patient for file in files)
    labels = np.array([listing.classes.index(file.label) for file in files], dtype=np.int64)
    groups = link(digest_keys(known), digest_keys(patients))
    images = ImageSet(pixels[order], labels, groups, patients, known)
    return images, files, [hashes[i] for i in order]


def _read(
    files: Sequence[Listed], image_size: int, crop: int, channels: int
) -> tuple[UInt8Array, list[bytes]]:
    """Return uint8 (N, size, size, C) and digests; ``channels`` 0: 1 only if every one is grey."""
    if channels not in (0, 1, 3):
        raise DataError(f"{channels} channels were asked for.", "Choose 1 (grey) or 3 (RGB).")
    if image_size < 1:
        raise DataError(f"The image size is {image_size}.", "Choose 1 or more pixels.")
    pixels = np.empty((len(files), image_size, image_size, 3), dtype=np.uint8)
    digests = []
    colour = False
    for i, file in enumerate(files):
        picture = _picture(file, image_size, crop)
        pixels[i] = picture.pixels
        digests.append(picture.digest)
        colour = colour or picture.colour
    if channels == 3 or (channels == 0 and colour):
        return pixels, digests
    if not colour:
        return pixels[..., :1].copy(), digests
    # The usual luma weights in integers, as Pillow's own conversion.
    weights = np.array([19595, 38470, 7471], dtype=np.uint32)
    luma = (pixels.astype(np.uint32) @ weights + 32768) >> 16
    return luma.astype(np.uint8)[..., np.newaxis], digests


def _picture(file: Listed, image_size: int, crop: int) -> Picture:
    try:
        return read_picture(file.path, image_size, crop)
    except DataError as error:
        if not file.line:
            raise
        raise DataError(f"{file.line}: {error.what}", error.remedy) from error


def _refuse_leaks(files: Sequence[Listed], images: ImageSet) -> None:
    """Refuse the same picture, or the same patient, in two splits: it would flatter results."""
    for what, digests in (("are the same picture", images.digests), ("", images.patients)):
        first: dict[bytes, Listed] = {}
        for file, key in zip(files, digest_keys(digests), strict=True):
            if key is None:
                continue
            other = first.setdefault(key, file)
            if other.split != file.split:
                raise DataError(
                    f"{other} and {file} {what or f'share the patient {file.patient}'}, "
                    "in different splits.",
                    "Keep them in one split only: a test on what was trained on says nothing.",
                )


def _digest(listing: Listing, files: Sequence[Listed], hashes: Sequence[str]) -> str:
    lines = [
        f"{file.path.relative_to(listing.root).as_posix()}\0{content}"
        for file, content in zip(files, hashes, strict=True)
    ]
    if listing.sha256:
        lines.append(f"\0{listing.sha256}")
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()


def _notes(images: ImageSet) -> tuple[str, ...]:
    """Say what a reader of results should know of copies and of unknown patients."""
    notes = []
    pictures = Counter(digest_keys(images.digests))
    if copies := len(images) - len(pictures):
        notes.append(f"{copies} file(s) repeat the picture of another one (kept together)")
    labelled = set(zip(digest_keys(images.digests), images.labels.tolist(), strict=True))
    torn = sum(count > 1 for count in Counter(picture for picture, _ in labelled).values())
    if torn:
        notes.append(f"{torn} picture(s) lie under more than one class: contradicting labels")
    unknown = int((~images.patients.any(axis=1)).sum())
    if 0 < unknown < len(images):
        notes.append(f"the patient of {unknown} in {len(images)} pictures is unknown")
    return tuple(notes)

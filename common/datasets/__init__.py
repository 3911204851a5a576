"""Images with labels from a file, a folder, MedMNIST or a generator, all in one shape.

``load`` takes the run config's ``dataset`` and ``data-path``; ``split_train_val`` and, where
privacy is promised, ``split_independently`` divide one hospital's images; ``load_folder_as_one``
reads a hospital's own folder, by class folders or by a manifest. An :class:`ImageSet` says which
picture each image is and whose, so that privacy can be accounted for across data set versions.
Importing this package costs NumPy only, and no deep-learning library is ever loaded.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

from common.datasets.base import SPLITS, Dataset, ImageSet, IntArray, UInt8Array
from common.datasets.folder import load_folder, load_folder_as_one
from common.datasets.identity import patient_digest, picture_digest
from common.datasets.manifest import MANIFEST
from common.datasets.medmnist_source import cached_file, fetch, load_medmnist, medmnist_names
from common.datasets.npz import load_npz
from common.datasets.splitting import split_independently, split_train_val
from common.datasets.synthetic import make_images, make_synthetic
from common.errors import DataError

__all__ = [
    "MANIFEST",
    "SPLITS",
    "Dataset",
    "ImageSet",
    "IntArray",
    "UInt8Array",
    "dataset_names",
    "load",
    "load_cached",
    "load_folder",
    "load_folder_as_one",
    "load_medmnist",
    "load_npz",
    "make_images",
    "make_synthetic",
    "medmnist_names",
    "patient_digest",
    "picture_digest",
    "split_independently",
    "split_train_val",
]

_WITH_PATH = ("npz", "folder")


def dataset_names() -> tuple[str, ...]:
    """Return every valid value of the key ``dataset``."""
    return ("synthetic", *_WITH_PATH, *medmnist_names())


def load(
    dataset: str,
    data_path: str = "",
    *,
    image_size: int = 28,
    seed: int = 0,
    synthetic_size: int = 6000,
    crop: int = 0,
) -> Dataset:
    """Load ``dataset``: "synthetic", "npz", "folder" or the name of a 2D MedMNIST set.

    ``data_path`` is the file or folder of npz and folder, and must be empty for the others.
    Images come out ``image_size`` square: folders are resized (after a centre ``crop``, see
    :func:`load_folder`), MedMNIST has fixed sizes, and an npz file must have that size already.
    ``seed`` makes the synthetic images and a folder's split; ``synthetic_size`` is the number of
    synthetic images in all. Raises :class:`DataError` for an unknown name (the message lists
    the valid ones) and for whatever the source raises.
    """
    if dataset in _WITH_PATH and not data_path:
        raise DataError(
            f"dataset={dataset} needs a path, and data-path is empty.",
            "Set data-path to the npz file, or to the folder with a manifest.csv or one folder for "
            "each class, or use dataset=synthetic.",
        )
    if dataset not in _WITH_PATH and data_path:
        # Ignoring it would train on other images than the user believes.
        raise DataError(
            f"data-path={data_path} is set, but dataset={dataset} takes no path.",
            "Use dataset=npz or dataset=folder with it, or leave data-path empty.",
        )
    if dataset == "synthetic":
        return make_synthetic(synthetic_size, image_size=image_size, seed=seed)
    if dataset == "folder":
        return load_folder(data_path, image_size=image_size, seed=seed, crop=crop)
    if dataset != "npz":
        return load_medmnist(dataset, image_size)
    loaded = load_npz(data_path)
    height, width, _ = loaded.image_shape
    if (height, width) != (image_size, image_size):
        raise DataError(
            f"The images in {data_path} are {height} x {width}, but image-size is {image_size}.",
            f"Set image-size={height}." if height == width else "Cut or pad them to squares.",
        )
    return loaded


@lru_cache(maxsize=2)
def _load_by_stamp(
    dataset: str, data_path: str, image_size: int, seed: int, size: int, crop: int, stamp: str
) -> Dataset:
    return load(
        dataset, data_path, image_size=image_size, seed=seed, synthetic_size=size, crop=crop
    )


def load_cached(
    dataset: str,
    data_path: str = "",
    *,
    image_size: int = 28,
    seed: int = 0,
    synthetic_size: int = 6000,
    crop: int = 0,
) -> Dataset:
    """Load as :func:`load`, keeping the last two data sets in this process.

    A file or folder whose sizes or times of change differ is loaded anew. The arrays are shared
    between callers: do not write to them.
    """
    stamp = ""
    if dataset in _WITH_PATH and data_path:
        stamp = _stamp(Path(data_path).expanduser())
    elif dataset != "synthetic" and not data_path:
        stamp = _stamp(cached_file(dataset, image_size) or fetch(dataset, image_size))
    return _load_by_stamp(dataset, data_path, image_size, seed, synthetic_size, crop, stamp)


def _stamp(path: Path) -> str:
    """Digest the names, sizes and times of change of a file or of all files in a folder."""
    lines = []
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        try:
            stat = os.stat(file)
        except OSError:  # a missing file or dead link: loading it says so properly
            continue
        lines.append(f"{file}\0{stat.st_mtime_ns}\0{stat.st_size}\0{stat.st_ino}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

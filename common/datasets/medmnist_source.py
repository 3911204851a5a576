"""The 2D single-label sets of MedMNIST, by name, from a cache or downloaded once.

A file is used only if its MD5 is the one that MedMNIST publishes, each time it is loaded: a
cached file is no more trusted than a downloaded one.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from common.datasets.base import Dataset, file_digest
from common.datasets.npz import load_npz
from common.errors import DataError

_TIMEOUT_S = 30.0
_SIZES = (28, 64, 128, 224)


@cache
def medmnist_info() -> dict[str, dict[str, Any]]:
    """Return MedMNIST's own table of data sets (url, MD5, labels, licence), by name.

    Raises :class:`DataError` when the medmnist package is missing or unlike what is known.
    """
    # ``import medmnist`` costs seconds (torch, scikit-learn, pandas) and even its info module
    # makes a directory in the home. The table is a literal: read it, run nothing.
    spec = importlib.util.find_spec("medmnist")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        file = Path(folder) / "info.py"
        if not file.is_file():
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "INFO" for target in node.targets
            ):
                table: dict[str, dict[str, Any]] = ast.literal_eval(node.value)
                return table
    raise DataError(
        "MedMNIST's table of data sets was not found.",
        "Install the medmnist package (pip install medmnist), or use dataset=npz, folder "
        "or synthetic.",
    )


def _refusal(name: str, info: dict[str, Any]) -> str:
    """Say why a set of MedMNIST cannot be used, or nothing."""
    if name.endswith("3d"):
        return "holds 3D volumes, and the networks here take 2D images"
    if "multi-label" in info["task"]:
        return "is multi-label, and each image needs exactly one class here"
    return ""


def medmnist_names() -> tuple[str, ...]:
    """Return the names of the MedMNIST sets that can be used."""
    return tuple(name for name, info in medmnist_info().items() if not _refusal(name, info))


def class_names(name: str) -> tuple[str, ...]:
    """Return the class names of a MedMNIST set in label order, without bracketed enumerations."""
    labels = medmnist_info()[name]["label"]
    return tuple(labels[str(i)].split("(")[0].strip() for i in range(len(labels)))


def data_home() -> Path:
    """Return the folder for downloads: ``$CONSILIUM_HOME/data``, by default in the home."""
    home = os.environ.get("CONSILIUM_HOME") or "~/.consilium"
    return Path(home).expanduser() / "data"


def _checked_info(name: str, image_size: int) -> tuple[dict[str, Any], str]:
    """Return the entry of a usable set and its suffix for ``image_size``."""
    table = medmnist_info()
    if name not in table:
        raise DataError(
            f"There is no data set {name!r}.",
            f"Choose synthetic, npz, folder or one of MedMNIST's: {', '.join(medmnist_names())}.",
        )
    info = table[name]
    if why := _refusal(name, info):
        raise DataError(
            f"The data set {name} {why}.", f"Choose one of: {', '.join(medmnist_names())}."
        )
    if image_size not in _SIZES:
        raise DataError(
            f"MedMNIST has no {name} at image-size {image_size}.",
            f"Choose one of the sizes {', '.join(map(str, _SIZES))}.",
        )
    return info, "" if image_size == 28 else f"_{image_size}"


def cached_file(name: str, image_size: int = 28) -> Path | None:
    """Return where the file already lies (not yet checked), or None.

    Looks in :func:`data_home`, then where the medmnist package itself keeps its downloads.
    """
    _, suffix = _checked_info(name, image_size)
    for folder in (data_home(), Path("~/.medmnist").expanduser()):
        file = folder / f"{name}{suffix}.npz"
        if file.is_file():
            return file
    return None


def fetch(name: str, image_size: int = 28, *, url: str = "", md5: str = "") -> Path:
    """Return the path of the set's file, its MD5 checked, downloading it where it is missing.

    ``url`` and ``md5`` replace MedMNIST's own (a mirror, a test). Raises :class:`DataError`
    for an unusable name or size, a file with another MD5, or a download that fails; a failed
    download leaves no file.
    """
    info, suffix = _checked_info(name, image_size)
    url = url or info[f"url{suffix}"]
    md5 = md5 or info[f"MD5{suffix}"]
    path = cached_file(name, image_size)
    if path is None:
        path = data_home() / f"{name}{suffix}.npz"
        _download(url, md5, path)
    found = file_digest(path, "md5")
    if found != md5:
        raise DataError(
            f"{path} has the MD5 {found}, but MedMNIST's {name} has {md5}: damaged or another "
            "file. It was not used.",
            "Delete or rename it, and it is downloaded again; to use it as it is, set "
            f"dataset=npz data-path={path}.",
        )
    return path


def _download(url: str, md5: str, path: Path) -> None:
    """Download to ``path``, which appears only once its MD5 is right."""
    remedy = (
        f"On another machine download {url} and put it at {path}; or use a file of your own "
        "(dataset=npz data-path=FILE), or dataset=synthetic, which needs no download."
    )
    try:
        import pooch
    except ImportError as error:
        raise DataError(f"{path} is missing, and pooch is not installed.", remedy) from error
    # A bar in a log file is noise; one on a terminal is what a waiting person wants.
    bar = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    pooch.get_logger().setLevel("WARNING")
    try:
        pooch.retrieve(
            url,
            known_hash=f"md5:{md5}",
            fname=path.name,
            path=path.parent,
            downloader=pooch.HTTPDownloader(progressbar=bar, timeout=_TIMEOUT_S),
        )
    except ValueError as error:
        raise DataError(
            f"What {url} sent is not the expected file (MD5 {md5}); nothing was kept.", remedy
        ) from error
    except OSError as error:  # requests' exceptions are OSErrors, too
        raise DataError(
            f"{path.name} is not on this machine and could not be downloaded from {url} "
            f"({type(error).__name__}: {error}).",
            remedy,
        ) from error


def load_medmnist(name: str, image_size: int = 28, *, url: str = "", md5: str = "") -> Dataset:
    """Load a 2D MedMNIST set with its official splits; errors as :func:`fetch` and the npz form."""
    path = fetch(name, image_size, url=url, md5=md5)
    info = medmnist_info()[name]
    dataset = load_npz(
        path,
        name=name,
        source=f"MedMNIST {name}, {image_size} x {image_size}, {info['license']}",
        class_names=class_names(name),
    )
    return dataset

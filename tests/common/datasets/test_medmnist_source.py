"""MedMNIST by name: cache, download, and the MD5 that is always checked."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from common.datasets import load, load_medmnist, medmnist_names
from common.datasets.medmnist_source import cached_file, class_names, fetch, medmnist_info
from common.errors import DataError
from tests.common.datasets.test_npz import write


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every download away from the real home, and every proxy away from 127.0.0.1."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CONSILIUM_HOME", str(tmp_path / "consilium"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "consilium" / "data"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serve a small file in MedMNIST's form; yield its URL and path."""
    folder = tmp_path / "www"
    folder.mkdir()
    path = write(folder / "blood.npz", classes=8)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(_Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/blood.npz?download=1", path
    server.shutdown()
    server.server_close()
    thread.join()


def md5(path: Path) -> str:
    """Return a file's MD5."""
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_names_are_the_2d_single_label_sets() -> None:
    """Eleven of MedMNIST's eighteen sets are usable."""
    names = medmnist_names()
    assert "bloodmnist" in names
    assert "chestmnist" not in names
    assert len(names) == 11
    assert not any(name.endswith("3d") for name in names)
    for name in names:
        assert len(set(class_names(name))) == len(medmnist_info()[name]["label"])


def test_table_equals_medmnists_own() -> None:
    """Reading the literal gives what importing the module gives."""
    info = pytest.importorskip("medmnist.info")
    assert medmnist_info() == info.INFO


@pytest.mark.parametrize(
    ("name", "size", "complaint"),
    [
        ("chestmnist", 28, "multi-label"),
        ("organmnist3d", 28, "3D volumes"),
        ("bloodmnist", 32, "image-size 32"),
        ("cifar10", 28, "no data set 'cifar10'"),
    ],
)
def test_unusable_sets_are_refused(name: str, size: int, complaint: str) -> None:
    """Before any download."""
    with pytest.raises(DataError, match=complaint) as caught:
        load(name, image_size=size)
    assert ("bloodmnist" in caught.value.remedy) == (size == 28)


def test_download_then_cache(served: tuple[str, Path], home: Path) -> None:
    """The first call downloads; the second needs no server."""
    url, path = served
    data = load_medmnist("bloodmnist", url=url, md5=md5(path))
    assert data.name == "bloodmnist"
    assert data.source.startswith("MedMNIST bloodmnist")
    assert data.class_names[7] == "platelet"
    assert [entry.name for entry in home.iterdir()] == ["bloodmnist.npz"]
    assert cached_file("bloodmnist") == home / "bloodmnist.npz"
    path.unlink()
    again = load_medmnist(
        "bloodmnist", url=url, md5=hashlib.md5((home / "bloodmnist.npz").read_bytes()).hexdigest()
    )
    assert again.sha256 == data.sha256


def test_wrong_download_leaves_nothing(served: tuple[str, Path], home: Path) -> None:
    """Another file than expected is not kept."""
    with pytest.raises(DataError, match="nothing was kept"):
        fetch("bloodmnist", url=served[0])
    assert not list(home.iterdir())


def test_cached_file_is_not_trusted(served: tuple[str, Path], home: Path) -> None:
    """A cached file with another MD5 is refused, kept, and named."""
    home.mkdir(parents=True)
    shutil.copy(served[1], home / "bloodmnist.npz")
    with pytest.raises(DataError, match="It was not used") as caught:
        load("bloodmnist")
    assert str(home / "bloodmnist.npz") in caught.value.what
    assert "dataset=npz" in caught.value.remedy
    assert (home / "bloodmnist.npz").is_file()


def test_medmnists_own_cache_is_found(served: tuple[str, Path], tmp_path: Path) -> None:
    """What the medmnist package downloaded is used where it lies."""
    own = tmp_path / "home" / ".medmnist"
    own.mkdir(parents=True)
    shutil.copy(served[1], own / "bloodmnist_64.npz")
    assert fetch("bloodmnist", 64, md5=md5(served[1])) == own / "bloodmnist_64.npz"


def test_offline(home: Path) -> None:
    """Nothing listens: the error says three ways out, and no file is left."""
    with pytest.raises(DataError, match="could not be downloaded") as caught:
        fetch("bloodmnist", url="http://127.0.0.1:9/bloodmnist.npz")
    assert str(home / "bloodmnist.npz") in caught.value.remedy
    assert "dataset=npz" in caught.value.remedy
    assert "dataset=synthetic" in caught.value.remedy
    assert not home.exists() or not list(home.iterdir())

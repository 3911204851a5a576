"""A few bytes that claim, or unpack to, many: what reads them takes memory for what is there."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import socket
import ssl
import struct
import threading
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict

from client_app.hospital_file import HospitalFolder
from common.datasets import load_npz
from common.datasets.pictures import read_picture
from common.errors import ConsiliumError, DataError, ProtocolError
from common.messages.wire import PACKED, arrays_to_record, record_to_arrays
from common.tensors import MAX_TENSORS, parse_tensors
from deploy.node import kits
from deploy.node.code import LIMIT, CodeError, shipped
from deploy.provision.demo import Demo, make

ZEROS = bytes(1 << 20)


@contextmanager
def at_most(megabytes: int) -> Iterator[None]:
    """Python's and NumPy's memory grows by no more meanwhile."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < megabytes * 1_000_000, f"{peak / 1e6:.0f} MB"


def packed(compressor: Any, megabytes: int) -> bytes:
    return b"".join(compressor.compress(ZEROS) for _ in range(megabytes)) + compressor.flush()


def entry(name: bytes, method: int, data: bytes, size: int) -> tuple[bytes, bytes]:
    """An archive's local part and its line of the directory, which claims ``size`` bytes."""
    told = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 33, 0, len(data), size, len(name), 0)
    local = b"PK\3\4" + told + name + data
    central = b"PK\1\2\x14\0" + told + bytes(6) + struct.pack("<II", 0, 0) + name
    return local, central


def archive(*entries: tuple[bytes, bytes]) -> bytes:
    """A zip file whose directory lines all point at its beginning."""
    local, central = (b"".join(part) for part in zip(*entries, strict=True))
    count = min(len(entries), 0xFFFF)
    return (
        local
        + central
        + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(central), len(local), 0)
    )


@pytest.mark.parametrize("claimed", [1, 2 * LIMIT])
@pytest.mark.parametrize(
    ("method", "compressor"),
    [
        (8, lambda: zlib.compressobj(1, zlib.DEFLATED, -15)),
        (12, lambda: bz2.BZ2Compressor(1)),
        (14, lambda: lzma.LZMACompressor(lzma.FORMAT_ALONE, preset=0)),
    ],
)
def test_a_shipped_app_that_unpacks_to_much_more_than_it_says_is_refused(
    method: int, compressor: Callable[[], Any], claimed: int
) -> None:
    """An archive took two thousand times its size, by the sizes that stood in it."""
    bomb = archive(entry(b"common/bomb.py", method, packed(compressor(), 40), claimed))
    assert len(bomb) < 1_000_000
    with at_most(8), pytest.raises(CodeError, match="no archive"):
        shipped(bomb)


def test_a_shipped_app_of_very_many_files_is_refused_before_they_are_listed() -> None:
    nothing = entry(b"common/a", 0, b"", 0)
    bomb = archive(nothing, *[(b"", nothing[1])] * 100_000)
    with at_most(8), pytest.raises(CodeError, match="no archive"):
        shipped(bomb)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bombs") / "demo"
    make(
        root,
        Demo(
            hospitals=1, name="demo", address="localhost:9092", hosts=["localhost"],
            data=None, images=240, image_size=28,
        ),
        datetime.now(UTC),
    )  # fmt: skip
    return root


def answered(federation: Path, answer: bytes) -> list[str]:
    """What a hospital makes of a server's answer, over TLS, to its question for a newer kit."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server = federation / "coordinator"
    context.load_cert_chain(server / "tls.crt", server / "private" / "tls.key")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            try:
                connection = context.wrap_socket(listening.accept()[0], server_side=True)
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)
            except OSError:  # it hung up in the middle
                pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            folder = HospitalFolder(federation / "hospital-00")
            return kits.update(folder, f"localhost:{listening.getsockname()[1]}")
        finally:
            thread.join(timeout=60)


def http(body: bytes, *headers: str) -> bytes:
    head = "\r\n".join(("HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers))
    return head.encode() + b"\r\n\r\n" + body


def test_a_servers_kit_is_not_unpacked(federation: Path) -> None:
    """A gzip took a thousand times its size in the process that starts the node."""
    bomb = packed(zlib.compressobj(1, zlib.DEFLATED, 31), 64)
    for coding in ("gzip", "deflate", "gzip, identity"):
        with (
            at_most(32),
            pytest.raises(ConsiliumError, match="packed, which was not asked for") as refused,
        ):
            answered(federation, http(bomb, f"Content-Encoding: {coding}"))
        assert "the installed kit stays" in refused.value.remedy


def test_a_servers_kit_is_read_no_further_than_a_kit_can_be_long(federation: Path) -> None:
    with at_most(64), pytest.raises(ConsiliumError, match=f"more than {kits.ANSWER_LIMIT} bytes"):
        answered(federation, http(bytes(3 * kits.ANSWER_LIMIT)))
    endless = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    endless += (b"100000\r\n" + ZEROS + b"\r\n") * 20
    with at_most(64), pytest.raises(ConsiliumError, match=f"more than {kits.ANSWER_LIMIT} bytes"):
        answered(federation, endless)


def test_a_servers_kit_that_comes_a_byte_at_a_time_is_given_up(
    federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kits, "WHOLE_TIMEOUT", -1.0)
    with pytest.raises(ConsiliumError, match="takes more than"):
        answered(federation, http(b"x"))


def header(told: dict[str, Any] | bytes, body: bytes = b"") -> bytes:
    raw = told if isinstance(told, bytes) else json.dumps(told).encode()
    return len(raw).to_bytes(8, "little") + raw + body


def tensor(shape: Any, begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "a header longer than the file": (1 << 60).to_bytes(8, "little") + b"{}",
    "a header beyond the limit": header(b" " * (1 << 21)),
    "more than was sent": header({"a": tensor([1 << 40], 0, 1 << 42)}, bytes(16)),
    "a product beyond 64 bits": header({"a": tensor([1 << 40, 1 << 40], 0, 4)}, bytes(4)),
    "a dimension beyond 64 bits": header({"a": tensor([1 << 70, 0], 0, 0)}),
    "a negative dimension": header({"a": tensor([-1, -4], 0, 16)}, bytes(16)),
    "a dimension that is no number": header({"a": tensor([True], 0, 4)}, bytes(4)),
    "many dimensions": header({"a": tensor([1] * 100, 0, 4)}, bytes(4)),
    "ranges that overlap": header({"a": tensor([4], 0, 16), "b": tensor([4], 0, 16)}, bytes(16)),
    "bytes of no tensor": header({"a": tensor([1], 0, 4)}, bytes(8)),
    "a gap": header({"a": tensor([1], 4, 8)}, bytes(8)),
    "a range backwards": header({"a": tensor([1], 4, 0)}, bytes(4)),
    "an unknown type": header({"a": tensor([1], 0, 1, "F8_E4M3")}, bytes(1)),
    "a type that is no text": header({"a": tensor([1], 0, 1, ["F32"])}, bytes(1)),
    "a name for a terminal": header({"\x1b[2J": tensor([1], 0, 4)}, bytes(4)),
    "a name twice": header(b'{"a":%b,"a":%b}' % ((json.dumps(tensor([0], 0, 0)).encode(),) * 2)),
    "nesting": header(b'{"a":' + b"[" * 100_000),
    "a list": header(b"[]"),
    "no table": header({"a": 1}),
    "very many": header({str(n): tensor([0], 0, 0) for n in range(MAX_TENSORS + 1)}),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_tensors_whose_header_lies_are_refused_before_anything_is_made_of_them(what: str) -> None:
    data = MALFORMED[what]
    with at_most(8), pytest.raises(ValueError, match=r"\w"):
        parse_tensors(data)
    record = RecordDict({"w": ArrayRecord({"packed": Array("safetensors", (1,), PACKED, data)})})
    with pytest.raises(ProtocolError, match="cannot be decoded"):
        record_to_arrays(record, "w")


def test_tensors_that_are_well_formed_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "b": np.array(7, np.int64),
        "empty": np.zeros((0, 5), np.float16),
        "flags": np.array([True, False]),
        "ü": rng.integers(0, 255, (2, 2, 2), dtype=np.uint8),
    }
    found = record_to_arrays(RecordDict({"w": arrays_to_record(arrays)}), "w")
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
        assert found[name].flags.writeable


def npy_header(text: str) -> bytes:
    padded = text.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(padded)) + padded


def described(dtype: str, shape: str) -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"


NPY = {
    "a terabyte of which nothing is there": npy_header(described("|u1", "(1000000, 1000, 1000)")),
    "a product beyond 64 bits": npy_header(described("|u1", f"({2**40}, {2**40}, 1)")),
    "a negative length": npy_header(described("|u1", "(-1, 28, 28)")),
    "objects": npy_header(described("|O", "(4, 28, 28)")),
    "a type of a gigabyte": npy_header(described("<U250000000", "(4,)")),
    "a header that is no literal": npy_header("{'descr': ("),
    "a header that nests": npy_header("(" * 100),
    "an unknown version": b"\x93NUMPY\x09\0" + npy_header("")[8:],
    "nothing": b"",
}


@pytest.mark.parametrize("what", NPY)
@pytest.mark.parametrize("key", ["train_images", "test_labels", "class_names"])
def test_arrays_whose_header_lies_are_refused(tmp_path: Path, what: str, key: str) -> None:
    path = tmp_path / "x.npz"
    plain: dict[str, Any] = {"class_names": np.array(["a", "b"])}
    for split in ("train", "val", "test"):
        plain[f"{split}_images"] = np.zeros((4, 5, 5, 3), np.uint8)
        plain[f"{split}_labels"] = np.arange(4) % 2
    np.savez(path, **plain)
    assert len(load_npz(path).train) == 4
    whole = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as changed:
        for name in whole.namelist():
            changed.writestr(name, NPY[what] if name == f"{key}.npy" else whole.read(name))
    with at_most(8), pytest.raises(DataError, match=f"cannot be read at the key {key}"):
        load_npz(path)


def test_an_npz_that_unpacks_to_more_than_there_is_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.datasets.npz._memory", lambda: 32 << 20)
    path = tmp_path / "x.npz"
    content = npy_header(described("|u1", "(67108864, 1, 1)")) + bytes(64 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        for split in ("train", "val", "test"):
            made.writestr(f"{split}_images.npy", content if split == "train" else b"")
            made.writestr(f"{split}_labels.npy", b"")
    del content
    with at_most(8), pytest.raises(DataError, match="claims 67108864 bytes"):
        load_npz(path)


def png(width: int, height: int, body: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


PICTURES = {
    "x.png": png(60_000, 60_000, packed(zlib.compressobj(1), 1)),
    "cut.png": png(4000, 4000, packed(zlib.compressobj(1), 1)),
    "x.bmp": bmp(60_000, 60_000),
    "negative.bmp": bmp(-60_000, -60_000),
    "x.ppm": b"P6 60000 60000 255\n" + bytes(100),
    "endless.ppm": b"P6 " + b"9" * 10_000,
    "x.tif": b"II*\0\x08\0\0\0" + struct.pack("<H", 2)
    + struct.pack("<HHII", 256, 4, 1, 60_000) + struct.pack("<HHII", 257, 4, 1, 60_000) + bytes(4),
    "loop.tif": b"II*\0\x08\0\0\0" + struct.pack("<H", 0) + struct.pack("<I", 8),
    "x.webp": b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10)
    + bytes(4) + b"\xfe\x3f\0\xfe\x3f\0",
    "x.jpg": b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x11\x00\x02\x11\x01\x03\x11\x01"
    + b"\xff\xda",
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_whose_header_lies_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PICTURES[name])
    with at_most(64), pytest.raises(DataError, match=name):
        read_picture(path, 28)


def test_a_picture_file_that_is_too_long_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.ppm"
    with path.open("wb") as file:
        file.truncate(500_000_000)  # a hole: takes no room
    with pytest.raises(DataError, match="more than 400 MB"):
        read_picture(path, 28)

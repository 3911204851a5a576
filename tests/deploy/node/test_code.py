"""At a hospital runs what it has installed: any other app is refused before it is unpacked."""

from __future__ import annotations

import io
import zipfile
from functools import cache

import pytest
from flwr.cli.build import build_fab_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.node.code import CodeError, check, installed, shipped
from deploy.server.launch import APP

OWN = installed()


@cache
def _built() -> bytes:
    return build_fab_from_disk(APP)


@pytest.fixture
def archive() -> bytes:
    return _built()


def rewritten(archive: bytes, changes: dict[str, bytes | None]) -> bytes:
    """The archive with files replaced, added, or (None) left out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            if name not in changes:
                new.writestr(name, old.read(name))
        for name, content in changes.items():
            if content is not None:
                new.writestr(name, content)
    return out.getvalue()


def test_the_app_that_flower_builds_from_this_source_is_the_installed_one(archive: bytes) -> None:
    check(archive, OWN)
    assert "client_app/app.py" in OWN and "common/privacy/engine.py" in OWN
    assert not any(name.startswith("server_app") for name in OWN)


def test_what_the_coordinator_runs_on_its_own_side_is_its_own_business(archive: bytes) -> None:
    check(rewritten(archive, {"server_app/app.py": b"other", "server_app/new.py": b""}), OWN)


@pytest.mark.parametrize(
    "changes",
    [
        {"client_app/app.py": b"import os\n"},
        {"client_app/app.py": None},
        {"client_app/extra.py": b""},
        {"client_app/extra.so": b"\x7fELF"},
        {"common/sub/new.pth": b"import os"},
        {"common/errors.py": b"x"},
    ],
)
def test_a_file_of_the_hospitals_part_that_differs_is_refused_and_named(
    archive: bytes, changes: dict[str, bytes | None]
) -> None:
    with pytest.raises(CodeError) as refused:
        check(rewritten(archive, changes), OWN)
    assert next(iter(changes)) in refused.value.what


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(sorted(OWN)), position=st.floats(0, 1, exclude_max=True))
def test_no_byte_of_the_hospitals_part_can_be_changed(name: str, position: float) -> None:
    archive = _built()
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        content = bytearray(packed.read(name))
    if not content:
        content = bytearray(b"\n")
    else:
        content[int(position * len(content))] ^= 1
    with pytest.raises(CodeError):
        check(rewritten(archive, {name: bytes(content)}), OWN)


def test_two_files_of_one_name_are_refused(archive: bytes) -> None:
    out = io.BytesIO(archive)
    with zipfile.ZipFile(out, "a") as packed, pytest.warns(UserWarning, match="Duplicate"):
        packed.writestr("client_app/app.py", packed.read("client_app/app.py"))
    with pytest.raises(CodeError):
        check(out.getvalue(), OWN)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_of_the_app_is_refused(content: bytes) -> None:
    with pytest.raises(CodeError):
        check(content, OWN)


def test_an_archive_that_unpacks_to_gigabytes_is_refused_unread() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("common/zeros.py", bytes(40_000_000))
    with pytest.raises(CodeError, match="no archive"):
        shipped(out.getvalue())

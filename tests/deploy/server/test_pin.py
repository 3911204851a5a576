"""The server runs the app that is installed beside it, and no other."""

from __future__ import annotations

import importlib
import inspect
import io
import shutil
import tracemalloc
import zipfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.server.launch import APP
from deploy.server.pin import PinError, check, installed, pin

FLOWERS = "flwr.superlink.runtime.run_serverapp"


def rewritten(archive: bytes, changes: dict[str, bytes | None]) -> bytes:
    """The archive with files replaced, added, or (None) left out."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            if name not in changes:
                new.writestr(name, old.read(name))
        for name, content in changes.items():
            if content is not None:
                new.writestr(name, content)
    return out.getvalue()


@cache
def built() -> bytes:
    return build_fab_from_disk(APP)


def test_the_app_that_a_run_is_started_with_from_this_installation_is_taken() -> None:
    check(built(), OWN, OWN)


OWN = installed()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(OWN)), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
def test_no_byte_of_its_code_can_be_another(name: str, position: float, change: int) -> None:
    with zipfile.ZipFile(io.BytesIO(built())) as packed:
        content = bytearray(packed.read(name) or b"\n")
    content[int(position * len(content))] ^= change
    with pytest.raises(PinError, match="not the one that is installed") as refused:
        check(rewritten(built(), {name: bytes(content)}), OWN, OWN)
    assert name in refused.value.what


@pytest.mark.parametrize(
    "changes",
    [
        {"server_app/extra.py": b""}, {"server_app/x.so": b"\x7fELF"}, {"server_app/app.py": None},
        {"common/sub/new.pth": b"import os"}, {"client_app/app.py": b""}, {"pyproject.toml": b""},
        {"pyproject.toml/../x.py": b""},
    ],
)  # fmt: skip
def test_no_file_of_its_code_can_be_added_or_left_out(changes: dict[str, bytes | None]) -> None:
    with pytest.raises(PinError) as refused:
        check(rewritten(built(), changes), OWN, OWN)
    assert next(iter(changes)) in refused.value.what


def test_two_files_of_one_name_are_refused() -> None:
    out = io.BytesIO(built())
    with zipfile.ZipFile(out, "a") as packed, pytest.warns(UserWarning, match="Duplicate"):
        packed.writestr("server_app/app.py", packed.read("server_app/app.py"))
    with pytest.raises(PinError):
        check(out.getvalue(), OWN, OWN)


def test_a_bomb_is_refused_unread() -> None:
    bomb = rewritten(built(), {"server_app/zeros.py": bytes(50_000_000)})
    tracemalloc.start()
    try:
        with pytest.raises(PinError, match="zeros"):
            check(bomb, OWN, OWN)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_note_beside_the_code_changes_nothing() -> None:
    check(rewritten(built(), {"README.md": b"a note", "demo/README.md": b""}), OWN, OWN)


@settings(deadline=None)
@given(st.one_of(st.binary(), st.tuples(st.integers(0, 60), st.binary(min_size=1)).map(
    lambda cut: built()[: -22 - cut[0]] + cut[1])))  # fmt: skip
def test_what_is_no_archive_is_refused(archive: bytes) -> None:
    with pytest.raises(PinError):
        check(archive, OWN, OWN)


def test_code_that_was_changed_under_a_running_server_is_not_run() -> None:
    with pytest.raises(PinError, match="changed since") as refused:
        check(built(), OWN, OWN | {"server_app/app.py": (1, b"")})
    assert "start the server again" in refused.value.remedy


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = importlib.import_module(FLOWERS)
    for name in ("install_from_fab", "get_project_dir", "run_"):
        monkeypatch.setattr(found, name, getattr(found, name))
    return found


def test_the_names_that_are_replaced_are_the_ones_that_flower_calls(module: ModuleType) -> None:
    source = inspect.getsource(module.run_serverapp)
    calls = ("install_from_fab(fab.content", "get_project_dir(", "context = run_(")
    assert all(call in source for call in calls)
    # Checked before anything of the archive is read, or anything is loaded.
    places = [source.index(call) for call in (calls[0], "get_fab_metadata(", *calls[1:])]
    assert places == sorted(places)
    with pytest.raises(RuntimeError, match="any more"):
        pin(ModuleType("another"), {})


def test_nothing_of_another_app_is_unpacked_or_imported(
    module: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pin(module, installed())
    for name in ("common", "client_app", "server_app"):
        shutil.copytree(APP / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(APP / name, tmp_path / name)
    module.install_from_fab(build_fab_from_disk(tmp_path), skip_prompt=True)  # as it is: taken
    (tmp_path / "server_app" / "app.py").write_text("raise SystemExit\n")
    with pytest.raises(PinError):
        module.install_from_fab(build_fab_from_disk(tmp_path), skip_prompt=True)
    assert "refused a run" in caplog.text
    module.install_from_fab(built(), skip_prompt=True)
    assert module.get_project_dir("publisher/other", "9.9", "00") == APP


def test_what_runs_is_the_installed_app_whatever_the_archive_names(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import server_app.app

    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(server_app.app, "app", lambda **given: seen.append(given))
    pin(module, {})
    context = object()
    made = module.run_(
        grid="grid", server_app_dir="/evil", server_app_attr="evil:app", context=context
    )
    assert made is context and seen == [{"grid": "grid", "context": context}]

"""Reading a ledger changes nothing, and says who may where one may not."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from common.privacy.ledger import chain
from tests.deploy.ledger.building import RUN, consilium, error, home, said, snapshot, told, train


def test_reading_changes_nothing(path: Path, tmp_path: Path) -> None:
    train(path, rounds=1, settled=0)
    before = snapshot(home())
    for arguments in (["show", "--entries"], ["verify"], ["export", tmp_path / "out.json"]):
        said(*arguments)
    assert consilium("close", RUN, answer="n\n").exit_code == 1
    assert snapshot(home()) == before


def test_reading_makes_no_ledger(tmp_path: Path) -> None:
    for arguments in (["show"], ["verify"], ["export", tmp_path / "o"], ["close", RUN, "--yes"]):
        assert "no privacy ledger" in error(*arguments).what
        assert "no privacy ledger" in error(*arguments, "--home", tmp_path).what
        assert "no directory" in error(*arguments, "--home", tmp_path / "nowhere").what
    assert list(tmp_path.iterdir()) == []


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write anywhere: be nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home that others may read, outside pytest's private directories; modules are loaded."""
    directory = Path(tempfile.mkdtemp())
    monkeypatch.setenv("CONSILIUM_HOME", str(directory))
    train(directory / "ledger.sqlite", rounds=1)
    said("show")
    said("verify")
    yield directory
    directory.chmod(0o755)
    shutil.rmtree(directory)


def test_a_read_only_directory_is_enough_to_show_and_verify(public: Path) -> None:
    for file in public.iterdir():
        file.chmod(0o444)
    public.chmod(0o555)
    with unprivileged():
        assert told("show")["runs"][0]["rounds_used"] == 1
        assert told("verify")["entries"] == 5
        refused = error("close", RUN, "--yes")
    assert "belongs to" in refused.what or "read-only" in refused.what


def test_a_ledger_that_one_may_not_read_says_who_may(public: Path) -> None:
    path = public / "ledger.sqlite"
    public.chmod(0o755)
    path.chmod(0o000)
    with unprivileged():
        refused = error("verify")
    assert (refused.what, "user" in refused.remedy) == (f"you may not read {path}", True)
    public.chmod(0o000)
    with unprivileged():
        refused = error("show", "--home", public)
    assert "cannot be read" in refused.what and "user" in refused.remedy


def test_a_half_done_change_is_undone_where_one_may_write_and_told_where_not(
    public: Path, tmp_path: Path
) -> None:
    path = public / "ledger.sqlite"
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA cache_size=1")  # so that it writes before it commits
    database.execute("BEGIN IMMEDIATE")
    row = ("x", "train", b"i" * 16, b"p" * 16)
    database.executemany("INSERT INTO members VALUES (?,?,?,?)", [row] * 2000)
    for name in ("ledger.sqlite", "ledger.sqlite-journal"):  # as a power cut would leave them
        shutil.copy(public / name, tmp_path / name)
    database.execute("ROLLBACK")
    database.close()
    for name in ("ledger.sqlite", "ledger.sqlite-journal"):
        shutil.copy(tmp_path / name, public / name)
        (public / name).chmod(0o444)
    (public / "ledger.head").chmod(0o444)
    public.chmod(0o555)
    with unprivileged():
        refused = error("show")
    assert "half done" in refused.what and "ledger.sqlite-journal" in refused.what
    public.chmod(0o755)
    path.chmod(0o600)
    (public / "ledger.sqlite-journal").chmod(0o600)
    assert told("verify")["entries"] == 5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_only_the_ledgers_owner_changes_it(path: Path) -> None:
    train(path, rounds=1)
    os.chown(path, 65534, 65534)
    before = snapshot(home())
    assert "belongs to" in error("close", RUN, "--yes").what
    assert said("verify")
    assert snapshot(home()) == before


@pytest.mark.parametrize(
    ("lock", "refused"),
    [
        ("BEGIN EXCLUSIVE", [["show"], ["verify"], ["close", RUN, "--yes"]]),
        ("BEGIN IMMEDIATE", [["close", RUN, "--yes"]]),  # reading may go on beside it
    ],
)
def test_a_ledger_that_another_program_holds_is_told_in_two_parts(
    path: Path, monkeypatch: pytest.MonkeyPatch, lock: str, refused: list[list[str]]
) -> None:
    train(path, rounds=1)
    monkeypatch.setattr(chain, "BUSY_SECONDS", 0.1)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute(lock)
        for arguments in refused:
            found = error(*arguments)
            assert "locked" in found.what and str(path) in found.what and found.remedy
        if ["show"] not in refused:
            assert said("show")
    assert told("show")["runs"][0]["state"] == "active"

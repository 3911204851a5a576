"""A ledger that was changed is found out, and never taken for an empty one."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.privacy.ledger import Chain, Ledger, LedgerError, check_members
from tests.common.privacy.ledger.building import LIMITS, data, plan, promise

NAME = "ledger.sqlite"
COLUMNS = (
    "seq", "time", "kind", "run", "round", "dataset", "part", "mechanism", "unit",
    "sampling_rate", "noise_multiplier", "steps", "pure_epsilon", "model", "refers", "note",
    "previous", "hash",
)  # fmt: skip
TABLES = ("meta", "entries", "members")
ENTRIES = 14
"""Of the ledger that is tampered with."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ledger: two runs, two versions of a data set, 14 entries, 20 members."""
    folder = tmp_path_factory.mktemp("ledger")
    with Ledger(folder / NAME) as ledger:
        whose = {n: n // 2 for n in range(10)}
        for run, parts in (
            ("a", data(range(8), (8, 9), whose)),
            ("b", data(range(1, 9), (0, 9), whose)),
        ):
            ledger.admit(run, promise(), parts, LIMITS, lambda: plan(sigma=9.0))
            ledger.settle(ledger.reserve_round(run, 1, "m"))
            ledger.reserve_round(run, 2, "n")
            assert ledger.reserve_validation(run, 1, "m") is not None
        assert ledger.chain.verify() == ENTRIES
    return folder


@contextmanager
def copy_of(whole: Path) -> Iterator[Path]:
    """A copy to be tampered with: the ledger's path."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        yield Path(folder) / NAME


def change(path: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    """Change the file as somebody does who knows SQLite: without the triggers."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        for statement, values in statements:
            db.execute(statement, values)


def found_out(path: Path) -> LedgerError:
    """The error of opening and checking the ledger: in two parts, with nothing raw in between."""
    with pytest.raises(LedgerError) as caught, Ledger(path) as ledger:
        check_members(ledger.chain)
    assert caught.value.what and caught.value.remedy
    # Asked again, it is no better: the first refusal has not made a new ledger of it.
    with pytest.raises(LedgerError), Ledger(path) as ledger:
        check_members(ledger.chain)
    return caught.value


anything = st.one_of(
    st.none(),
    st.integers(-1000, 1000) | st.sampled_from((-(2**62), 2**62)),
    st.floats(),
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.binary(max_size=20),
)


def cell(path: Path, table: str, column: str, row: int) -> tuple[object, ...]:
    with closing(sqlite3.connect(path)) as db:
        query = f"SELECT typeof({column}), {column} FROM {table} ORDER BY rowid LIMIT 1 OFFSET ?"
        return tuple(db.execute(query, (row,)).fetchone())


def edit(path: Path, table: str, column: str, row: int, value: object) -> None:
    """Change one cell; an example that the schema refuses, or that changes nothing, is none."""
    before = cell(path, table, column, row)
    rowid = f"(SELECT rowid FROM {table} ORDER BY rowid LIMIT 1 OFFSET {row})"
    try:
        change(path, (f"UPDATE {table} SET {column} = ? WHERE rowid = {rowid}", (value,)))
    except (sqlite3.Error, OverflowError):
        assume(False)
    if column != "seq":  # which is the rowid: the row may be another now
        assume(cell(path, table, column, row) != before)


@settings(max_examples=100, deadline=None)
@given(column=st.sampled_from(COLUMNS), row=st.integers(0, ENTRIES - 1), value=anything)
def test_an_edited_entry_is_found(whole: Path, column: str, row: int, value: object) -> None:
    with copy_of(whole) as path:
        if column == "seq":
            assume(cell(path, "entries", column, row)[1] != value)
        edit(path, "entries", column, row, value)
        found_out(path)


@settings(max_examples=50, deadline=None)
@given(
    column=st.sampled_from(("dataset", "part", "image", "patient")), row=st.integers(0, 19),
    value=anything,
)  # fmt: skip
def test_an_edited_member_is_found(whole: Path, column: str, row: int, value: object) -> None:
    with copy_of(whole) as path:
        edit(path, "members", column, row, value)
        found_out(path)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM members WHERE rowid = 3",
        "DELETE FROM members",
        "INSERT INTO members SELECT * FROM members WHERE rowid = 3",
        "UPDATE members SET part = 'test' WHERE rowid = 3",
        "UPDATE members SET dataset = (SELECT dataset FROM members WHERE rowid = 20)",
        "DROP TABLE members",
    ],
)
def test_members_that_are_no_longer_those_of_the_entry_are_found(
    whole: Path, statement: str
) -> None:
    with copy_of(whole) as path:
        change(path, (statement, ()))
        found_out(path)


def test_no_run_is_admitted_by_a_ledger_whose_members_were_edited(whole: Path) -> None:
    """Whoever takes an image out of the ledger's list would give it a new budget."""
    with copy_of(whole) as path:
        change(path, ("DELETE FROM members", ()))
        with pytest.raises(LedgerError), Ledger(path) as ledger:
            ledger.admit("c", promise(), data(range(8), (8, 9)), LIMITS, plan)


@pytest.mark.parametrize("row", range(1, ENTRIES))
def test_an_entry_that_was_taken_out_is_found(whole: Path, row: int) -> None:
    with copy_of(whole) as path:
        change(path, ("DELETE FROM entries WHERE seq = ?", (row,)))
        assert f"entry {row}" in str(found_out(path))


@pytest.mark.parametrize("row", range(1, ENTRIES))
def test_an_entry_taken_out_is_found_though_the_others_close_ranks(whole: Path, row: int) -> None:
    with copy_of(whole) as path:
        change(
            path,
            ("DELETE FROM entries WHERE seq = ?", (row,)),
            ("UPDATE entries SET seq = seq - 1 WHERE seq > ?", (row,)),
        )
        found_out(path)


@pytest.mark.parametrize("left", range(ENTRIES))
def test_entries_cut_off_at_the_end_are_found(whole: Path, left: int) -> None:
    with copy_of(whole) as path:
        change(path, ("DELETE FROM entries WHERE seq > ?", (left,)))
        found_out(path)


def test_an_entry_that_was_put_in_is_found(whole: Path) -> None:
    with copy_of(whole) as path:
        rest = ", ".join(c for c in COLUMNS if c not in ("seq", "hash"))
        change(
            path,
            ("UPDATE entries SET seq = -seq - 1 WHERE seq >= 6", ()),
            ("UPDATE entries SET seq = -seq WHERE seq < 0", ()),
            (f"INSERT INTO entries (seq, hash, {rest}) SELECT 6, 'x', {rest} FROM entries "
             "WHERE seq = 5", ()),
        )  # fmt: skip
        found_out(path)


def test_an_entry_of_another_ledger_at_the_end_is_found(whole: Path) -> None:
    with copy_of(whole) as path, copy_of(whole) as other:
        with Ledger(other) as ledger:
            ledger.close_run("a")
        change(path, ("ATTACH ? AS other", (str(other),)),
               ("INSERT INTO entries SELECT * FROM other.entries WHERE seq > ?", (ENTRIES,)),
               ("UPDATE entries SET kind = 'settle' WHERE seq > ?", (ENTRIES,)))  # fmt: skip
        found_out(path)


@pytest.mark.parametrize("salt", [b"", bytes(32), b"x" * 32])
def test_a_replaced_salt_is_found(whole: Path, salt: bytes) -> None:
    """With another salt every image would be new."""
    with copy_of(whole) as path:
        change(path, ("UPDATE meta SET value = ? WHERE name = 'salt'", (salt,)))
        found_out(path)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM meta WHERE name = 'salt'",
        "DELETE FROM meta",
        "DROP TABLE meta",
        "DROP TABLE entries",
        "PRAGMA user_version = 2",
        "PRAGMA user_version = 0",
    ],
)
def test_a_ledger_that_lacks_its_parts_is_found(whole: Path, statement: str) -> None:
    with copy_of(whole) as path:
        change(path, (statement, ()))
        found_out(path)


def test_a_ledger_of_which_nothing_is_left_is_not_an_empty_one(whole: Path) -> None:
    with copy_of(whole) as path:
        change(path, *((f"DROP TABLE {table}", ()) for table in TABLES))
        found_out(path)


def test_a_deleted_ledger_whose_head_is_left_is_found(whole: Path) -> None:
    with copy_of(whole) as path:
        path.unlink()
        assert "gone" in found_out(path).what


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.0, 1.0, exclude_max=True))
def test_a_truncated_file_is_found(whole: Path, share: float) -> None:
    with copy_of(whole) as path:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        found_out(path)


def test_a_file_cut_to_nothing_is_not_an_empty_ledger(whole: Path) -> None:
    """What a full disk, a failed copy or a power cut may leave."""
    with copy_of(whole) as path:
        path.write_bytes(b"")
        found_out(path)


@pytest.mark.parametrize("content", [b"no ledger at all", b"\0" * 8192, b"SQLite format 3\0"])
def test_a_file_that_is_no_ledger_is_found(whole: Path, content: bytes) -> None:
    with copy_of(whole) as path:
        path.write_bytes(content)
        found_out(path)


def test_another_database_is_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / NAME
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE patients (name TEXT)")
    found_out(path)


@pytest.mark.parametrize("head", [b"", b"14", b"\xff\xfe", b"14 " + b"0" * 63, b"1 2 3"])
def test_a_head_that_is_no_head_of_this_ledger_is_found(whole: Path, head: bytes) -> None:
    with copy_of(whole) as path:
        path.with_suffix(".head").write_bytes(head)
        found_out(path)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("verb", ["UPDATE {} SET rowid = rowid", "DELETE FROM {}"])
def test_sqlite_itself_refuses_to_change_or_delete(whole: Path, table: str, verb: str) -> None:
    with copy_of(whole) as path, closing(sqlite3.connect(path)) as db:
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(verb.format(table))
        with Ledger(path) as ledger:
            check_members(ledger.chain)


def test_an_older_backup_is_found_by_a_head_that_somebody_noted(whole: Path) -> None:
    """Ledger and head restored together are whole; only a head kept elsewhere tells."""
    with copy_of(whole) as path:
        with Ledger(path) as ledger:
            assert ledger.chain.verify() == ENTRIES
            ledger.close_run("a")
            later = ledger.chain.head()[1]
        shutil.copytree(whole, path.parent, dirs_exist_ok=True)
        with Ledger(path) as ledger:
            assert ledger.chain.verify(head=ledger.chain.head()[1]) == ENTRIES
            with pytest.raises(LedgerError, match="removed or rewritten"):
                ledger.chain.verify(head=later)


def test_an_older_ledger_beside_a_newer_head_is_found(whole: Path) -> None:
    with copy_of(whole) as path:
        with Ledger(path) as ledger:
            ledger.close_run("a")
        shutil.copy(whole / NAME, path)
        assert "cut off" in found_out(path).what


def test_a_head_that_is_behind_blocks_nothing(whole: Path) -> None:
    """Killed after the commit and before the head: the ledger knows more than its head."""
    with copy_of(whole) as path:
        with Ledger(path) as ledger:
            ledger.close_run("a")
        shutil.copy(whole / "ledger.head", path.parent)
        with Ledger(path) as ledger:
            assert ledger.chain.verify() == ENTRIES + 1
            ledger.close_run("b")
        with Ledger(path) as ledger:
            assert ledger.chain.verify() == ENTRIES + 2


def test_a_ledger_that_should_be_there_is_not_made_anew(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no privacy ledger"):
        Chain(tmp_path / NAME, create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_in_use_and_a_full_disk_are_told_in_two_parts_and_change_nothing(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.privacy.ledger.chain.BUSY_SECONDS", 0.05)
    with copy_of(whole) as path:
        with closing(sqlite3.connect(path, isolation_level=None)) as other, Ledger(path) as ledger:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerError) as caught:
                ledger.close_run("a")
            assert caught.value.what and caught.value.remedy
            other.execute("ROLLBACK")
            # The disk has room for what is there and for no more.
            (pages,) = ledger.chain._db.execute("PRAGMA page_count").fetchone()
            ledger.chain._db.execute(f"PRAGMA max_page_count={pages}")
            with pytest.raises(LedgerError) as caught:
                ledger.admit("c", promise(), data(range(1000, 9000)), LIMITS, plan)
            assert caught.value.what and caught.value.remedy
        with Ledger(path) as ledger:
            check_members(ledger.chain)
            assert ledger.chain.verify() == ENTRIES
            ledger.close_run("a")


def test_ledger_and_head_are_for_their_owner_only(whole: Path) -> None:
    for path in whole.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path

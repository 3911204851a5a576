"""What a process remembers of a ledger saves hashing, and hides no change from anybody."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy.ledger import Entry, Ledger, LedgerError, verified
from common.privacy.ledger.verified import Row
from tests.common.privacy.ledger.building import LIMITS, data, plan, promise

GENESIS = "g" * 64


def rows_of(ledger: Ledger) -> list[Row]:
    return ledger.chain._rows()


def chained(count: int) -> list[Row]:
    """The rows of a chain of so many entries."""
    rows: list[Row] = []
    previous = GENESIS
    for seq in range(1, count + 1):
        values: dict[str, Any] = {"kind": "reserve", "run": "a", "round": seq, "steps": 1}
        values |= {"noise_multiplier": 2.0, "seq": seq, "previous": previous}
        previous = Entry(**values).digest()
        rows.append(tuple(vars(Entry(**values, hash=previous)).values()))
    return rows


def said(rows: list[Row], *, anew: bool) -> object:
    """What is said of ``rows``: their entries, or what is wrong."""
    try:
        return verified.verified(GENESIS, rows, anew=anew)
    except (TypeError, ValueError) as error:
        return str(error)


values = st.one_of(
    st.none(), st.integers(-2, 9), st.floats(-2, 9), st.text(max_size=3), st.binary(max_size=3)
)


@settings(max_examples=300, deadline=None)
@given(
    whole=st.integers(1, 8), known=st.integers(0, 8), row=st.integers(0, 7),
    column=st.integers(0, 17), value=values, cut=st.integers(0, 8), swap=st.integers(0, 7),
)  # fmt: skip
def test_what_was_found_before_changes_nothing_of_what_is_said(
    whole: int, known: int, row: int, column: int, value: object, cut: int, swap: int
) -> None:
    """Of rows edited, cut off and moved in any way, whatever the process had seen of them."""
    rows = chained(whole)
    said(rows[:known], anew=True)
    row, swap = row % whole, swap % whole
    edited = list(rows[row])
    edited[column] = value
    rows[row] = tuple(edited)
    rows[row], rows[swap] = rows[swap], rows[row]
    del rows[cut:]
    answer = said(rows, anew=False)
    assert answer == said(rows, anew=True) == said(rows, anew=False)


@pytest.mark.parametrize(("column", "value"), [("round", 2.0), ("steps", True), ("steps", "1")])
def test_a_value_of_another_type_is_another_value(column: str, value: object) -> None:
    rows = chained(3)
    assert not isinstance(said(rows, anew=False), str)
    edited = dict(zip(Entry.__dataclass_fields__, rows[1], strict=True)) | {column: value}
    rows[1] = tuple(edited.values())
    assert said(rows, anew=False) == "entry 2 was changed after it was written"


@pytest.fixture
def used(path: Path) -> Path:
    """A ledger with a run of three rounds, which this process has made and opened."""
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), data(range(8)), LIMITS, plan)
        for number in (1, 2, 3):
            ledger.settle(ledger.reserve_round("a", number, "m"))
    with Ledger(path):
        return path


def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the entries that are hashed from now on."""
    numbers: list[int] = []
    digest = Entry.digest

    def noted(entry: Entry) -> str:
        numbers.append(entry.seq)
        return digest(entry)

    monkeypatch.setattr(Entry, "digest", noted)
    return numbers


def test_an_opening_hashes_what_was_added_since_the_one_before(
    used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = hashed(monkeypatch)
    with Ledger(used) as ledger:
        assert numbers == []
        count = len(ledger.chain.entries())
        ledger.close_run("a")
    assert numbers == [count + 1]  # when it was written
    with Ledger(used) as ledger:
        assert numbers == [count + 1, count + 1]
        assert ledger.chain.verify() == count + 1
    assert numbers[2:] == list(range(1, count + 2))


def edit(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        db.execute(statement)


EDITS = {
    "an old entry is cheaper": "UPDATE entries SET noise_multiplier = 99.0 WHERE seq = 4",
    "an old entry is gone": "DELETE FROM entries WHERE seq = 4",
    "the last entries are gone": "DELETE FROM entries WHERE seq > 6",
    "the last entry is another": "UPDATE entries SET note = '' WHERE seq = "
    "(SELECT max(seq) FROM entries WHERE note <> '')",
}


@pytest.mark.parametrize("statement", EDITS.values(), ids=EDITS.keys())
def test_an_edit_is_found_at_the_next_opening_in_this_process_and_in_a_new_one(
    used: Path, statement: str
) -> None:
    edit(used, statement)
    for _ in range(2):
        with pytest.raises(LedgerError, match="damaged"):
            Ledger(used)
    code = "import sys; from pathlib import Path; from common.privacy.ledger import Ledger; "
    code += "Ledger(Path(sys.argv[1]))"
    new = subprocess.run([sys.executable, "-c", code, str(used)], capture_output=True, text=True)
    assert new.returncode != 0
    assert "is damaged" in new.stderr


def test_decisions_are_by_the_entries_that_opening_verified(used: Path) -> None:
    """Edited while it is open, the ledger still counts what was spent; the next opening refuses."""
    with Ledger(used) as ledger:
        before = ledger.chain.entries()
        edit(used, "UPDATE entries SET run = 'b' WHERE mechanism = 'sampled-gaussian'")
        assert ledger.chain.entries() == before
        state = ledger.state("a")
        assert state is not None
        assert state.rounds == 3
    with pytest.raises(LedgerError, match="changed"):
        Ledger(used)


def test_entries_of_another_process_are_seen_while_open(used: Path) -> None:
    with Ledger(used) as ledger, Ledger(used) as other:
        other.close_run("a")
        assert ledger.chain.entries()[-1].kind == "close"
        state = ledger.state("a")
        assert state is not None
        assert state.closed


def test_what_is_undone_is_not_remembered(used: Path) -> None:
    with Ledger(used) as ledger:
        before = ledger.chain.entries()
        with suppress(ZeroDivisionError), ledger.chain.transaction():
            ledger.chain.append(Entry(kind="close", run="a"))
            assert len(ledger.chain.entries()) == len(before) + 1
            raise ZeroDivisionError
        assert ledger.chain.entries() == before
    with Ledger(used) as ledger:
        assert ledger.chain.entries() == before


def test_of_more_ledgers_than_are_kept_each_is_still_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verified, "_LEDGERS", 2)
    for name in "abc":
        with Ledger(tmp_path / name / "ledger.sqlite") as ledger:
            ledger.admit("a", promise(), data(range(8)), LIMITS, plan)
    for name in "abc":
        with Ledger(tmp_path / name / "ledger.sqlite") as ledger:
            assert rows_of(ledger)
    assert len(verified._found) <= 2
    edit(tmp_path / "a" / "ledger.sqlite", EDITS["an old entry is gone"].replace("4", "1"))
    with pytest.raises(LedgerError):
        Ledger(tmp_path / "a" / "ledger.sqlite")

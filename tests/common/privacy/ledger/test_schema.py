"""A field that comes later: ledgers of every earlier version are whole as they are, and go on.

The field is really added, to a copy of the source by the recipe of
:mod:`common.privacy.ledger.schema`, and both versions are run in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from common.privacy.ledger import Ledger, LedgerError
from common.privacy.ledger.schema import FIRST
from tests.conftest import ROOT

GOLDEN = ROOT / "tests" / "golden" / "ledger"
OLD = ("1-first", "1")

EDITS = (
    "UPDATE entries SET site = 'south' WHERE seq = 3",  # a field that its hash leaves out
    "UPDATE entries SET site = 'south' WHERE schema = 2",
    "UPDATE entries SET schema = 1 WHERE schema = 2",  # passed off as an earlier one
    "UPDATE entries SET schema = 1, site = '' WHERE schema = 2",
    "UPDATE entries SET schema = 2 WHERE seq = 3",
    "UPDATE entries SET schema = 3 WHERE schema = 2",
    "UPDATE entries SET schema = 'x' WHERE seq = 3",
    "UPDATE entries SET schema = 0 WHERE seq = 3",
    "PRAGMA user_version = 1",
)

_LOOK = """
import json, sys
from pathlib import Path
from common.errors import ConsiliumError
from common.privacy.ledger import Entry, Ledger

def looked(path, act, head):
    try:
        with Ledger(Path(path)) as ledger:
            if act == "append":
                with ledger.chain.transaction():
                    ledger.chain.append(Entry(kind="close", run="run-b", site="north"))
            entries = ledger.chain.entries()
            return {"length": ledger.chain.verify(head), "head": ledger.chain.head()[1],
                    "schemas": [e.schema for e in entries], "site": [e.site for e in entries],
                    "epsilon": ledger.spent_by_run("run-a").value}
    except ConsiliumError as error:
        return {"what": error.what, "remedy": error.remedy}

print(json.dumps([looked(*job) for job in json.loads(sys.argv[1])]))
"""
_Job = tuple[Path, str, str]
"""A ledger, ``look`` or ``append``, and a head that must be in it, or an empty one."""


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A later consilium, whose entries have a field more: ``site``, with the default ''."""
    root = tmp_path_factory.mktemp("later")
    shutil.copytree(ROOT / "common", root / "common", ignore=shutil.ignore_patterns("__pycache__"))
    ledger = root / "common" / "privacy" / "ledger"
    for file, before, after in (
        ("entry.py", "    schema: int = 1\n", "    schema: int = 1\n    site: str = ''\n"),
        (
            "schema.py",
            "ADDED: Mapping[int, Mapping[str, str]] = {}",
            "ADDED: Mapping[int, Mapping[str, str]] = {2: {'site': \"TEXT NOT NULL DEFAULT ''\"}}",
        ),
    ):
        text = (ledger / file).read_text()
        assert text.count(before) == 1
        (ledger / file).write_text(text.replace(before, after))
    return root


def looked(root: Path, *jobs: _Job) -> list[dict[str, Any]]:
    """What the consilium in ``root`` says of each ledger; one process, whose imports take long."""
    told = json.dumps([[str(path), act, head] for path, act, head in jobs])
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, told], cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def copied(name: str, folder: Path) -> Path:
    shutil.copytree(GOLDEN / name, folder, dirs_exist_ok=True)
    return folder / "ledger.sqlite"


@dataclass(frozen=True)
class Seen:
    """What the later version found: ledgers as they were, the same after it had written to them,
    and the first of them once more after each of :data:`EDITS`."""

    before: dict[str, dict[str, Any]]
    unchanged: dict[str, bool]
    after: dict[str, dict[str, Any]]
    paths: dict[str, Path]
    edited: dict[str, dict[str, Any]]
    refused_while_open: list[LedgerError]


@pytest.fixture(scope="module")
def seen(later: Path, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Two processes of the later version do all of it."""
    folder = tmp_path_factory.mktemp("ledgers")
    paths = {name: copied(name, folder / name) for name in OLD}
    looking = {name: copied(name, folder / f"look-{name}") for name in OLD}
    heads = {}
    for name, path in paths.items():
        with Ledger(path) as ledger:
            heads[name] = ledger.chain.head()[1]
    shared = copied("1", folder / "open")
    refused = []
    with Ledger(shared) as ledger:
        found = looked(
            later,
            *((path, "look", "") for path in looking.values()),
            *((path, "append", heads[name]) for name, path in paths.items()),
            (shared, "append", ""),
        )
        for act in (ledger.chain.entries, lambda: ledger.close_run("run-b")):
            with pytest.raises(LedgerError) as caught:
                act()
            refused.append(caught.value)
    edited = {}
    for number, edit in enumerate(EDITS):
        edited[edit] = shutil.copytree(folder / "1", folder / f"edit-{number}") / "ledger.sqlite"
        with closing(sqlite3.connect(edited[edit], isolation_level=None)) as db:
            db.execute("DROP TRIGGER no_update_of_entries")
            db.execute(edit)
    again = looked(later, *((path, "look", "") for path in edited.values()))
    return Seen(
        dict(zip(OLD, found, strict=False)),
        {n: p.read_bytes() == (GOLDEN / n / p.name).read_bytes() for n, p in looking.items()},
        dict(zip(OLD, found[len(OLD) :], strict=False)),
        paths,
        dict(zip(EDITS, again, strict=True)),
        refused,
    )


@pytest.mark.parametrize("name", OLD)
def test_a_field_that_is_added_leaves_every_old_ledger_whole_and_it_goes_on(
    name: str, seen: Seen, tmp_path: Path
) -> None:
    with Ledger(copied(name, tmp_path)) as ledger:
        length, (_, head) = ledger.chain.verify(), ledger.chain.head()
        epsilon = ledger.spent_by_run("run-a").value
    found = seen.before[name]
    assert (found["length"], found["head"], found["epsilon"]) == (length, head, epsilon)
    assert seen.unchanged[name]  # to look at it does not change it
    found = seen.after[name]  # the old head is still in it
    assert found["schemas"] == [1] * length + [2]
    assert found["site"] == [""] * length + ["north"]
    assert found["epsilon"] == epsilon


def test_a_ledger_of_a_later_schema_is_refused_in_two_parts_and_left_as_it_is(seen: Seen) -> None:
    path = seen.paths["1"]
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="of schema 2: a later version of consilium") as caught:
        Ledger(path)
    assert "later one" in caught.value.remedy
    assert path.read_bytes() == before


@pytest.mark.parametrize("edit", EDITS)
def test_no_field_of_any_schema_can_be_changed_unnoticed(edit: str, seen: Seen) -> None:
    found = seen.edited[edit]
    assert "damaged" in found["what"] or "cannot be used" in found["what"]
    assert found["remedy"]


def test_a_ledger_that_is_open_when_a_later_version_writes_to_it_is_neither_read_nor_written(
    seen: Seen,
) -> None:
    assert ["later version" in error.what for error in seen.refused_while_open] == [True, True]


def test_a_run_on_images_that_the_first_release_entered_is_admitted_and_charged_anew(
    tmp_path: Path,
) -> None:
    """Its line for the noised numbers of images tells none of them."""
    from tests.golden import ledger_lines as lines

    with Ledger(copied("1-first", tmp_path)) as ledger:
        parts = lines.data(range(8), (8, 9))
        numbers = ledger.tell_numbers("run-d", parts, "image", lines.LIMITS, lambda: (8, 2))
        assert numbers == (8, 2)
        ledger.admit("run-d", lines.promise(), parts, lines.LIMITS, lines.plan)
        newest = [e for e in ledger.chain.entries(run="run-d") if e.kind == "reserve"]
        assert [e.pure_epsilon for e in newest] == [0.1]
        # What the first release spent is counted beside it.
        total = ledger.total(newest[0].dataset, lines.LIMITS)
        assert {"run-a", "run-b", "run-d"} == set(total.runs)
        assert total.epsilon > ledger.spent_by_run("run-a").value


@pytest.mark.parametrize("of", ["plan", "promise", "limits"])
def test_a_plan_of_a_later_version_is_refused_in_two_parts(of: str, tmp_path: Path) -> None:
    """A note is hashed as text, so that what it holds may grow; older code must say so."""
    with Ledger(copied("1", tmp_path)) as ledger:
        (plan,) = [e for e in ledger.chain.entries(run="run-b") if e.kind == "plan"]
        note = plan.notes()
        (note["plan"]["promise"] if of == "promise" else note[of])["colour"] = "blue"
        with ledger.chain.transaction():
            ledger.chain.append(replace(plan, note=json.dumps(note)))
        with pytest.raises(LedgerError, match="does not know") as caught:
            ledger.reserve_round("run-b", 3, "n" * 64)
        assert "later one" in caught.value.remedy


def test_the_first_schema_is_never_changed() -> None:
    """Its fields are what every hash of a first ledger is over."""
    assert FIRST == (
        "kind", "run", "round", "dataset", "part", "mechanism", "unit", "sampling_rate",
        "noise_multiplier", "steps", "pure_epsilon", "model", "refers", "note", "seq", "time",
        "previous", "hash",
    )  # fmt: skip

"""Several processes at one ledger: the last of the budget goes to one of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PosixPath
from typing import Any

import pytest

from common.privacy.ledger import Ledger, check_members, data_sets
from common.privacy.ledger.chain import Chain
from common.privacy.limits import PrivacyLimits
from common.privacy.plan import Promise
from tests.common.privacy.ledger.building import LIMITS, data, plan, promise
from tests.common.privacy.ledger.processes import LEDGER, admit, at_once, reserve, salt_of

IMAGES = data(range(8), (8, 9))


@pytest.mark.parametrize("trial", range(3))
def test_of_runs_that_ask_at_once_only_those_are_admitted_that_fit_together(
    tmp_path: Path, trial: int
) -> None:
    """Six runs of ε ≈ 2 each; no more than a few come to less than 8."""
    path = tmp_path / LEDGER
    made = plan(sigma=2.2)
    tasks = [(admit, (path, f"run-{i}", promise(), made, IMAGES, LIMITS)) for i in range(6)]
    said = at_once(tasks)  # type: ignore[arg-type]
    assert 2 <= said.count("admitted") <= 5
    with Ledger(path) as ledger:
        admitted = {f"run-{i}" for i, answer in enumerate(said) if answer == "admitted"}
        assert {run for run in ledger.runs() if ledger.state(run) is not None} == admitted
        (known,) = data_sets(ledger.chain)
        assert ledger.total(known.fingerprint, LIMITS, held=True).epsilon <= 8.0
        for run in admitted:
            for number in (1, 2, 3):
                ledger.settle(ledger.reserve_round(run, number, "m"))
        assert ledger.total(known.fingerprint, LIMITS).epsilon <= 8.0


def _with_one_round_left(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("run", promise(), IMAGES, LIMITS, plan)
        for number in (1, 2):
            ledger.settle(ledger.reserve_round("run", number, "m"))


@pytest.mark.parametrize("trial", range(4))
def test_exactly_one_of_several_processes_gets_the_last_round(tmp_path: Path, trial: int) -> None:
    path = tmp_path / LEDGER
    _with_one_round_left(path)
    said = at_once([(reserve, (path, "run", 3, f"model-{i}")) for i in range(4)])
    assert Counter(said)["refused"] == 3
    with Ledger(path) as ledger:
        state = ledger.state("run")
        assert state is not None
        assert state.rounds == 3


def test_processes_that_reserve_the_same_round_and_model_share_a_reservation(
    tmp_path: Path,
) -> None:
    path = tmp_path / LEDGER
    _with_one_round_left(path)
    said = at_once([(reserve, (path, "run", 3, "same")) for _ in range(4)])
    assert len(set(said)) == 1
    assert said[0] != "refused"


@pytest.mark.parametrize("trial", range(4))
def test_a_ledger_that_several_processes_make_at_once_is_one_ledger(
    tmp_path: Path, trial: int
) -> None:
    said = at_once([(salt_of, (tmp_path / LEDGER,)) for _ in range(6)])
    assert len(set(said)) == 1


class MadeMeanwhile(PosixPath):
    """A path at which another process makes a ledger right after it was looked for."""

    def exists(self) -> bool:
        there = super().exists()
        if not there and self.name == LEDGER:
            Chain(Path(self)).close()
        return there


def test_a_ledger_that_is_made_while_another_opens_it_is_not_taken_for_a_lost_one(
    tmp_path: Path,
) -> None:
    with Ledger(MadeMeanwhile(tmp_path / LEDGER)) as ledger:
        assert ledger.runs() == []


def test_readers_and_writers_never_see_a_broken_chain(tmp_path: Path) -> None:
    """Opening verifies: against entries that others are adding, it must not cry wolf."""
    path = tmp_path / LEDGER
    many = promise(rounds=40, epsilon=8.0)
    with Ledger(path) as ledger:
        ledger.admit("run", many, IMAGES, PrivacyLimits.none(), lambda: plan(many, sigma=0.1))
    tasks: list[tuple[Any, tuple[Any, ...]]] = []
    for number in range(1, 9):
        tasks.append((reserve, (path, "run", number, "m")))
        tasks.append((salt_of, (path,)))
    said = at_once(tasks)
    assert "refused" not in said
    with Ledger(path) as ledger:
        check_members(ledger.chain)
        state = ledger.state("run")
        assert state is not None
        assert state.rounds == 8


def test_the_same_run_admitted_twice_at_once_is_one_run(tmp_path: Path) -> None:
    path = tmp_path / LEDGER
    asked: Promise = promise()
    said = at_once([(admit, (path, "run", asked, plan(), IMAGES, LIMITS)) for _ in range(4)])
    assert set(said) == {"admitted"}
    with Ledger(path) as ledger:
        kinds = Counter(e.kind for e in ledger.chain.entries())
        assert kinds["dataset"] == kinds["plan"] == 1

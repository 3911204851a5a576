"""A round that is charged for good before it is made: all of it or nothing, and never again."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import PrivacyError
from common.privacy.ledger import TRAINING, Ledger, LedgerError
from common.privacy.limits import BudgetExhausted
from tests.common.privacy.ledger.building import LIMITS, data, plan, promise, refuses


def admitted(ledger: Ledger) -> None:
    ledger.admit("a", promise(), data(range(8)), LIMITS, plan)


def test_a_charge_leaves_the_entries_of_a_reservation_that_was_settled(tmp_path: Path) -> None:
    with Ledger(tmp_path / "one.sqlite") as one, Ledger(tmp_path / "two.sqlite") as two:
        admitted(one)
        admitted(two)
        one.charge_round("a", 1, "m", TRAINING)
        two.settle(two.reserve_round("a", 1, "m"))

        def told(ledger: Ledger) -> list[tuple[object, ...]]:
            return [(e.kind, e.mechanism, e.round, e.model, e.steps, e.refers, e.note)
                    for e in ledger.chain.entries()[-2:]]  # fmt: skip

        assert told(one) == told(two)
        assert one.spent_by_run("a") == two.spent_by_run("a")


def test_the_same_round_is_charged_anew_until_the_plan_has_no_more(path: Path) -> None:
    with Ledger(path) as ledger:
        admitted(ledger)
        costs = []
        for _ in range(3):
            ledger.charge_round("a", 1, "m", TRAINING)
            costs.append(ledger.spent_by_run("a").value)
        assert costs == sorted(set(costs))
        refuses(ledger, BudgetExhausted, lambda: ledger.charge_round("a", 1, "m", TRAINING))
        state = ledger.state("a")
        assert state is not None
        assert state.rounds == 3


def test_a_reservation_that_was_left_open_is_settled_and_not_made_twice(path: Path) -> None:
    """As an earlier version left it, which died between the two."""
    with Ledger(path) as ledger:
        admitted(ledger)
        reserved = ledger.reserve_round("a", 1, "m")
        ledger.charge_round("a", 1, "m", TRAINING)
        last = ledger.chain.entries()[-1]
        assert (last.kind, last.refers) == ("settle", reserved.seq)
        state = ledger.state("a")
        assert state is not None
        assert state.rounds == 1


def test_where_the_second_of_the_two_entries_cannot_be_written_nothing_is_charged(
    path: Path,
) -> None:
    with Ledger(path) as ledger:
        admitted(ledger)
        ledger.chain._db.execute(
            "CREATE TEMP TRIGGER full BEFORE INSERT ON main.entries WHEN NEW.kind = 'settle' "
            "BEGIN SELECT RAISE(ABORT, 'no room'); END"
        )
        refuses(ledger, LedgerError, lambda: ledger.charge_round("a", 1, "m", TRAINING))
        state = ledger.state("a")
        assert state is not None
        assert state.rounds == 0


def test_a_run_that_is_closed_or_unknown_is_charged_nothing(path: Path) -> None:
    with Ledger(path) as ledger:
        admitted(ledger)
        ledger.close_run("a")
        refuses(ledger, PrivacyError, lambda: ledger.charge_round("a", 1, "m", TRAINING))
        with pytest.raises(PrivacyError, match="not admitted"):
            ledger.charge_round("b", 1, "m", TRAINING)

"""What a hospital's total means: for every image, over runs, rounds and data sets.

A run of :func:`plan` with σ = 2 costs ε = 3.2 alone; a second one after it 5.6 in all.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from common.errors import PrivacyError
from common.privacy.accounting import Event, epsilon_of
from common.privacy.ledger import Ledger
from common.privacy.limits import PATIENT, BudgetExhausted
from common.privacy.plan import RunPlan
from tests.common.privacy.ledger.building import (
    COUNT,
    DELTA,
    LIMITS,
    data,
    limits,
    newest,
    plan,
    promise,
    refuses,
    use_up,
)

IMAGES = data(range(8), (8, 9))


# Runs, rounds, promises.


def test_one_run_costs_what_both_accountants_say_of_its_whole_plan(path: Path) -> None:
    with Ledger(path) as ledger:
        state = ledger.admit("a", promise(), IMAGES, LIMITS, plan)
        before = ledger.total(state.dataset, LIMITS, held=True)
        use_up(ledger, "a")
        after = ledger.total(state.dataset, LIMITS)
        alone = epsilon_of([Event(4.0, 1.0, 3)], DELTA, pure=COUNT)
        assert after.epsilon == before.epsilon == alone.value == ledger.spent_by_run("a").value
        assert after.accountant in ("prv", "pld")


def test_runs_are_admitted_until_the_total_and_none_after(path: Path) -> None:
    with Ledger(path) as ledger:
        spent = []
        for number in range(9):
            run = f"run-{number}"
            try:
                ledger.admit(run, promise(), IMAGES, LIMITS, lambda: plan(sigma=2.0))
            except BudgetExhausted:
                break
            use_up(ledger, run)
            spent.append(ledger.total(newest(ledger).fingerprint, LIMITS).epsilon)
        assert len(spent) == 3
        assert spent == sorted(spent)
        assert spent[-1] <= LIMITS.total_epsilon
        # The filter never says less than what runs with these parameters exactly cost.
        exact = epsilon_of([Event(2.0, 1.0, 9)], DELTA).value
        assert exact <= spent[-1] <= 1.15 * exact


def test_a_run_that_was_refused_may_do_nothing(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, limits(total_epsilon=5.0), lambda: plan(sigma=2.0))
        other = data(range(8), (8,))
        with pytest.raises(BudgetExhausted) as error:
            ledger.admit("b", promise(), other, limits(total_epsilon=5.0), lambda: plan(sigma=2.0))
        assert "allows 5 in all" in str(error.value)
        assert ledger.state("b") is None
        with pytest.raises(PrivacyError, match="not admitted"):
            ledger.reserve_round("b", 1, "m")


def test_a_run_holds_its_whole_plan_from_the_moment_it_is_admitted(path: Path) -> None:
    few = limits(total_epsilon=5.0)
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, few, lambda: plan(sigma=2.0))
        with pytest.raises(BudgetExhausted):
            ledger.admit("b", promise(), IMAGES, few, lambda: plan(sigma=2.0))
        use_up(ledger, "a")


def test_a_round_beyond_the_plan_is_refused_whatever_it_is_called(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, LIMITS, plan)
        use_up(ledger, "a")
        for number, model in ((4, "m4"), (3, "m4"), (0, "m"), (3, "m3"), (10**9, "m")):
            refuses(
                ledger, BudgetExhausted, lambda n=number, m=model: ledger.reserve_round("a", n, m)
            )
        assert ledger.reserve_validation("a", 9, "another model") is None


def test_the_same_round_of_another_model_is_another_round(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, LIMITS, plan)
        first = ledger.reserve_round("a", 1, "m")
        assert ledger.reserve_round("a", 1, "m") == first
        assert ledger.reserve_round("a", 1, "n").seq != first.seq
        assert ledger.reserve_round("a", 2, "m").seq != first.seq
        ledger.settle(first)
        with pytest.raises(BudgetExhausted):  # settled: it would be a second result
            ledger.reserve_round("a", 1, "m")


def test_settling_twice_notes_nothing_more(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, LIMITS, plan)
        reserved = ledger.reserve_round("a", 1, "m")
        ledger.settle(reserved)
        head = ledger.chain.head()
        ledger.settle(reserved)
        assert ledger.chain.head() == head


def test_another_run_id_pays_again(path: Path) -> None:
    with Ledger(path) as ledger:
        for run in ("a", "b"):
            ledger.admit(run, promise(), IMAGES, LIMITS, lambda: plan(sigma=2.0))
            use_up(ledger, run)
        total = ledger.total(newest(ledger).fingerprint, LIMITS)
        assert total.runs == ("a", "b")
        assert total.accountant == "renyi-filter"
        assert total.epsilon > 1.4 * ledger.spent_by_run("b").value


@pytest.mark.parametrize(
    "changed",
    [
        {"epsilon": 2.9},
        {"delta": 9e-5},
        {"clipping_norm": 2.0},
        {"unit": PATIENT},
        {"rounds": 4},
        {"local_epochs": 2},
        {"batch_size": 9},
    ],
)
def test_a_known_run_with_another_promise_is_refused(path: Path, changed: dict[str, Any]) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, LIMITS, plan)
        other = promise(**changed)
        error = refuses(
            ledger,
            PrivacyError,
            lambda: ledger.admit("a", other, IMAGES, LIMITS, lambda: plan(other)),
        )
        assert next(iter(changed)) in error.what


def test_a_known_run_keeps_its_plan(path: Path) -> None:
    def calibrated_anew() -> RunPlan:
        raise AssertionError("a known run was calibrated again")

    with Ledger(path) as ledger:
        first = ledger.admit("a", promise(), IMAGES, LIMITS, plan)
        for parts in (IMAGES, data(range(7), (8, 9))):
            again = ledger.admit("a", promise(), parts, LIMITS, calibrated_anew)
            assert again.plan == first.plan


def test_a_run_that_was_never_admitted_reserves_nothing(path: Path) -> None:
    with Ledger(path) as ledger:
        refuses(ledger, PrivacyError, lambda: ledger.reserve_round("a", 1, "m"))
        refuses(ledger, PrivacyError, lambda: ledger.reserve_validation("a", 1, "m"))
        refuses(ledger, PrivacyError, lambda: ledger.close_run("a"))


def test_what_a_run_has_cost_includes_the_numbers_of_images_it_told(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, LIMITS, plan)
        assert ledger.spent_by_run("a").value == COUNT
        ledger.reserve_round("a", 1, "m")
        one = epsilon_of([Event(4.0, 1.0, 1)], promise().delta, pure=COUNT)
        assert ledger.spent_by_run("a") == one


# Versions of a data set.


@pytest.mark.parametrize("kept", [7, 4, 1])
def test_a_version_with_some_of_the_old_images_has_spent_what_they_have(
    path: Path, kept: int
) -> None:
    """Most, half or one of them: the worst-off image is the same."""
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, LIMITS, lambda: plan(sigma=2.0))
        use_up(ledger, "a")
        version = data([*range(kept), *range(100, 108 - kept)], (108, 109))
        ledger.admit("b", promise(), version, LIMITS, lambda: plan(sigma=2.0))
        use_up(ledger, "b")
        total = ledger.total(newest(ledger).fingerprint, LIMITS)
        assert total.runs == ("a", "b")
        assert total.epsilon > epsilon_of([Event(2.0, 1.0, 6)], DELTA).value
        assert list(newest(ledger).overlaps.values()) == [kept]


def test_a_data_set_without_any_old_image_has_spent_nothing(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, LIMITS, lambda: plan(sigma=2.0))
        use_up(ledger, "a")
        others = data(range(100, 108), (108, 109))
        state = ledger.admit("b", promise(), others, LIMITS, lambda: plan(sigma=4.0))
        assert ledger.total(state.dataset, LIMITS).runs == ("b",)
        assert ledger.total(state.dataset, LIMITS).epsilon == COUNT


def test_one_old_image_keeps_a_new_data_set_from_a_budget_of_its_own(path: Path) -> None:
    few = limits(total_epsilon=5.0)
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, few, lambda: plan(sigma=2.0))
        use_up(ledger, "a")
        one_old = data([0, *range(100, 107)], (108, 109))
        with pytest.raises(BudgetExhausted):
            ledger.admit("b", promise(), one_old, few, lambda: plan(sigma=2.0))
        none_old = data(range(100, 108), (108, 109))
        ledger.admit("b", promise(), none_old, few, lambda: plan(sigma=2.0))


def test_an_image_that_changes_sides_has_paid_for_both(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), data([1, 2], [3]), LIMITS, lambda: plan(sigma=2.0))
        use_up(ledger, "a")
        made = plan(sigma=2.0, validation_sigma=3.0)
        ledger.admit("b", promise(), data([3, 4], [5]), LIMITS, lambda: made)
        use_up(ledger, "b")
        # 3 was validated four times at σ = 6 in a, and trained three times at σ = 2 in b.
        both = [Event(6.0, 1.0, 4), Event(2.0, 1.0, 3)]
        total = ledger.total(newest(ledger).fingerprint, LIMITS)
        assert total.runs == ("a", "b")
        assert epsilon_of(both, DELTA).value < total.epsilon


def test_training_does_not_cost_the_validation_images(path: Path) -> None:
    with Ledger(path) as ledger:
        made = plan(sigma=1.5, validation_sigma=60.0)
        for run, train in (("a", 1), ("b", 3)):
            ledger.admit(run, promise(), data([train], [2]), LIMITS, lambda: made)
            use_up(ledger, run)
        # Image 2 was validated eight times at σ = 60, image 3 trained three times in b alone.
        trained = epsilon_of([Event(1.5, 1.0, 3)], DELTA, pure=COUNT).value
        total = ledger.total(newest(ledger).fingerprint, LIMITS)
        assert total.epsilon == pytest.approx(trained)


def test_an_image_on_both_sides_is_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        refuses(
            ledger,
            PrivacyError,
            lambda: ledger.admit("a", promise(), data([1, 2], [2]), LIMITS, plan),
        )


def test_a_run_goes_on_with_another_version_and_its_old_images_keep_what_they_paid(
    path: Path,
) -> None:
    with Ledger(path) as ledger:
        old = ledger.admit("a", promise(), IMAGES, LIMITS, plan).dataset
        ledger.settle(ledger.reserve_round("a", 1, "m1"))
        new = ledger.admit("a", promise(), data(range(4, 12), (12, 13)), LIMITS, plan).dataset
        use_up(ledger, "a")
        assert ledger.total(old, LIMITS).epsilon == ledger.total(new, LIMITS).epsilon
        # Image 11 came in after the first round.
        only_new = ledger.admit("b", promise(), data([11], [13]), LIMITS, plan).dataset
        later = epsilon_of([Event(4.0, 1.0, 2)], DELTA).value
        assert ledger.total(only_new, LIMITS).epsilon >= later


def test_a_reservation_of_the_old_version_is_not_handed_out_for_the_new_one(path: Path) -> None:
    """Killed in training; then images are added. They must pay for the round, too."""
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, LIMITS, plan)
        ledger.reserve_round("a", 1, "m")
        new = ledger.admit("a", promise(), data(range(100, 108), (108,)), LIMITS, plan)
        reserved = ledger.reserve_round("a", 1, "m")
        assert reserved.dataset == new.dataset
        assert ledger.total(new.dataset, LIMITS).epsilon > 0.5


def test_the_filters_order_does_not_follow_the_noise_on_the_numbers_of_images(
    tmp_path: Path,
) -> None:
    """A Rényi filter's order is fixed in advance; these numbers are an output, the first one."""
    orders = set()
    for count in (8, 60, 500):
        asked = promise()
        made = RunPlan.calibrated(asked, LIMITS, train_count=count, val_count=2)
        with Ledger(tmp_path / f"{count}.sqlite") as ledger:
            ledger.admit("a", asked, IMAGES, LIMITS, lambda made=made: made)
            orders |= {e.notes()["order"] for e in ledger.chain.entries() if e.kind == "plan"}
    assert len(orders) == 1


# Training without privacy.


def test_after_training_without_privacy_no_finite_total_holds(path: Path) -> None:
    allowed = limits(allow_non_private=True)
    with Ledger(path) as ledger:
        ledger.note_non_private("a", IMAGES, allowed)
        head = ledger.chain.head()
        ledger.note_non_private("a", IMAGES, allowed)
        assert ledger.chain.head() == head
        assert ledger.total(newest(ledger).fingerprint, LIMITS).epsilon == math.inf
        assert ledger.spent_by_run("a").value == math.inf
        for total in (8.0, 1e9):
            with pytest.raises(BudgetExhausted):
                ledger.admit("b", promise(), IMAGES, limits(total_epsilon=total), plan)
        # One image of it in a new data set is enough; none is none.
        with pytest.raises(BudgetExhausted):
            ledger.admit("b", promise(), data([0, 50], [60]), LIMITS, plan)
        ledger.admit("b", promise(), data([50], [60]), LIMITS, plan)


def test_training_without_privacy_is_refused_unless_the_hospital_allows_it(path: Path) -> None:
    with Ledger(path) as ledger:
        refuses(ledger, PrivacyError, lambda: ledger.note_non_private("a", IMAGES, LIMITS))

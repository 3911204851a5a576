"""What a hospital's total means: for every image, over runs, rounds, data sets, limits and time.

A run of :func:`plan` with σ = 2 costs ε = 3.2 alone; a second one after it 5.6 in all.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from common.errors import PrivacyError
from common.privacy.accounting import Event, epsilon_of
from common.privacy.ledger import DataSet, Ledger, data_sets
from common.privacy.limits import NOISED, PATIENT, WITHHELD, BudgetExhausted, PrivacyLimits
from common.privacy.plan import RunPlan
from tests.common.privacy.ledger.building import LIMITS, data, plan, promise

IMAGES = data(range(8), (8, 9))
DELTA = LIMITS.total_delta
COUNT = plan().count_epsilon


def limits(**changes: Any) -> PrivacyLimits:
    return dataclasses.replace(LIMITS, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def use_up(ledger: Ledger, run: str) -> None:
    """Every round and every model's figures of ``run`` that its plan still allows."""
    state = ledger.state(run)
    assert state is not None
    for number in range(state.rounds + 1, state.plan.promise.rounds + 1):
        ledger.settle(ledger.reserve_round(run, number, f"m{number}"))
    number = 0
    while (reserved := ledger.reserve_validation(run, number, f"m{number}")) is not None:
        ledger.settle(reserved)
        number += 1


def newest(ledger: Ledger) -> DataSet:
    return data_sets(ledger.chain)[-1]


def refuses(ledger: Ledger, error: type[PrivacyError], do: Callable[[], object]) -> PrivacyError:
    """The error of ``do``, which leaves the ledger as it was."""
    before = ledger.chain.head()
    with pytest.raises(error) as caught:
        do()
    assert caught.value.what and caught.value.remedy
    assert ledger.chain.head() == before
    return caught.value


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


# Patients.

BY_PATIENT = dataclasses.replace(LIMITS, unit=PATIENT, total_epsilon=1e4)


def test_a_patient_pays_for_an_old_image_that_was_deleted(path: Path) -> None:
    whose = {1: 1, 2: 1, 3: 3, 9: 9}
    asked = promise(unit=PATIENT)
    with Ledger(path) as ledger:
        for run, parts in (("a", data([1, 3], [9], whose)), ("b", data([2, 3], [9], whose))):
            ledger.admit(run, asked, parts, BY_PATIENT, lambda: plan(asked, sigma=2.0))
            use_up(ledger, run)
        alone = data([2], [9], whose)
        third = ledger.admit("c", asked, alone, BY_PATIENT, lambda: plan(asked))
        total = ledger.total(third.dataset, BY_PATIENT)
        assert total.runs == ("a", "b", "c")
        by_image = dataclasses.replace(BY_PATIENT, unit="image")
        assert ledger.total(third.dataset, by_image).epsilon < total.epsilon


def test_what_was_done_for_single_images_counts_for_all_of_a_patients(path: Path) -> None:
    """Three images of one patient under image-level DP: a group of three."""
    whose = dict.fromkeys((1, 2, 3), 1) | {4: 4, 9: 9}
    with Ledger(path) as ledger:
        state = ledger.admit("a", promise(), data([1, 2, 3, 4], [9], whose), LIMITS, plan)
        use_up(ledger, "a")
        patient = ledger.total(state.dataset, BY_PATIENT).epsilon
        three = epsilon_of([Event(4.0 / 3, 1.0, 3)], DELTA, pure=3 * COUNT)
        assert patient == pytest.approx(three.value)
        assert ledger.total(state.dataset, LIMITS).epsilon < patient / 3


def test_a_patient_known_only_later_pays_for_all_of_their_images(path: Path) -> None:
    """The first run knew no patients; the manifest that came after it says: ten of one."""
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), data(range(10), [90]), LIMITS, plan)
        use_up(ledger, "a")
        asked = promise(unit=PATIENT)
        whose = dict.fromkeys(range(10), 1) | {90: 2}
        state = ledger.admit(
            "b", asked, data(range(10), [90], whose), BY_PATIENT, lambda: plan(asked)
        )
        ten = epsilon_of([Event(4.0 / 10, 1.0, 3)], DELTA).value
        assert ledger.total(state.dataset, BY_PATIENT).epsilon >= ten


def test_a_patient_on_both_sides_pays_for_the_images_of_both(path: Path) -> None:
    whose = {1: 1, 2: 1, 3: 1, 4: 4}
    with Ledger(path) as ledger:
        state = ledger.admit("a", promise(), data([1, 2], [3, 4], whose), LIMITS, plan)
        # Both numbers of images change when the patient goes: by two and by one.
        assert ledger.total(state.dataset, BY_PATIENT).epsilon >= 3 * COUNT - 1e-12


def test_a_promise_for_images_is_not_enough_where_patients_are_protected(path: Path) -> None:
    with Ledger(path) as ledger:
        refuses(
            ledger,
            PrivacyError,
            lambda: ledger.admit("a", promise(), IMAGES, limits(unit=PATIENT), plan),
        )


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


# Holds and time.

FEW = dataclasses.replace(LIMITS, total_epsilon=5.0)
"""Room for five rounds at σ = 2, with the numbers of images of two runs; not for six."""


def loud() -> RunPlan:
    return plan(sigma=2.0)


def spent(ledger: Ledger) -> float:
    return ledger.total(newest(ledger).fingerprint, FEW).epsilon


def test_closing_a_run_gives_back_what_it_has_not_used(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, FEW, loud)
        ledger.settle(ledger.reserve_round("a", 1, "m"))
        ledger.close_run("a")
        ledger.admit("b", promise(), IMAGES, FEW, loud)
        use_up(ledger, "b")
        assert spent(ledger) <= FEW.total_epsilon
        assert ledger.total(newest(ledger).fingerprint, FEW).runs == ("a", "b")


def test_a_closed_run_is_over(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, FEW, loud)
        pending = ledger.reserve_round("a", 1, "m")
        ledger.close_run("a")
        refuses(ledger, PrivacyError, lambda: ledger.reserve_round("a", 1, "m"))
        refuses(ledger, PrivacyError, lambda: ledger.reserve_validation("a", 1, "m"))
        refuses(ledger, PrivacyError, lambda: ledger.admit("a", promise(), IMAGES, FEW, loud))
        ledger.settle(pending)  # it was being worked on when the hospital closed the run
        ledger.close_run("a")
        assert spent(ledger) > 1.0


def test_an_expired_hold_is_checked_again(path: Path) -> None:
    brief = dataclasses.replace(FEW, hold_days=0.0)
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, brief, loud)
        ledger.settle(ledger.reserve_round("a", 1, "m"))
        ledger.admit("b", promise(), IMAGES, brief, loud)
        with pytest.raises(BudgetExhausted):
            ledger.admit("a", promise(), IMAGES, FEW, loud)
        use_up(ledger, "b")
        assert spent(ledger) <= FEW.total_epsilon


def test_two_processes_without_holds_do_not_spend_the_same_budget(path: Path) -> None:
    """Both are admitted before either reserves; each waited for nobody."""
    brief = dataclasses.replace(FEW, hold_days=0.0)
    with Ledger(path) as one, Ledger(path) as other:
        one.admit("a", promise(), IMAGES, brief, loud)
        other.admit("b", promise(), IMAGES, brief, loud)
        with ExitStack() as stop:
            stop.enter_context(pytest.raises(BudgetExhausted))
            for number in (1, 2, 3):
                one.reserve_round("a", number, "m")
                other.reserve_round("b", number, "m")
        assert spent(one) <= FEW.total_epsilon


def test_a_hold_that_expired_while_its_round_was_trained_stays_expired(path: Path) -> None:
    """Training took longer than the hold; what settles afterwards does not revive it."""
    brief = dataclasses.replace(FEW, hold_days=0.5 / 86_400)
    with Ledger(path) as ledger, Ledger(path) as other:
        ledger.admit("a", promise(), IMAGES, brief, loud)
        training = ledger.reserve_round("a", 1, "m")
        time.sleep(0.55)
        other.admit("b", promise(), IMAGES, brief, loud)
        ledger.settle(training)
        with ExitStack() as stop:
            stop.enter_context(pytest.raises(BudgetExhausted))
            ledger.admit("a", promise(), IMAGES, brief, loud)
            ledger.reserve_round("a", 2, "m")
            ledger.reserve_round("a", 3, "m")
        use_up(other, "b")
        assert spent(ledger) <= FEW.total_epsilon


class Clock(datetime):
    """The system's clock, set wrong by :attr:`shift`."""

    shift = timedelta()

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.now(tz) + cls.shift


@pytest.mark.parametrize("days", [-400, -8, 8, 400])
def test_a_clock_that_is_set_wrong_for_a_while_costs_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """Run b comes while the clock is wrong; run a goes on when it is right again."""
    monkeypatch.setattr("common.privacy.ledger.ledger.datetime", Clock)
    monkeypatch.setattr("common.privacy.ledger.chain.datetime", Clock)
    monkeypatch.setattr(Clock, "shift", timedelta())
    with Ledger(path) as ledger, Ledger(path) as other:
        ledger.admit("a", promise(), IMAGES, FEW, loud)
        ledger.settle(ledger.reserve_round("a", 1, "m"))
        monkeypatch.setattr(Clock, "shift", timedelta(days=days))
        admitted = []
        for run, shift in (("b", timedelta(days=days)), ("a", timedelta()), ("b", timedelta())):
            monkeypatch.setattr(Clock, "shift", shift)
            try:
                other.admit(run, promise(), IMAGES, FEW, loud)
                use_up(other, run)
                admitted.append(run)
            except BudgetExhausted:
                continue
        assert admitted
        assert spent(ledger) <= FEW.total_epsilon


def test_numbers_told_while_a_hold_seemed_to_have_expired_are_not_spent_twice(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run b only gets as far as its numbers of images; run a then goes on as if it held all."""
    monkeypatch.setattr("common.privacy.ledger.ledger.datetime", Clock)
    monkeypatch.setattr("common.privacy.ledger.chain.datetime", Clock)
    monkeypatch.setattr(Clock, "shift", timedelta())
    whole = epsilon_of([Event(2.0, 1.0, 3)], DELTA, pure=COUNT).value
    tight = limits(total_epsilon=whole + COUNT / 2)
    with Ledger(path) as ledger:
        state = ledger.admit("a", promise(), IMAGES, tight, loud)
        monkeypatch.setattr(Clock, "shift", timedelta(days=8))
        ledger.tell_numbers("b", data(range(7), (8, 9)), "image", tight, lambda: (7, 2))
        monkeypatch.setattr(Clock, "shift", timedelta())
        with suppress(BudgetExhausted):
            ledger.admit("a", promise(), IMAGES, tight, loud)
            use_up(ledger, "a")
        assert ledger.total(state.dataset, tight).epsilon <= tight.total_epsilon


# Limits that change.


def test_a_total_tightened_in_mid_run_holds_at_once(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, LIMITS, loud)
        ledger.settle(ledger.reserve_round("a", 1, "m"))
        for tight in (
            limits(total_epsilon=2.0),
            limits(total_delta=1e-4, total_epsilon=3.0),
            limits(run_epsilon=1.0),
            limits(total_delta=1e-6),
            limits(unit=PATIENT),
            limits(min_noise_multiplier=2.5),
        ):
            refuses(
                ledger,
                PrivacyError,
                lambda tight=tight: ledger.admit("a", promise(), IMAGES, tight, loud),
            )


def test_a_shorter_hold_holds_at_once(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, FEW, loud)
        with pytest.raises(BudgetExhausted):
            ledger.admit("b", promise(), IMAGES, FEW, loud)
        brief = dataclasses.replace(FEW, hold_days=0.0)
        ledger.admit("b", promise(), IMAGES, brief, loud)


def test_only_the_hospital_can_loosen_what_it_allows(path: Path) -> None:
    """Nothing in a promise raises a limit; the limits that are passed in do."""
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, FEW, loud)
        for asked in (promise(), promise(epsilon=8.0), promise(epsilon=0.5, rounds=1)):
            with pytest.raises(BudgetExhausted):
                ledger.admit("b", asked, IMAGES, FEW, lambda asked=asked: plan(asked, sigma=1.2))
        ledger.admit("b", promise(), IMAGES, LIMITS, loud)


def test_looser_limits_do_not_forget_what_was_spent(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, PrivacyLimits.none(), lambda: plan(sigma=0.5))
        use_up(ledger, "a")
        with pytest.raises(BudgetExhausted):
            ledger.admit("b", promise(), IMAGES, LIMITS, plan)


def test_figures_that_the_plan_never_allowed_are_not_allowed_by_looser_limits(path: Path) -> None:
    withheld = plan(validations=0)
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), IMAGES, limits(metrics=WITHHELD), lambda: withheld)
        ledger.admit("a", promise(), IMAGES, limits(metrics=NOISED), lambda: withheld)
        assert ledger.reserve_validation("a", 1, "m") is None


# What a refusal tells.


def test_numbers_of_images_are_counted_though_the_run_is_refused_and_drawn_only_once(
    path: Path,
) -> None:
    """Whether the calibrated noise is enough depends on the noised numbers: the answer tells.

    A server that may ask any number of times, under new names, for a run that is refused for
    some numbers and not for others would average the noise away.
    """
    strict = limits(min_noise_multiplier=1e3)
    drawn: list[tuple[int, int]] = []

    def draw() -> tuple[int, int]:
        drawn.append((8 + len(drawn), 2))
        return drawn[-1]

    def calibrate() -> RunPlan:
        train, val = ledger.tell_numbers("any", IMAGES, "image", strict, draw)
        return dataclasses.replace(plan(), train_count=train, val_count=val)

    with Ledger(path) as ledger:
        for name in ("a", "b", "c"):
            with pytest.raises(PrivacyError, match="noise multiplier"):
                ledger.admit(name, promise(), IMAGES, strict, calibrate)
        assert drawn == [(8, 2)]
        assert ledger.total(newest(ledger).fingerprint, strict).epsilon == COUNT
        assert ledger.admit("d", promise(), IMAGES, LIMITS, calibrate).plan.train_count == 8
        # Other units, and another version of the data, have other numbers: each costs again.
        for parts, unit in ((IMAGES, "patient"), (data(range(7), (8, 9)), "image")):
            before = ledger.total(newest(ledger).fingerprint, strict).epsilon
            ledger.tell_numbers("e", parts, unit, strict, draw)
            after = ledger.total(newest(ledger).fingerprint, strict).epsilon
            assert after == pytest.approx(before + COUNT)
        assert len(drawn) == 3

"""A budget holds when time passes, clocks are wrong, limits change, and runs are refused."""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from common.errors import PrivacyError
from common.privacy.accounting import Event, epsilon_of
from common.privacy.ledger import Ledger
from common.privacy.limits import NOISED, PATIENT, WITHHELD, BudgetExhausted, PrivacyLimits
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

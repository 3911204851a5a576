"""A run's promise and plan: what a hospital lets itself be asked, and that its noise keeps it."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.privacy.accounting import epsilon_of
from common.privacy.limits import (
    EXACT,
    IMAGE,
    NOISED,
    PATIENT,
    WITHHELD,
    NotAllowed,
    PrivacyLimits,
)
from common.privacy.plan import COUNT_EPSILON, Promise, RunPlan

ASKED = Promise(
    epsilon=6.0,
    delta=1e-4,
    clipping_norm=7.0,
    unit=IMAGE,
    rounds=4,
    local_epochs=2,
    batch_size=32,
)
LIMITS = PrivacyLimits()


def made(
    asked: Promise = ASKED, limits: PrivacyLimits = LIMITS, *, train: int = 300, val: int = 70
) -> RunPlan:
    return RunPlan.calibrated(asked, limits, train_count=train, val_count=val)


def changed(value: Any, **fields: Any) -> Any:
    return dataclasses.replace(value, **fields)


# What everything in a plan costs.


@settings(max_examples=3, deadline=None)
@given(
    epsilon=st.floats(0.5, 8.0), rounds=st.integers(1, 20), batch=st.integers(8, 400),
    train=st.integers(1, 2000),
)  # fmt: skip
def test_all_that_a_plan_releases_costs_each_side_at_most_its_epsilon(
    epsilon: float, rounds: int, batch: int, train: int
) -> None:
    """An image in training: the count and every step; in validation: the count and all figures."""
    asked = changed(ASKED, epsilon=epsilon, rounds=rounds, batch_size=batch)
    plan = made(asked, changed(LIMITS, min_noise_multiplier=0.0), train=train)
    figures = plan.validation(plan.validations)
    assert figures is not None
    for events in ([plan.training(rounds)], [figures]):
        spent = epsilon_of(events, asked.delta, pure=plan.count_epsilon)
        assert spent.value <= epsilon
        # And nearly all of it is used: privacy that is not spent is accuracy that is lost.
        assert spent.value >= 0.97 * epsilon - 0.02


def test_rounds_cost_what_the_whole_run_costs_when_they_are_added_up() -> None:
    plan = made(limits=changed(LIMITS, metrics=WITHHELD))
    one_by_one = [plan.training(1)] * ASKED.rounds
    whole = [plan.training(ASKED.rounds)]
    assert epsilon_of(one_by_one, ASKED.delta) == epsilon_of(whole, ASKED.delta)
    costs = [epsilon_of([plan.training(n)], ASKED.delta).value for n in range(ASKED.rounds + 1)]
    assert costs == sorted(costs)
    assert costs[0] == 0.0


@pytest.mark.parametrize(("train", "steps"), [(1, 1), (32, 1), (33, 2), (300, 10)])
def test_a_pass_takes_as_many_steps_as_batches_fill_the_released_number(
    train: int, steps: int
) -> None:
    plan = made(train=train, limits=changed(LIMITS, metrics=WITHHELD))
    assert plan.sampling_rate == 1.0 / steps
    assert plan.steps_per_round == 2 * steps
    assert plan.training(3).steps == 3 * 2 * steps


def test_numbers_that_noise_took_below_one_leave_a_plan_that_works() -> None:
    plan = made(train=-47, val=0)
    assert plan.train_count == plan.val_count == 1
    assert plan.sampling_rate == 1.0


def test_a_promise_that_the_numbers_of_images_would_use_up_is_not_allowed() -> None:
    with pytest.raises(NotAllowed, match="number of images"):
        changed(ASKED, epsilon=2 * COUNT_EPSILON).check(LIMITS)
    changed(ASKED, epsilon=2.1 * COUNT_EPSILON).check(LIMITS)


@pytest.mark.parametrize("metrics", [WITHHELD, EXACT])
def test_figures_that_are_not_noised_are_not_in_the_plan(metrics: str) -> None:
    plan = made(limits=changed(LIMITS, metrics=metrics))
    assert plan.validations == 0
    assert plan.validation(0) is None
    assert plan.validation(3) is None


def test_a_model_more_is_validated_than_rounds_are_trained() -> None:
    """The first model and the one after each round."""
    assert made(limits=changed(LIMITS, metrics=NOISED)).validations == ASKED.rounds + 1


def test_a_plan_survives_json_exactly() -> None:
    plan = made()
    read = json.loads(json.dumps(dataclasses.asdict(plan)))
    assert RunPlan(**(read | {"promise": Promise(**read["promise"])})) == plan


# What a hospital lets itself be asked.


@pytest.mark.parametrize(
    "bad",
    [
        {"epsilon": 0.0}, {"epsilon": -1.0}, {"epsilon": math.nan}, {"delta": 0.0}, {"delta": 1.0},
        {"delta": math.nan}, {"clipping_norm": 0.0}, {"clipping_norm": math.nan}, {"rounds": 0},
        {"local_epochs": 0}, {"batch_size": 0}, {"unit": "hospital"},
    ],
)  # fmt: skip
def test_an_impossible_promise_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError, match="impossible"):
        changed(ASKED, **bad)


@pytest.mark.parametrize(
    ("asked", "limits", "word"),
    [
        ({"epsilon": 8.001}, {}, "run"),
        ({}, {"run_epsilon": 5.9}, "run"),
        ({"delta": 3e-4}, {}, "δ"),
        ({}, {"total_delta": 9e-5}, "δ"),
        ({"unit": IMAGE}, {"unit": PATIENT}, "patients"),
    ],
)
def test_a_promise_beyond_the_limits_is_not_allowed(
    asked: dict[str, Any], limits: dict[str, Any], word: str
) -> None:
    with pytest.raises(NotAllowed, match=word) as caught:
        changed(ASKED, **asked).check(changed(LIMITS, **limits))
    assert "coordinator" in caught.value.remedy


def test_a_promise_at_the_limits_is_allowed_and_one_for_patients_protects_images_too() -> None:
    changed(ASKED, epsilon=8.0, delta=LIMITS.total_delta).check(LIMITS)
    changed(ASKED, unit=PATIENT).check(LIMITS)
    changed(ASKED, unit=PATIENT).check(changed(LIMITS, unit=PATIENT))


def test_a_plan_with_too_little_noise_is_not_allowed() -> None:
    plan = made()
    plan.check(changed(LIMITS, min_noise_multiplier=plan.noise_multiplier))
    with pytest.raises(NotAllowed, match="noise multiplier"):
        plan.check(changed(LIMITS, min_noise_multiplier=1.001 * plan.noise_multiplier))


@pytest.mark.parametrize(
    "bad",
    [
        {"total_epsilon": 0.0}, {"total_epsilon": math.nan}, {"total_delta": 0.0},
        {"total_delta": 1.0}, {"run_epsilon": -1.0}, {"run_epsilon": math.nan},
        {"min_noise_multiplier": -0.1}, {"min_noise_multiplier": math.inf},
        {"min_noise_multiplier": math.nan}, {"unit": "hospital"}, {"metrics": "all"},
        {"hold_days": -1.0}, {"hold_days": math.nan},
    ],
)  # fmt: skip
def test_impossible_limits_are_refused(bad: dict[str, Any]) -> None:
    """NaN compares with nothing: a limit of NaN would let everything through."""
    with pytest.raises(PrivacyError, match="impossible privacy limits"):
        changed(LIMITS, **bad)


def test_limits_survive_json_and_are_told_apart_by_it() -> None:
    kinds = [
        LIMITS, PrivacyLimits.none(), changed(LIMITS, total_epsilon=7.0),
        changed(LIMITS, hold_days=1.0), changed(LIMITS, min_noise_multiplier=0.5),
        changed(LIMITS, unit=PATIENT), changed(LIMITS, metrics=WITHHELD),
    ]  # fmt: skip
    written = [json.dumps(limits.as_dict(), allow_nan=False) for limits in kinds]
    assert len(set(written)) == len(kinds)
    assert [PrivacyLimits.from_dict(json.loads(text)) for text in written] == kinds


def test_the_limits_of_a_silent_policy_allow_no_training_without_privacy() -> None:
    assert not LIMITS.allow_non_private
    assert math.isfinite(LIMITS.total_epsilon) and math.isfinite(LIMITS.run_epsilon)
    assert LIMITS.metrics == NOISED

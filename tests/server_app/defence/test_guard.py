"""What a round makes of the model when its sums, or the figures after it, are a liar's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.config import KEYS, RunConfig
from server_app.defence.defence import QUIET, SMALLER, Defence
from server_app.defence.figures import Validated
from server_app.defence.guard import Guard, Turn
from server_app.mover import Mover
from server_app.rounds import Outcome

TEN = [f"hospital-{i:02d}" for i in range(10)]
START = {"w": np.zeros(4, dtype=np.float32)}
STEP = np.full(4, 0.1)


def config(**changed: Any) -> RunConfig:
    values: dict[str, Any] = {key.name: key.default for key in KEYS}
    values |= {"dataset": "synthetic", "privacy": "none", "rounds": 20}
    return RunConfig.parse(values | {k.replace("_", "-"): v for k, v in changed.items()})


def guard(judge: Any = None, **changed: Any) -> Guard:
    c = config(**changed)
    found = Guard(Defence(c, dict.fromkeys(TEN, 100), judge), Mover(c))
    found.mover.averaged.begin(START)
    return found


def outcome(
    update: np.ndarray, right: float, *, names: list[str] = TEN, images: float = 90.0
) -> Outcome:
    """A sum over ``names``, whose validation of the model so far got ``right`` of 1000."""
    sums = {"examples": images * len(names), "val-examples": 1000.0,
            "val-correct": right, "val-loss-sum": 500.0}  # fmt: skip
    return Outcome(names, names, mean_update={"w": update}, sums=sums)


def never(model: Any) -> Outcome:
    raise AssertionError("nobody is asked")


def follow(g: Guard, number: int, parts: list[Outcome], weights: Any, previous: Any) -> Turn:
    return g.follow(number, parts, weights, previous, never)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_model_that_validates_worse_is_undone_and_a_quarter_of_its_step_is_tried(
    ema: float, momentum: float
) -> None:
    g = guard(ema=ema, server_momentum=momentum)
    first = follow(g, 1, [outcome(STEP, 500)], START, START)
    safe_average, count = g.mover.averaged.weights, g.mover.averaged.count
    second = follow(g, 2, [outcome(STEP, 800)], first.weights, first.previous)
    back = follow(g, 3, [outcome(STEP, 100)], second.weights, second.previous)
    assert back.status == "rolled-back"
    assert back.told["rolled_back"]["round"] == 2
    expected = first.weights["w"] + SMALLER * (second.weights["w"] - first.weights["w"])
    np.testing.assert_allclose(back.weights["w"], expected, rtol=1e-6)
    assert back.previous is back.weights  # no momentum from what was undone
    assert g.mover.averaged.count == (count + 1 if ema else 0)
    if not ema:
        np.testing.assert_array_equal(g.mover.averaged.weights["w"], back.weights["w"])
    else:
        assert not np.array_equal(g.mover.averaged.weights["w"], safe_average["w"])
    # The smaller step validates as well as before: the run goes on.
    on = follow(g, 4, [outcome(STEP, 790)], back.weights, back.previous)
    assert on.status == "ok"


def test_a_smaller_step_that_harms_as_well_is_undone_again_and_halves_follow() -> None:
    g = guard(halves="alarm")
    first = follow(g, 1, [outcome(STEP, 800)], START, START)
    second = follow(g, 2, [outcome(STEP, 810)], first.weights, first.previous)
    back = follow(g, 3, [outcome(STEP, 100)], second.weights, second.previous)
    assert g.defence.divide(TEN, 4) == [TEN]
    again = follow(g, 4, [outcome(STEP, 100)], back.weights, back.previous)
    assert again.status == "rolled-back"
    way = again.weights["w"] - first.weights["w"]
    np.testing.assert_allclose(
        way, SMALLER**2 * (second.weights["w"] - first.weights["w"]), rtol=1e-4
    )
    assert len(g.defence.divide(TEN, 5)) == 2


def test_the_last_model_is_undone_if_it_harms() -> None:
    g = guard()
    first = follow(g, 1, [outcome(STEP, 800)], START, START)
    follow(g, 2, [outcome(100 * STEP, 800)], first.weights, first.previous)
    assert g.last(outcome(STEP, 100), 2) is not None
    np.testing.assert_array_equal(g.mover.averaged.weights["w"], first.weights["w"])


def test_a_sum_over_all_with_claims_that_nobody_agreed_to_leaves_the_model_as_it_is() -> None:
    g = guard()
    turn = follow(g, 1, [outcome(STEP, 500, images=1700)], START, START)
    assert turn.status == "failed"
    assert "were agreed on" in str(turn.problem)
    assert turn.weights is START
    assert len(g.defence.divide(TEN, 5)) == 2


def test_of_two_halves_the_clean_one_moves_the_model() -> None:
    g = guard()
    halves = g.defence.divide(TEN, 1)
    assert sorted(halves[0] + halves[1]) == TEN
    clean = outcome(STEP, 500, names=halves[0])
    harmed = outcome(-50 * STEP, 500, names=halves[1])
    turn = follow(g, 1, [harmed, clean], START, START)
    np.testing.assert_allclose(turn.weights["w"], STEP, rtol=1e-6)
    assert [one["members"] for one in turn.told["set_aside"]] == [halves[1]]


def test_two_clean_halves_are_the_sum_over_all() -> None:
    g = guard()
    one, other = g.defence.divide(TEN, 1)
    parts = [outcome(STEP, 500, names=one, images=30), outcome(1.2 * STEP, 500, names=other)]
    turn = follow(g, 1, parts, START, START)
    np.testing.assert_allclose(turn.weights["w"], STEP * (30 + 90 * 1.2) / 120, rtol=1e-6)
    assert turn.told == {}


def test_where_both_halves_were_harmed_the_step_is_small() -> None:
    g = guard()
    weights, previous = START, START
    for number in (1, 2, 3):
        turn = follow(g, number, [outcome(STEP, 500 + number)], weights, previous)
        weights, previous = turn.weights, turn.previous
    halves = [outcome(-1000 * STEP, 600, names=TEN[:5]), outcome(-900 * STEP, 600, names=TEN[5:])]
    turn = follow(g, 4, halves, weights, previous)
    assert np.linalg.norm(turn.weights["w"] - weights["w"]) <= 0.26 * np.linalg.norm(STEP)


def test_the_coordinators_own_images_shrink_a_step_until_it_does_not_harm() -> None:
    def judge(weights: Any) -> Validated:
        return Validated(0.9 if float(weights["w"][0]) < 0.5 else 0.1, 0.3, 1000.0)

    g = guard(judge)
    turn = follow(g, 1, [outcome(10 * STEP, 500)], START, START)
    np.testing.assert_allclose(turn.weights["w"], SMALLER * 10 * STEP, rtol=1e-5)
    assert turn.told["rolled_back"]["step"] == SMALLER


def test_the_coordinators_own_images_say_which_half_harms() -> None:
    """Where no norm shows it: the hospitals' figures would be a suspicion only."""

    reached = 0.0

    def judge(model: Any) -> Validated:
        return Validated(0.9 if float(model["w"][0]) >= reached - 0.01 else 0.1, 0.3, 1000.0)

    g, liar = guard(judge), TEN[3]
    g.defence.rolled_back = [1, 2]
    g.defence.halves_left = QUIET
    weights, previous = START, START
    for number in range(3, 12):
        names = g.defence.asked(TEN)
        halves = g.defence.divide(names, number)
        parts = [outcome(-STEP if liar in h else STEP, 500, names=h) for h in halves]
        turn = follow(g, number, parts, weights, previous)
        weights, previous = turn.weights, turn.previous
        reached = float(weights["w"][0])
        if g.defence.named:
            break
    assert list(g.defence.named) == [liar]
    assert liar not in g.defence.asked(TEN)


def test_figures_that_a_liar_could_have_made_up_leave_nobody_out() -> None:
    g, liar = guard(), TEN[3]
    g.defence.rolled_back = [1, 2]
    weights, previous = START, START
    for number in range(3, 12):
        g.defence.halves_left = QUIET
        halves = g.defence.divide(TEN, number)
        parts = [outcome(-STEP if liar in h else STEP, 500, names=h) for h in halves]

        def validated(model: Any, reached: float = float(weights["w"][0])) -> Outcome:
            return outcome(STEP, 900 if float(model["w"][0]) >= reached - 0.01 else 100)

        turn = g.follow(number, parts, weights, previous, validated)
        weights, previous = turn.weights, turn.previous
    assert g.defence.named == {}
    assert g.defence.summary()["suspected"] == [liar]


def test_impossible_figures_roll_nothing_back_and_call_for_halves() -> None:
    g = guard(halves="alarm")
    first = follow(g, 1, [outcome(STEP, 800)], START, START)
    turn = follow(g, 2, [outcome(STEP, -16_000)], first.weights, first.previous)
    assert turn.status == "ok"
    assert len(g.defence.divide(TEN, 3)) == 2


def test_a_defence_that_is_off_divides_judges_and_keeps_nothing() -> None:
    g = guard(defence=False)
    assert g.defence.divide(TEN, 1) == [TEN]
    first = follow(g, 1, [outcome(STEP, 800)], START, START)
    second = follow(g, 2, [outcome(1e4 * STEP, 10, images=1e6)], first.weights, first.previous)
    np.testing.assert_allclose(second.weights["w"], 0.1 + 1e4 * STEP, rtol=1e-4)
    assert g.memory() == {}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_what_a_defence_knows_survives_a_restart(ema: float) -> None:
    g = guard(ema=ema)
    weights, previous = START, START
    for number, right in enumerate((500, 600, 700), start=1):
        halves = g.defence.divide(TEN, number)
        parts = [outcome(STEP * (9 if "hospital-02" in h else 1), right, names=h) for h in halves]
        turn = follow(g, number, parts, weights, previous)
        weights, previous = turn.weights, turn.previous
    again, model = guard(ema=ema), g.mover.averaged.weights
    again.recall(g.memory(), model)
    again.mover.averaged.weights, again.mover.averaged.count = model, g.mover.averaged.count
    assert again.defence.summary() == g.defence.summary()
    assert again.defence.memory().tobytes() == g.defence.memory().tobytes()
    bad = [outcome(STEP, 100)]
    one, other = (follow(x, 4, bad, weights, previous) for x in (g, again))
    assert one.status == other.status == "rolled-back"
    np.testing.assert_array_equal(one.weights["w"], other.weights["w"])
    np.testing.assert_array_equal(g.mover.averaged.weights["w"], again.mover.averaged.weights["w"])


def test_too_few_hospitals_for_halves_are_asked_together() -> None:
    g = guard()
    g.defence.halves_left = QUIET
    assert g.defence.divide(TEN[:7], 1) == [TEN[:7]]


def test_a_named_hospital_stays_where_the_others_would_be_too_few() -> None:
    g = guard()
    g.defence.named = {TEN[0]: "it harms"}
    assert g.defence.asked(TEN[:5]) == TEN[1:5]
    assert g.defence.asked(TEN[:4]) == TEN[:4]

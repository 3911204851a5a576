"""A lying server that asks hospitals to judge: single counts stay out of its reach."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Message

from client_app.app import app
from common.aggregation import layout_for, params_for
from common.config import RunConfig
from common.files import consilium_home
from common.messages import Comparison, Job
from common.model import Weights
from common.secagg import RoundBinding, Segment, VectorLayout
from deploy.inprocess import Fault, InProcessGrid
from server_app.secure_round import Question, secure_sum
from tests.client_app.judging import (
    ALLOWED,
    CONFIG,
    RUN,
    SPEC,
    VALUES,
    asked,
    code,
    cohort,
    delivered,
    grid,
    judge,
    moved,
    reasons,
    weights,
)

__all__ = ["grid", "weights"]  # fixtures


def test_counts_never_leave_in_the_clear(grid: InProcessGrid, weights: Weights) -> None:
    bare = asked(weights, moved(weights, 0.01), invited=False)
    answer = app(Message(bare.to_record(), 1000, "query.judge"), grid.contexts[0]).content
    assert code(answer) == "judging-clear"
    assert set(answer) == {"refusal"}


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_in_a_run_of_vectors_no_round_is_answered(
    grid: InProcessGrid, weights: Weights, kind: str
) -> None:
    """Otherwise: each model's figures over any hospitals, past all that guards comparisons."""
    job = Job(RUN, 1, SPEC.digest(), weights).to_record()
    assert code(app(Message(job, 1000, kind), grid.contexts[0]).content) == "config"


def test_a_base_that_is_not_of_this_run_is_not_judged_against(
    grid: InProcessGrid, weights: Weights
) -> None:
    """A server names any model as the base, or a base of another run."""
    for question in (
        asked(moved(weights, 0.5), weights),
        asked(weights, moved(weights, 0.01), run="run-2"),
    ):
        found = judge(grid, cohort(), question)
        assert found.values == {}
        assert reasons(found) == {("judge", "refused: judging-base")}


@pytest.mark.parametrize("hair", [0.0, 1e-6])
def test_one_hospital_less_and_nothing_is_opened_whatever_the_candidate_is_called(
    grid: InProcessGrid, weights: Weights, hair: float
) -> None:
    """Otherwise: the same, or nearly the same, pair over six, then five: the sixth's counts."""
    candidate = moved(weights, 0.01)
    assert judge(grid, cohort(), asked(weights, candidate)).failure is None
    for number, gone in enumerate(range(6), start=2):
        fewer = {n: node for n, node in cohort().items() if node != 1000 + gone}
        again = judge(grid, fewer, asked(weights, moved(candidate, hair), number=number))
        assert again.values == {}
        assert reasons(again) == {("consistency", "refused: judging-cohort")}
        for context in grid.contexts.values():
            assert set(context.state) == {"identity"}
    whole = judge(grid, cohort(), asked(weights, moved(candidate, 0.02), number=9))
    assert whole.failure is None


def test_a_hospital_that_was_not_told_of_the_first_sum_cannot_be_singled_out_either(
    grid: InProcessGrid, weights: Weights
) -> None:
    """Its list of survivors never came: the others have seen it, and sign for no other one."""
    unheard = Fault(lambda kind, i, _: kind == "query.consistency" and i == 5, drop_request=True)
    grid.faults.append(unheard)
    question = asked(weights, moved(weights, 0.01))
    first = secure_sum(
        grid, cohort(), RoundBinding.from_bytes(question.invitation),
        Question(lambda _: question.to_record(), "query.judge", "judge", 20.0, lambda: 2.0),
    )  # fmt: skip
    assert first.failure is None
    assert first.contributed == sorted(cohort())
    grid.faults.clear()
    for number, who in enumerate((cohort(1, 2, 3, 4, 5), cohort(0, 1, 2, 3, 4)), start=2):
        again = judge(grid, who, asked(weights, moved(weights, 0.01), number=number))
        assert again.values == {}


def test_the_same_base_in_another_run_is_judged_over_the_same_hospitals(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hospital's outbox answers a second run at once; its memory of the first stays, too."""
    consilium_home().mkdir(parents=True, exist_ok=True)
    policies = {}
    for i in range(6):  # a home of its own for each, over all runs, as real hospitals have
        file = consilium_home() / f"policy-{i}.toml"
        file.write_text(ALLOWED + "evaluate = true\n")
        policies[i] = {"policy": str(file)}
    candidate = moved(weights, 0.01)
    first = delivered(InProcessGrid(app, 6, VALUES, node_configs=policies), weights, monkeypatch)
    assert judge(first, cohort(), asked(weights, candidate)).failure is None
    second = InProcessGrid(app, 6, VALUES, node_configs=policies)
    delivered(second, weights, monkeypatch, run="run-2")
    again = judge(second, cohort(0, 1, 2, 3, 4), asked(weights, candidate, run="run-2"))
    assert again.values == {}
    assert reasons(again) == {("consistency", "refused: judging-cohort")}


@pytest.mark.parametrize(
    ("binding", "refused"),
    [
        ({"layout": VectorLayout((Segment(name="gained", length=1, bound=9, kind="integer"),), 1)},
         "secagg-layout"),
        ({"layout": layout_for("validate", 0, CONFIG)}, "secagg-layout"),
        ({"purpose": "validate"}, "secagg-invitation"),
        ({"round": 7}, "secagg-invitation"),
        ({"run": "run-9"}, "secagg-invitation"),
        ({"model_hash": bytes(32)}, "secagg-model"),
    ],
)  # fmt: skip
def test_an_invitation_to_anything_else_is_refused(
    grid: InProcessGrid, weights: Weights, binding: dict[str, Any], refused: str
) -> None:
    question = asked(weights, moved(weights, 0.01), binding=binding)
    answer = app(Message(question.to_record(), 1000, "query.judge"), grid.contexts[0]).content
    assert code(answer) == refused
    assert set(grid.contexts[0].state) <= {"identity"}


def test_a_smaller_cohort_than_the_run_says_is_refused(
    grid: InProcessGrid, weights: Weights
) -> None:
    small = RunConfig.parse(
        VALUES | {"min-cohort": 3, "reconstruction-threshold": 3, "num-shares": 3}
    )
    question = asked(weights, moved(weights, 0.01), binding={"params": params_for(small, 3)})
    found = judge(grid, cohort(0, 1, 2), question)
    assert found.values == {}
    assert reasons(found) == {("judge", "refused: secagg-parameters")}
    few = judge(grid, cohort(0, 1, 2), asked(weights, moved(weights, 0.01), number=2))
    assert few.values == {}
    assert few.failure is not None and "4 are needed" in few.failure


def test_hospitals_that_are_sent_different_candidates_are_in_no_sum_together(
    grid: InProcessGrid, weights: Weights
) -> None:
    """Otherwise one hospital's counts are those of a candidate that changes nothing for others."""
    question = asked(weights, moved(weights, 0.01))
    other = asked(weights, moved(weights, 0.3))
    lie = Comparison(
        run=RUN, round=1, base=question.base, model_digest=question.model_digest,
        current=weights, candidate=other.candidate, invitation=question.invitation,
    )  # fmt: skip
    answer = app(Message(lie.to_record(), 1000, "query.judge"), grid.contexts[0]).content
    assert code(answer) == "secagg-model"


def test_only_so_many_candidates_are_judged_for_one_base(
    grid: InProcessGrid, weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client_app.cohorts.MOST_CANDIDATES", 2)
    for number in (1, 2):
        candidate = moved(weights, 0.01 * number)
        assert judge(grid, cohort(), asked(weights, candidate, number=number)).failure is None
    third = judge(grid, cohort(), asked(weights, moved(weights, 0.03), number=3))
    assert third.values == {}
    assert reasons(third) == {("judge", "refused: judging-many")}
    again = asked(weights, moved(weights, 0.02), number=4)
    assert judge(grid, cohort(), again).failure is None  # one that was judged already tells nothing

"""A hospital that is asked to judge a candidate: what it allows, and what a lying server gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from client_app import egress, work
from client_app.app import app
from client_app.cohorts import Cohorts
from client_app.hospital import Hospital
from common.aggregation import GAINED, JUDGE, LOST, layout_for, params_for
from common.config import KEYS, RunConfig
from common.errors import ProtocolError
from common.files import consilium_home
from common.messages import Comparison, Job, Offer, Refusal
from common.model import ModelSpec, Weights, build, get_weights
from common.secagg import RoundBinding, Segment, VectorLayout
from common.training import evaluate
from common.vectors import base_id
from deploy.inprocess import Fault, InProcessGrid
from server_app.secure_round import Question, SecureSum, secure_sum

SPEC = ModelSpec(width=0.03125)
RUN = "run-1"
VALUES: dict[str, Any] = {key.name: key.default for key in KEYS} | {
    "mode": "vectors", "dataset": "synthetic", "synthetic-size": 240, "secagg": False,
    "privacy": "none", "partition": "iid", "partition-min-size": 5, "batch-size": 512,
    "model-width": 0.03125, "allow-random-base": True, "judged-by": "hospitals",
}  # fmt: skip
CONFIG = RunConfig.parse(VALUES)
ALLOWED = (
    'version = 1\n[aggregation]\nsecagg = "optional"\nrequire-roster = false\n'
    '[privacy]\nallow-non-private = true\n[vectors]\nsend = "any"\n'
)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return get_weights(build(SPEC, seed=0))


@pytest.fixture
def grid(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> InProcessGrid:
    """Six hospitals that have delivered a vector for ``weights``."""
    return delivered(InProcessGrid(app, 6, VALUES), weights, monkeypatch)


def delivered(
    grid: InProcessGrid, weights: Weights, monkeypatch: pytest.MonkeyPatch, run: str = RUN
) -> InProcessGrid:
    """What the vectors hold does not matter here: they are not trained."""

    def untrained(offered: Any, name: str, hospital: Any, context: Any) -> work.Tuned:
        zeros = {k: np.full_like(v, 1e-3) for k, v in sorted(offered.weights.items())}
        return work.Tuned(zeros, 20, None, None, {})

    with monkeypatch.context() as patch:
        patch.setattr(work, "tune", untrained)
        for context in grid.contexts.values():
            offered = Offer(run=run, version=0, base=base_id(SPEC.digest(), weights),
                            model_digest=SPEC.digest(), weights=weights)  # fmt: skip
            answer = app(Message(offered.to_record(), 1000, "query.offer"), context)
            assert Refusal.in_record(answer.content) is None
    return grid


def moved(weights: Weights, by: float) -> Weights:
    return {k: v + np.float32(by) for k, v in weights.items()}


def cohort(*hospitals: int) -> dict[str, int]:
    return {f"hospital-0{i}": 1000 + i for i in hospitals or range(6)}


def asked(
    weights: Weights, candidate: Weights, *, number: int = 1, run: str = RUN,
    binding: dict[str, Any] | None = None, invited: bool = True,
) -> Comparison:  # fmt: skip
    """A comparison; ``binding``: what a lying server puts into its invitation."""
    bare = Comparison(
        run=run, round=number, base=base_id(SPEC.digest(), weights), model_digest=SPEC.digest(),
        current=weights, candidate=candidate,
    )  # fmt: skip
    told: dict[str, Any] = {
        "run": run, "round": number, "purpose": JUDGE, "params": params_for(CONFIG, 6),
        "layout": layout_for(JUDGE, 0, CONFIG), "model_hash": bare.models,
    } | (binding or {})  # fmt: skip
    invitation = RoundBinding(**told).to_bytes() if invited else b""
    return Comparison(
        run=run, round=number, base=bare.base, model_digest=bare.model_digest,
        current=weights, candidate=candidate, invitation=invitation,
    )  # fmt: skip


def judge(grid: InProcessGrid, who: dict[str, int], question: Comparison) -> SecureSum:
    return secure_sum(
        grid, who, RoundBinding.from_bytes(question.invitation),
        Question(question.to_record(), "query.judge", "judge", 20.0, lambda: 20.0),
    )  # fmt: skip


def reasons(found: SecureSum) -> set[tuple[str, str]]:
    return {(a.stage, a.reason.split(" (")[0]) for a in found.absent}


def alone(question: Comparison, **config: Any) -> RecordDict:
    """What the first hospital of a run, which has delivered nothing, answers."""
    values = VALUES | {key.replace("_", "-"): value for key, value in config.items()}
    context = InProcessGrid(app, 6, values).contexts[0]
    return app(Message(question.to_record(), 1000, "query.judge"), context).content


def code(record: RecordDict) -> str | None:
    refusal = Refusal.in_record(record)
    return None if refusal is None else refusal.code


def test_the_sums_are_those_of_the_hospitals_own_counts(
    grid: InProcessGrid, weights: Weights
) -> None:
    candidate = get_weights(build(SPEC, seed=1))
    question = asked(weights, candidate)
    found = judge(grid, cohort(), question)
    counts = [work.compare(question, Hospital.from_context(c)) for c in grid.contexts.values()]
    assert found.failure is None
    assert found.values[GAINED][0] == sum(gained for gained, _ in counts) > 0
    assert found.values[LOST][0] == sum(lost for _, lost in counts) > 0
    assert found.contributed == sorted(cohort())


def test_the_counts_are_those_of_two_evaluations(grid: InProcessGrid, weights: Weights) -> None:
    """gained − lost is the difference of the numbers that are right."""
    from client_app.data import data_of

    question = asked(weights, get_weights(build(SPEC, seed=2)))
    hospital = Hospital.from_context(grid.contexts[3])
    gained, lost = work.compare(question, hospital)
    val = data_of(hospital).val
    right = [
        evaluate(build(SPEC), w, val.images, val.labels).correct
        for w in (question.current, question.candidate)
    ]
    assert gained - lost == right[1] - right[0]
    assert 0 <= gained <= right[1] and 0 <= lost <= right[0]
    assert work.compare(asked(weights, weights), hospital) == (0, 0)


def test_every_field_of_a_comparison_is_in_the_egress_log(
    grid: InProcessGrid, weights: Weights
) -> None:
    judge(grid, cohort(), asked(weights, moved(weights, 0.01)))
    home = consilium_home() / "simulation" / "hospital-00"
    lines = [x for x in egress.read(home / egress.FILE) if x["message"] != "offer"]
    assert [x["message"] for x in lines] == [
        "judge", "share", "masked", "masked", "masked", "consistency", "unmask"
    ]  # fmt: skip
    inside = {x["field"]: x["protection"] for x in lines if x["message"] == "masked"}
    assert set(inside) == {"masked", GAINED, LOST}
    for name in (GAINED, LOST):
        assert "only the sum over 4 or more hospitals is opened" in inside[name]
        assert "exact, no differential privacy" in inside[name]
    assert {(x["run"], x["round"]) for x in lines} == {(RUN, "1")}


@pytest.mark.parametrize("evaluate", ["", "evaluate = false\n"])
def test_a_policy_that_does_not_say_yes_says_no(weights: Weights, evaluate: str) -> None:
    consilium_home().mkdir(parents=True, exist_ok=True)
    (consilium_home() / "policy.toml").write_text(ALLOWED + evaluate)
    assert code(alone(asked(weights, moved(weights, 0.01)))) == "vectors-policy"


def test_without_the_roster_that_the_policy_asks_for_nothing_is_judged(weights: Weights) -> None:
    """Otherwise the server could be every other hospital of the sum itself."""
    consilium_home().mkdir(parents=True, exist_ok=True)
    strict = ALLOWED.replace("require-roster = false\n", "") + "evaluate = true\n"
    (consilium_home() / "policy.toml").write_text(strict)
    assert code(alone(asked(weights, moved(weights, 0.01)))) == "secagg-roster"


def test_a_policy_that_says_yes_is_enough(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    consilium_home().mkdir(parents=True, exist_ok=True)
    (consilium_home() / "policy.toml").write_text(ALLOWED + "evaluate = true\n")
    grid = delivered(InProcessGrid(app, 6, VALUES), weights, monkeypatch)
    assert judge(grid, cohort(), asked(weights, moved(weights, 0.01))).failure is None


@pytest.mark.parametrize(
    "config",
    [{"judged_by": "public"}, {"judged_by": "none"}, {"judged_by": "public", "mode": "fedavg"}],
)
def test_in_a_run_whose_hospitals_do_not_judge_none_does(
    weights: Weights, config: dict[str, Any]
) -> None:
    assert code(alone(asked(weights, moved(weights, 0.01)), **config)) == "config"


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


def test_a_base_must_have_the_id_that_it_is_named_by(weights: Weights) -> None:
    question = asked(weights, moved(weights, 0.01))
    object.__setattr__(question, "current", moved(weights, 0.5))
    with pytest.raises(ProtocolError, match="not those of the base"):
        Comparison.from_record(question.to_record())


@pytest.mark.parametrize("broken", ["shape", "nan", "missing", "dtype"])
def test_models_that_do_not_compare_are_refused(weights: Weights, broken: str) -> None:
    candidate = dict(weights)
    name = next(iter(weights))
    candidate[name] = {
        "shape": weights[name][..., :0], "nan": weights[name] * np.float32("nan"),
        "missing": weights[name], "dtype": weights[name].astype(np.float64),
    }[broken]  # fmt: skip
    if broken == "missing":
        del candidate[name]
    with pytest.raises(ProtocolError):
        Comparison.from_record(asked(weights, candidate).to_record())


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
        Question(question.to_record(), "query.judge", "judge", 20.0, lambda: 2.0),
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


def test_what_is_kept_of_a_comparison_is_names_and_hashes_for_the_owner_only(
    grid: InProcessGrid, weights: Weights
) -> None:
    question = asked(weights, moved(weights, 0.01))
    judge(grid, cohort(), question)
    hospital = Hospital.from_context(grid.contexts[0])
    path: Path = Cohorts(hospital, RUN, question.base)._path
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    text = path.read_text()
    assert question.models.hex() in text and "hospital-05" in text
    assert GAINED not in text and LOST not in text


def test_with_judging_hospitals_a_vector_tells_no_figures_of_its_own(
    weights: Weights,
) -> None:
    """They would be the hospital's own counts, in the clear, of the very base that is judged."""
    from common.messages import Delivery
    from common.vectors import SignedVector

    told = {}
    for judged_by in ("hospitals", "public"):
        run = f"run-{judged_by}"
        offered = Offer(run=run, version=0, base=base_id(SPEC.digest(), weights),
                        model_digest=SPEC.digest(), weights=weights)  # fmt: skip
        context = InProcessGrid(app, 6, VALUES | {"judged-by": judged_by}).contexts[0]
        answer = app(Message(offered.to_record(), 1000, "query.offer"), context).content
        vector = SignedVector.from_bytes(Delivery.from_record(answer, run=run).vector).vector
        told[judged_by] = set(vector.metrics)
    assert told["hospitals"] == set()
    assert "val-correct" in told["public"]


def test_asking_to_judge_imports_no_torch_before_there_is_something_to_compute() -> None:
    import subprocess
    import sys

    said = subprocess.run(
        [sys.executable, "-c", "import sys, client_app.judging; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == "False"

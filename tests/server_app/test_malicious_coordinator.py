"""A server that lies at the transport: other names, other orders, old states, the same model again.

Each attack here once worked, or would work on a protocol whose messages alone are checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from client_app.app import app
from common.config import KEYS, RunConfig
from common.errors import RoundError
from common.messages import Job, Refusal
from common.model import ModelSpec, build, get_weights
from common.secagg import VectorLayout
from deploy.inprocess import Fault, InProcessGrid, run_in_process
from server_app import fedavg
from server_app import secure_round as transport
from server_app.rounds import Outcome, plain_round
from server_app.secure_round import secure_round
from tests.server_app.running import SECURE, at, lines, newest

VALUES: dict[str, Any] = {key.name: key.default for key in KEYS} | SECURE
CONFIG = RunConfig.parse(VALUES)
SPEC = ModelSpec(width=SECURE["model-width"])


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    return get_weights(build(SPEC, seed=0))


@pytest.fixture
def grid() -> InProcessGrid:
    return InProcessGrid(app, 6, VALUES)


def cohort(grid: InProcessGrid, *hospitals: int) -> dict[str, int]:
    return {f"hospital-0{i}": 1000 + i for i in hospitals or range(grid.num_hospitals)}


def ask(grid: InProcessGrid, who: dict[str, int], job: Job, *, train: bool = True) -> Outcome:
    return secure_round(grid, who, job, CONFIG, train=train)


def reasons(outcome: Outcome) -> set[str]:
    return {a.reason.split(" (")[0] for a in outcome.absent}


def test_a_model_is_summed_once_whatever_the_server_calls_the_run_or_the_round(
    grid: InProcessGrid, weights: dict[str, np.ndarray]
) -> None:
    """Otherwise: the same round over six, then over five hospitals; the difference is the sixth."""
    everyone, fewer = cohort(grid), cohort(grid, 0, 1, 2, 3, 4)
    assert len(ask(grid, everyone, Job("run-1", 3, SPEC.digest(), weights)).contributed) == 6
    for run, number in (("run-2", 3), ("run-2", 4), ("run-1", 3), ("run-1", 2)):
        again = ask(grid, fewer, Job(run, number, SPEC.digest(), weights))
        assert again.contributed == []
        assert again.mean_update is None
        assert reasons(again) == {"refused: secagg-repeated"}


def test_the_same_seed_may_be_run_again(weights: dict[str, np.ndarray]) -> None:
    """A second experiment starts from the same first weights: another Flower run."""
    for _ in range(2):
        run_in_process({**SECURE, "rounds": 1}, num_hospitals=5)


def test_after_a_failed_round_the_next_one_may_start_from_the_same_model(
    grid: InProcessGrid, weights: dict[str, np.ndarray]
) -> None:
    grid.faults.append(Fault(at("unmask", 0, 1, 2), drop_reply=True, times=3))
    failed = ask(grid, cohort(grid), Job("run-1", 1, SPEC.digest(), weights))
    assert failed.mean_update is None
    following = ask(grid, cohort(grid), Job("run-1", 2, SPEC.digest(), weights))
    assert len(following.contributed) == 6


def test_validation_figures_of_a_model_are_in_one_sum_only(
    grid: InProcessGrid, weights: dict[str, np.ndarray]
) -> None:
    """Otherwise: all six in training, five in validation; the difference is one's accuracy."""
    first = ask(grid, cohort(grid), Job("run-1", 1, SPEC.digest(), weights))
    assert first.sums["val-examples"] > 0
    fewer = cohort(grid, 0, 1, 2, 3, 4)
    job = Job("run-1", 1, SPEC.digest(), weights)
    again = ask(grid, fewer, job, train=False)
    assert again.sums == {"val-examples": 0.0, "val-correct": 0.0, "val-loss-sum": 0.0}
    assert again.validation() is None


def test_the_order_in_which_the_server_sends_the_weights_changes_nothing(
    grid: InProcessGrid, weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise one hospital's update lands where the others' are zero."""
    original = transport._Talk.stage

    def permuted(self: Any, stage: str, content: Any, collect: Any, **kwargs: Any) -> None:
        def lying(name: str) -> Any:
            record = content(name)
            if stage == "train" and name == "hospital-02":
                job = Job.from_record(record)
                other = dict(reversed(list(job.weights.items())))
                return Job(job.run, job.round, job.model_digest, other, job.invitation).to_record()
            return record

        original(self, stage, lying, collect, **kwargs)

    monkeypatch.setattr(transport._Talk, "stage", permuted)
    lied = ask(grid, cohort(grid), Job("run-1", 1, SPEC.digest(), weights))
    monkeypatch.setattr(transport._Talk, "stage", original)
    assert lied.mean_update is not None
    plain_grid = InProcessGrid(app, 6, VALUES | {"secagg": False})
    plain = plain_round(
        plain_grid, cohort(grid), Job("run-1", 1, SPEC.digest(), weights), train=True, timeout=60
    )
    assert plain.mean_update is not None
    for name, array in plain.mean_update.items():
        np.testing.assert_allclose(lied.mean_update[name], array, atol=2.0**-20)


@pytest.mark.parametrize("stage", ["share", "masked", "consistency", "unmask"])
def test_a_stage_is_answered_once_even_from_an_old_state(
    stage: str, grid: InProcessGrid, weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower may start two processes from one stored state: the second gets nothing."""
    original = InProcessGrid._handle
    second: list[Any] = []

    def twice(self: InProcessGrid, message: Any, partition_id: int) -> Any:
        if message.metadata.message_type != f"query.{stage}" or partition_id != 0:
            return original(self, message, partition_id)
        context = self.contexts[0]
        old = recorddict_to_proto(context.state)
        reply = original(self, message, partition_id)
        kept = recorddict_to_proto(context.state)
        context.state = recorddict_from_proto(old)
        second.append(original(self, message, partition_id).content)
        context.state = recorddict_from_proto(kept)
        return reply

    monkeypatch.setattr(InProcessGrid, "_handle", twice)
    outcome = ask(grid, cohort(grid), Job("run-1", 1, SPEC.digest(), weights))
    assert len(outcome.contributed) == 6  # the honest half of it went through
    (refused,) = (Refusal.in_record(record) for record in second)
    assert refused is not None
    assert refused.code == "secagg-stage-repeated"


def test_a_state_of_an_earlier_round_is_refused(
    grid: InProcessGrid, weights: dict[str, np.ndarray]
) -> None:
    grid.faults.append(Fault(at("consistency", 0, 1, 2), drop_reply=True, times=3))
    closes = Fault(lambda message_type, *_: message_type == "query.close", drop_request=True)
    grid.faults.append(closes)
    ask(grid, cohort(grid), Job("run-1", 1, SPEC.digest(), weights))
    old = {i: recorddict_to_proto(c.state) for i, c in grid.contexts.items()}
    ask(grid, cohort(grid), Job("run-1", 2, SPEC.digest(), weights))
    from client_app import secagg
    from client_app.hospital import Hospital

    for i, context in grid.contexts.items():
        context.state = recorddict_from_proto(old[i])
        with pytest.raises(secagg.Refusal) as caught:
            secagg.answer("unmask", b"anything", context, Hospital.from_context(context))
        assert caught.value.code == "secagg-no-round"
        assert set(context.state) == {"identity"}


@pytest.mark.parametrize(
    "stage",
    ["train", "masked", *(pytest.param(s, marks=pytest.mark.slow)
                          for s in ("share", "consistency", "unmask"))],
)  # fmt: skip
def test_every_end_of_a_round_wipes_also_for_who_dropped_in_the_last_one(stage: str) -> None:
    settings = {**SECURE, "rounds": 1, "round-timeout": 4.0 if stage == "train" else 20.0}
    lost = Fault(at(stage, 3), drop_reply=True)
    grid = run_in_process(settings, num_hospitals=5, faults=[lost])
    grid.close()
    for context in grid.contexts.values():
        assert set(context.state) <= {"identity"}


@pytest.mark.parametrize("kind", ["query.share", "train", "evaluate"])
def test_a_request_that_makes_no_sense_wipes_the_round(
    kind: str, grid: InProcessGrid, weights: dict[str, np.ndarray]
) -> None:
    from flwr.app import Message, RecordDict

    grid.faults.append(Fault(at("share", *range(6)), drop_request=True))
    closes = Fault(lambda message_type, *_: message_type == "query.close", drop_request=True)
    grid.faults.append(closes)
    ask(grid, cohort(grid), Job("run-1", 1, SPEC.digest(), weights))
    assert "secagg-input" in grid.contexts[0].state
    reply = app(Message(RecordDict(), 1000, kind), grid.contexts[0])
    assert Refusal.in_record(reply.content) is not None
    assert set(grid.contexts[0].state) == {"identity"}


def test_a_missing_roster_is_refused_before_training(tmp_path: Any) -> None:
    import time

    from client_app import work
    from client_app.hospital import Hospital
    from common.files import consilium_home

    consilium_home().mkdir(parents=True)
    (consilium_home() / "policy.toml").write_text("version = 1\n")
    trained: list[float] = []
    original = work.train
    work.train = lambda *a, **k: trained.append(time.monotonic()) or original(*a, **k)  # type: ignore[assignment]
    try:
        grid = InProcessGrid(app, 5, VALUES)
        job = Job("run-1", 1, SPEC.digest(), get_weights(build(SPEC, seed=0)))
        outcome = ask(grid, cohort(grid), job)
    finally:
        work.train = original
    assert reasons(outcome) == {"refused: secagg-roster"}
    assert trained == []
    assert Hospital.from_context(grid.contexts[0]).policy.secagg.require_roster


def test_a_server_that_runs_the_same_round_again_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two sums over cohorts that differ in one hospital would show its input."""
    outcomes: list[Any] = []

    def twice(*args: Any, **kwargs: Any) -> Any:
        first = secure_round(*args, **kwargs)
        grid, cohort, *rest = args
        smaller = dict(list(cohort.items())[1:])
        again = secure_round(grid, smaller, *rest, **kwargs)
        outcomes.append(again)
        return first

    monkeypatch.setattr(fedavg, "secure_round", twice)
    run_in_process({**SECURE, "rounds": 1, "num-shares": 5}, num_hospitals=6)
    assert outcomes
    for again in outcomes:
        assert again.contributed == []
        assert reasons(again) == {"refused: secagg-repeated"}


def test_a_server_that_asks_for_a_finer_scale_or_another_layout_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = transport.layout_for

    def other(purpose: str, length: int, config: Any, **more: Any) -> VectorLayout:
        layout = original(purpose, length, config, **more)
        return VectorLayout(layout.segments, layout.max_weight * 2) if purpose == "validate" else (
            VectorLayout((*layout.segments[:-1],), layout.max_weight)
        )  # fmt: skip

    monkeypatch.setattr(transport, "layout_for", other)
    with pytest.raises(RoundError):
        run_in_process({**SECURE, "rounds": 1}, num_hospitals=5)
    assert {d["reason"].split(" (")[0] for d in lines(newest())[1]["dropped"]} == {
        "refused: secagg-layout"
    }


def test_a_server_that_sends_hospitals_different_models_gets_no_sum(
    weights: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The binding names the model's hash; a hospital that got another one refuses."""
    grid = InProcessGrid(app, 5, VALUES)
    original = transport._Talk.stage

    def split(self: Any, stage: str, content: Any, collect: Any, **kwargs: Any) -> None:
        def lying(name: str) -> Any:
            if stage != "train" or name != "hospital-02":
                return content(name)
            job = Job.from_record(content(name))
            bad = {k: v + 1 for k, v in job.weights.items()}
            return Job(job.run, job.round, job.model_digest, bad, job.invitation).to_record()

        original(self, stage, lying, collect, **kwargs)

    monkeypatch.setattr(transport._Talk, "stage", split)
    outcome = ask(grid, cohort(grid), Job("run-1", 1, SPEC.digest(), weights))
    assert [(a.hospital, a.reason.split(" (")[0]) for a in outcome.absent] == [
        ("hospital-02", "refused: secagg-model")
    ]
    assert "hospital-02" not in outcome.contributed

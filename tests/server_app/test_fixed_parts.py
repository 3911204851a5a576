"""In a run, what rounds do not move travels once to each hospital, and into no sum."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.common.serde import recorddict_to_proto
from safetensors.numpy import load_file

from client_app import fixed
from client_app.hospital import Hospital
from common.config import RunConfig
from common.errors import RoundError
from common.files import consilium_home
from common.fixed import groups_of
from common.messages import Job
from common.model import ModelSpec, build, get_weights, moving_names
from common.secagg import RoundBinding
from deploy.inprocess import run_in_process
from server_app import fedavg, secure_round
from tests.server_app.running import lines, newest, states, the_run
from tests.server_app.test_head_without_privacy import PEOPLE, RUN

pytestmark = pytest.mark.usefixtures("small_prior")

HEAD = 8 * 65
SHARED: dict[str, Any] = {
    k: v for k, v in RUN.items() if k not in ("learning-rate", "batch-size", "optimizer")
} | {"privacy": "distributed", "epsilon": 20.0, "whitening": True, "sampling-rate": 1.0}


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Every job that a hospital reads, in their order."""
    monkeypatch.setattr(fixed, "_known", type(fixed._known)())
    seen: list[Job] = []
    read = Job.from_record.__func__  # type: ignore[attr-defined]

    def noted(cls: type[Job], record: Any) -> Job:
        seen.append(read(cls, record))
        return seen[-1]

    monkeypatch.setattr(Job, "from_record", classmethod(noted))
    return seen


def lying(monkeypatch: pytest.MonkeyPatch, lie: Callable[[Job], Job]) -> None:
    """The server sends what ``lie`` makes of its jobs."""
    honest = Job.to_record
    monkeypatch.setattr(Job, "to_record", lambda self: honest(lie(self)))


def test_a_priors_features_are_sent_once_and_only_the_head_is_summed(
    messages: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: set[int] = set()
    summed = secure_round.secure_sum

    def noted(grid: Any, cohort: Any, binding: RoundBinding, *rest: Any, **more: Any) -> Any:
        lengths.update(s.length for s in binding.layout.segments if s.name == "update")
        return summed(grid, cohort, binding, *rest, **more)

    monkeypatch.setattr(secure_round, "secure_sum", noted)
    run_in_process({**RUN, "secagg": True}, num_hospitals=PEOPLE)
    assert lengths == {HEAD}
    assert [bool(job.fixed) for job in messages] == [True] * PEOPLE + [False] * (4 * PEOPLE)
    assert all(set(job.weights) == {"head.weight"} for job in messages)
    # And what is kept of the run is whole.
    first, last = (load_file(the_run() / f"round-000{i}.safetensors") for i in (0, 4))
    assert set(first) == set(last) > {"head.weight", "mean", "matrix"}
    assert not np.array_equal(first["head.weight"], last["head.weight"])


@pytest.mark.parametrize(("hidden", "whole", "later"), [(0, 3.6e5, 3.1e3), (512, 5.1e5, 155e3)])
def test_a_later_rounds_message_is_as_large_as_what_moves(
    hidden: int, whole: float, later: float
) -> None:
    spec = ModelSpec(model="prior-head", width=0.25, hidden_units=hidden)
    config = RunConfig.parse({**RUN, "hidden-units": hidden})
    weights, moving = get_weights(build(spec, seed=0)), moving_names(config, spec)
    rest = {n: a for n, a in weights.items() if n not in moving}
    job = Job("r", 1, spec.digest(), {n: weights[n] for n in moving}, bytes(400), rest)
    sizes = [
        recorddict_to_proto(j.to_record()).ByteSize()
        for j in (job, job.without_fixed(groups_of(job.fixed)))
    ]
    assert whole * 0.95 < sizes[0] <= whole and later * 0.9 < sizes[1] <= later


def test_where_whitening_is_released_it_is_sent_again_and_the_features_are_not(
    messages: list[Job],
) -> None:
    run_in_process({**SHARED, "rounds": 5}, num_hospitals=PEOPLE)
    sent = [(job.round, {name.split(".")[0] for name in job.fixed}) for job in messages]
    everything = {"features", "mean", "matrix"}
    expected = [(1, everything), (2, {"mean"}), (3, {"matrix"}), (4, set()), (5, set()), (5, set())]
    assert sent == [one for one in expected for _ in range(PEOPLE)]


@pytest.mark.parametrize("secagg", [True, False])
def test_who_lost_its_copy_is_sent_another_and_misses_nothing(
    secagg: bool, messages: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "secure_round" if secagg else "plain_round"
    ends, lost = getattr(fedavg, name), []

    def losing(*args: Any, **more: Any) -> Any:
        if args[2].round == 3 and not lost:
            lost.append(consilium_home() / "simulation" / "fixed")
            shutil.rmtree(lost[0])
            fixed._known.clear()
        return ends(*args, **more)

    monkeypatch.setattr(fedavg, name, losing)
    run_in_process({**RUN, "secagg": secagg}, num_hospitals=PEOPLE)
    for record in lines(the_run())[1:]:
        assert record["status"] == "ok" and not record["dropped"]
    assert lost
    whole = [job.round for job in messages if job.fixed]
    # The first of them that is sent all of it mends the folder that they share.
    assert whole[:PEOPLE] == [1] * PEOPLE and 1 <= len(whole[PEOPLE:]) <= PEOPLE
    assert set(whole[PEOPLE:]) == {3}


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped() -> None:
    """Its memory holds what rounds move; the rest is the averaged model's own."""
    values = {**RUN, "secagg": False, "ema": 0.5, "learning-rate-schedule": "constant"}
    run_in_process(values, num_hospitals=PEOPLE)
    expected = load_file(the_run() / "model.safetensors")
    run_in_process({**values, "rounds": 2}, num_hospitals=PEOPLE)
    run = newest()
    run_in_process({**values, "resume": run.name}, num_hospitals=PEOPLE)
    found = load_file(run / "model.safetensors")
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def moved_out(job: Job) -> Job:
    """One of several entries that rounds move is said to be fixed."""
    name = "hidden.bias"
    weights = {n: a for n, a in job.weights.items() if n != name}
    return Job(job.run, job.round, job.model_digest, weights, job.invitation,
               {**job.fixed, name: job.weights[name]}, job.left_out)  # fmt: skip


def moved_in(job: Job) -> Job:
    """A prior's whitening is to be summed, too."""
    if "mean" not in job.fixed:
        return job
    rest = {n: a for n, a in job.fixed.items() if n != "mean"}
    return Job(job.run, job.round, job.model_digest, {**job.weights, "mean": job.fixed["mean"]},
               job.invitation, rest, job.left_out)  # fmt: skip


@pytest.mark.parametrize("lie", [moved_out, moved_in])
def test_a_server_that_leaves_entries_out_of_a_sum_or_adds_some_is_refused(
    lie: Callable[[Job], Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it could have the same model's parts summed one by one, over other hospitals each."""
    lying(monkeypatch, lie)
    with pytest.raises(RoundError, match="round 3 failed"):
        run_in_process({**RUN, "hidden-units": 4, "secagg": True}, num_hospitals=PEOPLE)
    reasons = {a["reason"] for record in lines(the_run()) for a in record.get("dropped", [])}
    assert reasons and all("refused: protocol" in reason for reason in reasons)


def other_mean() -> dict[str, np.ndarray]:
    return {"mean": np.ones(64, dtype=np.float32)}


def sent_other(job: Job) -> Job:
    """Other fixed entries than the model's that the sum is bound to."""
    return replace(job, fixed={**job.fixed, **other_mean()}) if job.fixed else job


def named_other(job: Job) -> Job:
    """What was left out is said to be another set, which the hospital holds, too."""
    (own,), (other,) = (groups_of({"mean": mean * 0 + i}) for i, mean in
                        enumerate([other_mean()["mean"]] * 2))  # fmt: skip
    return replace(job, left_out=tuple(other if d == own else d for d in job.left_out))


@pytest.mark.parametrize(("lie", "good"), [(sent_other, set()), (named_other, {1, 3})])
def test_a_server_that_gives_hospitals_another_fixed_part_is_refused(
    lie: Callable[[Job], Job], good: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum is bound to the whole model, the entries that a hospital had before included."""
    config = RunConfig.parse({"dataset": "synthetic"})
    home = consilium_home() / "simulation" / "hospital-00"
    fixed.keep(other_mean(), Hospital("hospital-00", home, config, 0, PEOPLE))
    lying(monkeypatch, lie)
    with pytest.raises(RoundError):
        run_in_process({**RUN, "secagg": True}, num_hospitals=PEOPLE)
    records = lines(the_run())[1:]
    assert {record["round"] for record in records if record["status"] == "ok"} == good
    reasons = {a["reason"].split(" (")[0] for record in records for a in record["dropped"]}
    assert reasons == {"refused: secagg-model"}


def test_a_model_that_the_sum_is_not_bound_to_costs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is found out before anything is drawn and charged."""
    lying(monkeypatch, sent_other)
    with pytest.raises(RoundError):
        run_in_process(SHARED, num_hospitals=PEOPLE)
    for state in states(the_run().name):
        assert (state.rounds, state.validations, state.statistics) == (0, 0, frozenset())

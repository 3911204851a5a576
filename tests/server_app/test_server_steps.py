"""Whole runs whose rounds are server steps: shared noise, ledgers, rounds that are lost."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from common.config import RunConfig
from common.errors import ConfigError, RoundError
from common.files import consilium_home
from common.model import ModelSpec, build
from common.privacy.accounting import Event, epsilon_of
from common.privacy.clipped_sum import clipped_sum
from common.privacy.distributed import NoiseShares
from common.privacy.plan import SPARE_ROUNDS, Promise, step_noise
from common.privacy.randomness import SecureRandom
from common.simulation import hospital_splits, load_dataset
from common.training import to_tensor
from deploy.inprocess import Fault, run_in_process
from server_app.run_store import RunStore
from server_app.server_step import ServerStep
from tests.server_app.running import lines, newest, states, the_run

pytestmark = pytest.mark.usefixtures("small_prior")

SHARED: dict[str, Any] = {
    "dataset": "synthetic", "synthetic-size": 400, "partition": "size-skew", "rounds": 3,
    "model-width": 0.03125, "partition-min-size": 5, "privacy": "distributed", "epsilon": 6.0,
    "delta": 1e-3, "sampling-rate": 0.5, "num-shares": 5, "min-cohort": 4, "learning-rate": 0.01,
}  # fmt: skip
PEOPLE = 5


@pytest.mark.parametrize("privacy", ["distributed", "local"])
def test_every_hospital_is_charged_one_step_a_round_at_the_runs_own_rate(privacy: str) -> None:
    values = {**SHARED, "privacy": privacy, "server-step": True}
    run_in_process(values, num_hospitals=PEOPLE)
    sigma = step_noise(Promise.of(RunConfig.parse(values)))
    for state in states(the_run().name):
        assert (state.rounds, state.validations) == (3, 4)
        assert (state.plan.noise_multiplier, state.plan.sampling_rate) == (sigma, 0.5)
        assert state.plan.training(1).steps == 1
    summary = json.loads((the_run() / "summary.json").read_text())
    assert summary["rounds"] == 3
    assert 0 < summary["epsilon"] <= 6.0
    told = "vector alone" in (the_run() / "report.html").read_text()
    assert told == (privacy == "distributed") == bool(summary["epsilon_against"])
    models = [load_file(the_run() / f"round-{i:04d}.safetensors") for i in (0, 3)]
    assert any(not np.array_equal(models[0][n], models[1][n]) for n in models[0])


def test_the_plan_with_its_spare_rounds_is_within_epsilon() -> None:
    promise = Promise.of(RunConfig.parse(SHARED))
    event = Event(step_noise(promise), 0.5, 3 + SPARE_ROUNDS)
    assert 5.8 < epsilon_of([event], 1e-3).value + 0.1 <= 6.0


def test_a_step_that_is_asked_again_is_drawn_and_charged_anew() -> None:
    """Kept and sent twice, into sums over other hospitals, one vector could be subtracted out."""
    again = Fault(lambda kind, i, _: kind == "train" and i == 0, repeat=2, times=1)
    run_in_process(SHARED, num_hospitals=PEOPLE, faults=[again])
    assert [s.rounds for s in states(the_run().name)] == [5, 3, 3, 3, 3]
    kept = {path.name for path in (consilium_home() / "simulation").rglob("*")}
    assert "update.safetensors" not in kept


def test_a_hospital_that_is_asked_too_often_refuses_and_the_others_go_on() -> None:
    often = Fault(lambda kind, i, _: kind == "train" and i == 0, repeat=SPARE_ROUNDS + 1, times=1)
    run_in_process(SHARED, num_hospitals=PEOPLE, faults=[often])
    assert [s.rounds for s in states(the_run().name)] == [3 + SPARE_ROUNDS, 3, 3, 3, 3]
    assert [len(r["dropped"]) for r in lines(the_run())[1:]] == [0, 0, 1]
    (gone,) = lines(the_run())[3]["dropped"]
    assert gone["hospital"] == "hospital-00"
    assert "privacy-budget" in gone["reason"]


def test_a_round_below_the_smallest_cohort_opens_nothing_and_moves_no_weight() -> None:
    lost = Fault(lambda kind, i, _: kind == "query.masked" and i < 2, drop_reply=True)
    with pytest.raises(RoundError):
        run_in_process(
            {**SHARED, "stage-timeout": 2.0, "quorum": 0.2}, num_hospitals=PEOPLE, faults=[lost]
        )
    assert [r["status"] for r in lines(the_run())] == ["ok", "failed", "failed", "failed"]
    first, last = (load_file(the_run() / f"round-{i:04d}.safetensors") for i in (0, 3))
    assert all(np.array_equal(first[n], last[n]) for n in first)


@pytest.mark.parametrize(("optimizer", "ema"), [("adam", 0.0), ("sgd", 0.5)])
def test_a_resumed_run_goes_on_with_optimizer_and_average_as_they_were(
    monkeypatch: pytest.MonkeyPatch, optimizer: str, ema: float
) -> None:
    save = RunStore.save_round

    def dies(self: RunStore, record: Any, weights: Any, memory: Any = None) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt
        save(self, record, weights, memory)

    values = {**SHARED, "optimizer": optimizer, "ema": ema}
    monkeypatch.setattr(RunStore, "save_round", dies)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(values, num_hospitals=PEOPLE)
    monkeypatch.setattr(RunStore, "save_round", save)
    run_in_process({**values, "resume": the_run().name}, num_hospitals=PEOPLE)
    memory = load_file(the_run() / "optimizer-0003.safetensors")
    assert memory["steps"] == 3
    if ema:
        assert memory["averaged"] == 3
        model, latest = load_file(the_run() / "model.safetensors"), memory["latest/head.weight"]
        assert not np.array_equal(model["head.weight"], latest)
    # Round 2 was drawn twice: its first sum was lost with the server.
    assert [s.rounds for s in states(the_run().name)] == [4] * PEOPLE
    assert json.loads((the_run() / "summary.json").read_text())["epsilon"] <= 6.0


def test_one_step_over_the_hospitals_is_the_step_over_the_union_of_their_images() -> None:
    """At q = 1 and with little noise: DP-SGD's own gradient, computed here in one place."""
    values = {
        **SHARED, "epsilon": 20.0, "rounds": 1, "sampling-rate": 1.0, "optimizer": "sgd",
        "learning-rate": 1.0, "clipping-norm": 1.0,
    }  # fmt: skip
    run_in_process(values, num_hospitals=PEOPLE)
    before, after = (load_file(the_run() / f"round-{i:04d}.safetensors") for i in (0, 1))
    config = RunConfig.parse(values)
    splits = hospital_splits(load_dataset(config), config, PEOPLE)
    images = to_tensor(np.concatenate([train.images for train, _ in splits]))
    labels = torch.from_numpy(np.concatenate([train.labels for train, _ in splits]))
    spec = ModelSpec(model=config.model, width=config.model_width, num_classes=8, channels=3)
    model = build(spec)
    total = clipped_sum(
        model, before, images, labels, sampling_rate=1.0, clipping_norm=config.clipping_norm,
        random=SecureRandom(),
    ).numpy()  # fmt: skip
    told = sum(state.plan.train_count for state in states(the_run().name))
    moved = np.concatenate(
        [(before[n].astype(np.float64) - after[n]).ravel() for n, _ in model.named_parameters()]
    )
    deviation = step_noise(Promise.of(config)) * config.clipping_norm * (5 / 3) ** 0.5 / told
    error = moved - total / told
    # Of (5, 4 - 1) hospitals' shares; the grid and float32 add next to nothing.
    assert np.std(error) == pytest.approx(deviation, rel=0.05)
    along = np.dot(moved, total / told) / np.dot(total / told, total / told)
    assert along == pytest.approx(1.0, abs=5 * deviation / np.linalg.norm(total / told))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"secagg": False}, "needs secure aggregation"),
        ({"mode": "vectors", "secagg": False}, "synchronous rounds"),
        ({"tolerated-colluders": 4}, "min-cohort"),
        ({"privacy": "none", "server-step": True}, "privacy is 'none'"),
        ({"privacy": "local"}, "sampling-rate"),
    ],
)
def test_settings_that_cannot_keep_the_promise_are_refused(
    wrong: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        RunConfig.parse(SHARED | wrong)


PRIOR: dict[str, Any] = {
    **SHARED, "model": "prior-head", "allow-random-base": True, "whitening": True, "rounds": 4,
    "sampling-rate": 1.0, "optimizer": "sgd", "learning-rate": 1.0, "clipping-norm": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("privacy", ["distributed", pytest.param("local", marks=pytest.mark.slow)])
def test_whitening_is_released_first_charged_once_and_part_of_the_model(privacy: str) -> None:
    values = {**PRIOR, "privacy": privacy, "server-step": True}
    run_in_process(values, num_hospitals=PEOPLE)
    for state in states(the_run().name):
        assert state.statistics == {"feature-mean", "feature-second-moment"}
        assert state.rounds == 2
        assert {use.event.steps for use in state.rest() if use.event} == {SPARE_ROUNDS, 0}
        everything = [
            state.plan.training(2 + SPARE_ROUNDS),
            *(Event(sigma, 1.0, 1) for sigma in state.plan.statistics.values()),
        ]
        assert 5.8 < epsilon_of(everything, 1e-3).value + 0.1 <= 6.0
    models = [load_file(the_run() / f"round-{i:04d}.safetensors") for i in range(5)]
    changed = [
        {n for n in models[0] if not np.array_equal(before[n], after[n])}
        for before, after in pairwise(models)
    ]
    assert changed == [{"mean"}, {"matrix"}, {"head.weight"}, {"head.weight"}]
    assert json.loads((the_run() / "summary.json").read_text())["epsilon"] <= 6.0


def test_a_hidden_layer_is_part_of_the_private_step() -> None:
    run_in_process({**PRIOR, "hidden-units": 6}, num_hospitals=PEOPLE)
    models = [load_file(the_run() / f"round-{i:04d}.safetensors") for i in (2, 4)]
    changed = {n for n in models[0] if not np.array_equal(models[0][n], models[1][n])}
    assert changed == {"hidden.weight", "hidden.bias", "head.weight"}


def test_a_statistic_that_is_asked_again_is_refused() -> None:
    again = Fault(lambda kind, i, _: kind == "train" and i == 0, repeat=1, times=1)
    run_in_process(PRIOR, num_hospitals=PEOPLE, faults=[again])
    (gone,) = lines(the_run())[1]["dropped"]
    assert (gone["hospital"], "privacy-budget" in gone["reason"]) == ("hospital-00", True)


def test_a_hospital_whose_policy_forbids_shared_noise_refuses_it(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        "version = 1\n[aggregation]\nrequire-roster = false\n[privacy]\ntotal-delta = 0.001\n"
    )
    run_in_process(
        {**SHARED, "rounds": 1}, num_hospitals=PEOPLE, node_configs={0: {"policy": str(policy)}}
    )
    (gone,) = lines(the_run())[1]["dropped"]
    assert (gone["hospital"], "privacy-policy" in gone["reason"]) == ("hospital-00", True)
    policy.write_text(policy.read_text() + "shared-noise = true\n")
    run_in_process(
        {**SHARED, "rounds": 1, "seed": 1}, num_hospitals=PEOPLE,
        node_configs={0: {"policy": str(policy)}},
    )  # fmt: skip
    assert lines(newest())[1]["dropped"] == []


def test_a_server_with_another_grid_is_refused_before_anything_is_charged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a coarser grid the noise would be rounded away, or the sum misread."""
    shares = ServerStep.shares

    def coarser(self: ServerStep, round: int) -> NoiseShares:
        found = shares(self, round)
        return replace(found, noise_multiplier=1e3 * found.noise_multiplier, clipping_norm=70.0)

    monkeypatch.setattr(ServerStep, "shares", coarser)
    with pytest.raises(RoundError):
        run_in_process(SHARED, num_hospitals=PEOPLE)
    assert {d["reason"].split(" (")[0] for d in lines(the_run())[1]["dropped"]} == {
        "refused: secagg-layout"
    }
    assert [s.rounds for s in states(the_run().name)] == [0] * PEOPLE


def test_a_server_that_asks_for_a_steps_sum_in_the_clear_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from server_app import fedavg

    def clear(grid: Any, cohort: Any, job: Any, config: Any, *, train: bool, **_: Any) -> Any:
        return fedavg.plain_round(grid, cohort, job, train=train, timeout=config.round_timeout)

    monkeypatch.setattr(fedavg, "secure_round", clear)
    with pytest.raises(RoundError):
        run_in_process(SHARED, num_hospitals=PEOPLE)
    assert {d["reason"].split(" (")[0] for d in lines(the_run())[1]["dropped"]} == {
        "refused: policy"
    }
    # Refused before an image is read, and before the ledger hears of the run.
    assert states(the_run().name) == []

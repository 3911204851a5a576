"""Whole runs under local differential privacy: one ε for all rounds, at every hospital."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from common.files import consilium_home
from common.privacy.plan import PrivacyPlan
from deploy.inprocess import Fault, run_in_process
from server_app.run_store import runs_directory

PRIVATE: dict[str, Any] = {
    "dataset": "synthetic", "synthetic-size": 400, "partition": "size-skew", "rounds": 3,
    "local-epochs": 2, "batch-size": 16, "model-width": 0.03125, "partition-min-size": 5,
    "privacy": "local", "epsilon": 6.0, "delta": 1e-3, "secagg": False,
}  # fmt: skip


def the_run() -> Path:
    (directory,) = runs_directory().iterdir()
    return directory


def plans(run: str) -> list[PrivacyPlan]:
    folder = consilium_home() / "simulation" / run
    return [PrivacyPlan.load(p) for p in sorted(folder.glob("*/privacy.json"))]


def test_the_whole_run_costs_each_hospital_at_most_epsilon_by_both_accountants() -> None:
    run_in_process(PRIVATE, num_hospitals=3)
    summary = json.loads((the_run() / "summary.json").read_text())
    assert summary["accountants_agree"] is True
    assert set(summary["epsilon_by_hospital"]) == {f"hospital-0{i}" for i in range(3)}
    for e in summary["epsilon_by_hospital"].values():
        assert 5.9 < e["prv"] <= 6.0
        assert 5.9 < e["pld"] <= 6.0
    assert summary["epsilon"] <= 6.0
    records = [json.loads(x) for x in (the_run() / "metrics.jsonl").read_text().splitlines()]
    epsilons = [r["epsilon"] for r in records[1:]]
    assert epsilons == sorted(epsilons)
    assert epsilons[0] < 5.0


def test_the_accountants_state_survives_the_process_and_is_charged_once_a_round() -> None:
    run_in_process(PRIVATE, num_hospitals=2)
    for plan in plans(the_run().name):
        assert plan.charged_rounds == plan.rounds == 3


def test_hospitals_of_different_sizes_calibrate_for_themselves() -> None:
    run_in_process(PRIVATE, num_hospitals=4)
    rates = {plan.sampling_rate for plan in plans(the_run().name)}
    sigmas = {plan.noise_multiplier for plan in plans(the_run().name)}
    assert len(rates) == len(sigmas) > 1


def test_the_same_request_again_gets_the_same_update_and_costs_nothing() -> None:
    again = Fault(lambda kind, i, _: kind == "train" and i == 0, repeat=2, times=1)
    grid = run_in_process({**PRIVATE, "rounds": 1}, num_hospitals=2, faults=[again])
    assert [m for m in grid.log if m[0] == "train" and m[1] == 0] == [("train", 0, "train")] * 3
    assert [plan.charged_rounds for plan in plans(the_run().name)] == [1, 1]


def test_a_resumed_private_run_goes_on_with_the_same_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server dies after round 1's answers came: the resumed run costs nothing twice."""
    from server_app.run_store import RunStore

    save = RunStore.save_round

    def dies(self: RunStore, record: Any, weights: Any) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt
        save(self, record, weights)

    monkeypatch.setattr(RunStore, "save_round", dies)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(PRIVATE, num_hospitals=2)
    monkeypatch.setattr(RunStore, "save_round", save)
    run = the_run().name
    assert [p.charged_rounds for p in plans(run)] == [2, 2]
    run_in_process({**PRIVATE, "resume": run}, num_hospitals=2)
    assert [p.charged_rounds for p in plans(run)] == [3, 3]
    summary = json.loads((the_run() / "summary.json").read_text())
    assert summary["rounds"] == 3
    assert summary["epsilon"] <= 6.0


def test_a_server_that_asks_for_more_rounds_than_were_planned_is_refused() -> None:
    from flwr.app import Context, RecordDict

    from client_app.data import data_of, model_spec
    from client_app.hospital import Hospital
    from client_app.work import train_job
    from common.config import KEYS, RunConfig
    from common.errors import PrivacyError
    from common.messages import Job
    from common.model import build, get_weights

    values = {key.name: key.default for key in KEYS} | PRIVATE
    home = consilium_home() / "simulation"
    hospital = Hospital("hospital-00", home, RunConfig.parse(values), 0, 2)
    context = Context(1, 1, {}, RecordDict(), {})
    spec = model_spec(hospital.config, data_of(hospital))
    weights = get_weights(build(spec, seed=0))
    for number in (1, 2, 3):
        train_job(Job("run-1", number, spec.digest(), weights), hospital, context)
    with pytest.raises(PrivacyError, match="all 3 rounds"):
        train_job(Job("run-1", 4, spec.digest(), weights), hospital, context)
    # Nor does another noise, or another number of rounds, make the file start anew.
    looser = Hospital(
        "hospital-00", home, RunConfig.parse({**values, "epsilon": 60.0, "rounds": 99}), 0, 2
    )
    with pytest.raises(PrivacyError, match="not those of its first round"):
        train_job(Job("run-1", 4, spec.digest(), weights), looser, context)


def test_what_a_hospital_keeps_is_for_its_owner_only() -> None:
    run_in_process({**PRIVATE, "rounds": 1}, num_hospitals=2)
    for path in (consilium_home() / "simulation" / the_run().name).rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0, path
    kept = next((consilium_home() / "simulation").rglob("update.safetensors"))
    with safe_open(kept, framework="numpy") as file:
        assert file.metadata()["question"].startswith("1:")

"""Whole runs under local differential privacy: one ε for all rounds, at every hospital."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from common.files import consilium_home
from common.privacy.randomness import SecureRandom
from common.simulation import LEDGER
from deploy.inprocess import Fault, run_in_process
from tests.server_app.running import states, the_run

PRIVATE: dict[str, Any] = {
    "dataset": "synthetic", "synthetic-size": 400, "partition": "size-skew", "rounds": 3,
    "local-epochs": 2, "batch-size": 16, "model-width": 0.03125, "partition-min-size": 5,
    "privacy": "local", "epsilon": 6.0, "delta": 1e-3, "secagg": False,
}  # fmt: skip


def test_the_whole_run_costs_each_hospital_at_most_epsilon_by_both_accountants() -> None:
    run_in_process(PRIVATE, num_hospitals=2)
    summary = json.loads((the_run() / "summary.json").read_text())
    assert summary["accountants_agree"] is True
    assert set(summary["epsilon_by_hospital"]) == {f"hospital-0{i}" for i in range(2)}
    for e in summary["epsilon_by_hospital"].values():
        assert 5.9 < e["prv"] <= 6.0
        assert 5.9 < e["pld"] <= 6.0
    assert summary["epsilon"] <= 6.0
    records = [json.loads(x) for x in (the_run() / "metrics.jsonl").read_text().splitlines()]
    epsilons = [r["epsilon"] for r in records[1:]]
    assert epsilons == sorted(epsilons)
    assert epsilons[0] < 5.0
    # Validation figures come with noise, the training loss not at all.
    assert all(0.0 <= r["validation"]["accuracy"] <= 1.0 for r in records)
    assert [r.get("train") for r in records] == [None] * 4


def test_each_round_and_each_models_figures_are_charged_once() -> None:
    run_in_process(PRIVATE, num_hospitals=2)
    for state in states(the_run().name):
        assert (state.rounds, state.validations) == (3, 4)
        assert [use.event.steps for use in state.rest() if use.event] == [0, 0]


def test_hospitals_of_different_sizes_calibrate_for_themselves() -> None:
    run_in_process(PRIVATE, num_hospitals=2)
    plans = [state.plan for state in states(the_run().name)]
    assert len({plan.sampling_rate for plan in plans}) > 1
    assert len({plan.noise_multiplier for plan in plans}) > 1


def test_the_same_request_again_gets_the_same_answer_and_costs_nothing() -> None:
    again = Fault(lambda kind, i, _: kind == "train" and i == 0, repeat=2, times=1)
    grid = run_in_process({**PRIVATE, "rounds": 1}, num_hospitals=2, faults=[again])
    assert [m for m in grid.log if m[0] == "train" and m[1] == 0] == [("train", 0, "train")] * 3
    assert [(s.rounds, s.validations) for s in states(the_run().name)] == [(1, 2), (1, 2)]


def test_a_resumed_private_run_goes_on_with_the_same_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server dies after round 2's answers came: the resumed run costs nothing twice."""
    from server_app.run_store import RunStore

    save = RunStore.save_round

    def dies(self: RunStore, record: Any, weights: Any, memory: Any = None) -> None:
        if record["round"] == 2:
            raise KeyboardInterrupt
        save(self, record, weights, memory)

    monkeypatch.setattr(RunStore, "save_round", dies)
    with pytest.raises(KeyboardInterrupt):
        run_in_process(PRIVATE, num_hospitals=2)
    monkeypatch.setattr(RunStore, "save_round", save)
    run = the_run().name
    assert [s.rounds for s in states(run)] == [2, 2]
    run_in_process({**PRIVATE, "resume": run}, num_hospitals=2)
    assert [s.rounds for s in states(run)] == [3, 3]
    summary = json.loads((the_run() / "summary.json").read_text())
    assert summary["rounds"] == 3
    assert summary["epsilon"] <= 6.0


def test_what_a_hospital_keeps_is_for_its_owner_only() -> None:
    run_in_process({**PRIVATE, "rounds": 1}, num_hospitals=2)
    kept = list((consilium_home() / "simulation").rglob("*"))
    names = {path.name for path in kept}
    assert {LEDGER, "update.safetensors", "validated.json", "egress.tsv"} <= names
    for path in kept:
        if path.is_file():
            assert path.stat().st_mode & 0o077 == 0, path
    with safe_open(next(p for p in kept if p.name == "update.safetensors"), "numpy") as file:
        assert file.metadata()["question"].startswith("1:")


def test_a_run_that_protects_patients_samples_and_clips_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a manifest, several pictures a patient, through the whole federation."""
    # Numbers of patients without their noise (scale 10), which is as large as what is told apart.
    monkeypatch.setattr(SecureRandom, "discrete_laplace", lambda *_: 0)
    make_hospital_folder(tmp_path / "pictures", patients=120)
    run_in_process(
        {**PRIVATE, "dataset": "folder", "data-path": str(tmp_path / "pictures"),
         "privacy-unit": "patient", "rounds": 1, "batch-size": 8},
        num_hospitals=2,
    )  # fmt: skip
    for state in states(the_run().name):
        assert state.plan.promise.unit == "patient"
        # Patients are counted (about 80 % of 70 % of 60), not their pictures.
        assert 20 < state.plan.train_count < 60
    summary = json.loads((the_run() / "summary.json").read_text())
    assert summary["privacy_unit"] == "patient"


def test_patients_cannot_be_promised_where_nobody_knows_them() -> None:
    from common.errors import RoundError

    with pytest.raises(RoundError):
        run_in_process({**PRIVATE, "privacy-unit": "patient", "rounds": 1}, num_hospitals=2)
    records = (the_run() / "metrics.jsonl").read_text().splitlines()
    reasons = {d["reason"].split(" (")[0] for d in json.loads(records[1])["dropped"]}
    assert reasons == {"refused: data"}


def make_hospital_folder(folder: Path, *, patients: int) -> None:
    """Synthetic cells as PNG files with a manifest: three pictures of each patient."""
    import numpy as np
    from PIL import Image

    from common.datasets import make_synthetic

    cells = make_synthetic(3 * patients + 200).train
    folder.mkdir()
    lines = ["file,label,patient"]
    for i in range(3 * patients):
        Image.fromarray(np.asarray(cells.images[i])).save(folder / f"{i}.png")
        lines.append(f"{i}.png,class-{cells.labels[i]},patient {i // 3}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")

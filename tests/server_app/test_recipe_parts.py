"""Recipe parts through whole runs: what is frozen stays, and all work with either noise."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from client_app import work
from common.evaluation import EvalResult, evaluate
from common.training import TrainResult, TrainSettings, train
from deploy.inprocess import run_in_process
from server_app.run_store import runs_directory
from tests.server_app.running import the_run

RUN: dict[str, Any] = {
    "dataset": "synthetic", "synthetic-size": 300, "rounds": 1, "model-width": 0.03125,
    "partition-min-size": 5, "epsilon": 6.0, "delta": 1e-3, "num-shares": 4, "min-cohort": 4,
    "reconstruction-threshold": 3,
}  # fmt: skip
PEOPLE = 4


@pytest.mark.parametrize("privacy", [pytest.param("local", marks=pytest.mark.slow), "distributed"])
def test_frozen_parts_stay_as_in_the_base_and_all_else_is_trained(privacy: str) -> None:
    run_in_process({**RUN, "privacy": "none", "secagg": False}, num_hospitals=PEOPLE)
    base = the_run()
    run_in_process(
        {**RUN, "privacy": privacy, "base": base.name, "frozen": "stem,block1", "seed": 1},
        num_hospitals=PEOPLE,
    )
    (run,) = set(runs_directory().iterdir()) - {base}  # both may have begun in one second
    before, after = load_file(base / "model.safetensors"), load_file(run / "model.safetensors")
    for name, weights in before.items():
        same = np.array_equal(weights, after[name])
        assert same == name.startswith(("stem", "block1")), name


@pytest.mark.parametrize("privacy", [pytest.param("local", marks=pytest.mark.slow), "distributed"])
def test_views_automatic_clipping_norms_and_averages_work_together(privacy: str) -> None:
    run_in_process(
        {**RUN, "privacy": privacy, "augmentation-multiplicity": 2, "clipping": "automatic",
         "clipping-norm": 1.0, "residual-norm": True, "weight-standardisation": True, "ema": 0.9,
         "test-views": "dihedral", "rounds": 2},
        num_hospitals=PEOPLE,
    )  # fmt: skip
    summary = json.loads((the_run() / "summary.json").read_text())
    assert (summary["status"], summary["failed_rounds"]) == ("completed", [])
    assert 0 < summary["epsilon"] <= 6.0
    models = [load_file(the_run() / f"round-{i:04d}.safetensors") for i in (0, 2)]
    assert any(not np.array_equal(models[0][n], models[1][n]) for n in models[0])


@pytest.mark.parametrize(
    ("privacy", "expected"),
    [("none", "bfloat16"), ("local", "float32"), ("distributed", "float32")],
)
def test_in_bfloat16_private_figures_are_computed_in_float32(
    privacy: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole runs in bfloat16; the hospitals' evaluations are watched, and not changed."""
    seen = set()

    def watched(*given: Any, **named: Any) -> EvalResult:
        seen.add(named["precision"])
        return evaluate(*given, **named)

    monkeypatch.setattr(work, "evaluate", watched)
    run_in_process(
        {**RUN, "privacy": privacy, "precision": "bfloat16", "rounds": 1}, num_hospitals=PEOPLE
    )
    assert json.loads((the_run() / "summary.json").read_text())["status"] == "completed"
    assert seen == {expected}


def test_without_privacy_views_and_steps_reach_the_hospitals_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def watched(*given: Any, **named: Any) -> TrainResult:
        (settings,) = (g for g in given if isinstance(g, TrainSettings))
        result = train(*given, **named)
        seen.append((settings.views, result.steps))
        return result

    monkeypatch.setattr(work, "train", watched)
    run_in_process(
        {**RUN, "privacy": "none", "augmentation-multiplicity": 3, "local-steps": 2},
        num_hospitals=PEOPLE,
    )
    assert seen == [(3, 2)] * PEOPLE


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet9-gn", "resnet18"])
def test_the_papers_peers_train_under_privacy(model: str) -> None:
    run_in_process(
        {**RUN, "privacy": "local", "model": model, "model-width": 0.125, "secagg": False},
        num_hospitals=2,
    )
    assert json.loads((the_run() / "summary.json").read_text())["status"] == "completed"

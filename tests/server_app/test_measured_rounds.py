"""``test-every``: which rounds are measured with the coordinator's test set."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors.numpy import load_file

from common.config import RunConfig
from common.errors import RoundError
from common.model import ModelSpec
from common.simulation import load_dataset
from deploy.inprocess import Fault, run_in_process
from server_app.evaluation import Evaluator
from server_app.run_store import RunStore, runs_directory
from tests.server_app.running import the_run

RUN: dict[str, Any] = {
    "dataset": "synthetic", "synthetic-size": 200, "model-width": 0.03125, "privacy": "none",
    "partition-min-size": 5, "secagg": False, "rounds": 5, "num-shares": 4,
    "reconstruction-threshold": 3,
}  # fmt: skip


def measured(**changed: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The records of a run that is told to measure every third round, and its summary."""
    run_in_process({**RUN, "test-every": 3, **changed}, num_hospitals=4)
    run = the_run()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((run / "summary.json").read_text())


def test_rounds_that_are_not_due_are_not_measured_but_the_best_and_the_last_are() -> None:
    records, summary = measured()
    best = summary["best_round"]
    with_figures = [r["round"] for r in records if r["test"] is not None]
    assert with_figures == sorted({0, 3, 5, best})
    (figures,) = (r["test"] for r in records if r["round"] == best)
    assert summary["test_accuracy"] == figures["accuracy"]
    assert (runs_directory() / summary["run"] / "report.html").exists()


def test_a_best_round_that_was_not_due_has_the_figures_of_its_own_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RunStore, "best_round", lambda self: 2)
    records, summary = measured()
    assert [r["round"] for r in records if r["test"] is not None] == [0, 2, 3, 5]
    figures = {r["round"]: r["test"] for r in records if r["test"]}
    assert summary["test_accuracy"] == figures[2]["accuracy"]
    config = RunConfig.parse(RUN)
    dataset = load_dataset(config)
    spec = ModelSpec.of(config, num_classes=dataset.num_classes, channels=dataset.channels)
    own = Evaluator(spec, dataset.test, dataset.class_names)(
        load_file(the_run() / "round-0002.safetensors")
    )
    assert own["confusion"] == figures[2]["confusion"]
    assert figures[2]["loss"] == pytest.approx(own["loss"])
    assert len({f["loss"] for f in figures.values()}) == 4, "each of its own model"


def test_with_a_moving_average_nothing_is_measured_that_was_not_due() -> None:
    records, summary = measured(ema=0.5)
    assert summary["best_round"] == 5
    assert [r["round"] for r in records if r["test"] is not None] == [0, 3, 5]


def test_a_run_that_failed_has_a_summary_though_its_model_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rounds in a row are lost: the run ends at one that was not due."""
    call = Evaluator.__call__
    seen: list[int] = []

    def once(self: Evaluator, weights: Any) -> dict[str, Any]:
        seen.append(1)
        if len(seen) > 1:
            raise ValueError("Input contains NaN")
        return call(self, weights)

    monkeypatch.setattr(Evaluator, "__call__", once)
    lost = Fault(lambda kind, *_: kind == "train", drop_request=True)
    with pytest.raises(RoundError, match="failed"):
        run_in_process(
            {**RUN, "test-every": 100, "round-timeout": 0.3}, num_hospitals=4, faults=[lost]
        )
    summary = json.loads((the_run() / "summary.json").read_text())
    assert summary["status"] == "failed" and "failed" in summary["reason"]
    assert "could not be measured: ValueError" in capsys.readouterr().out

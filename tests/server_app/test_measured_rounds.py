"""``test-every``: which rounds are measured with the coordinator's test set."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deploy.inprocess import run_in_process
from server_app.evaluation import Evaluator
from server_app.run_store import runs_directory
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
    """With a moving average the last model is the run's: no other round is asked for."""
    seen: list[int] = []
    call = Evaluator.__call__

    def counted(self: Evaluator, weights: Any) -> dict[str, Any]:
        seen.append(1)
        return call(self, weights)

    monkeypatch.setattr(Evaluator, "__call__", counted)
    records, summary = measured(ema=0.5)
    assert summary["best_round"] == 5
    assert [r["round"] for r in records if r["test"] is not None] == [0, 3, 5]
    assert len(seen) == 3, "first weights, the third round, the last"
    assert summary["test_accuracy"] == records[-1]["test"]["accuracy"]

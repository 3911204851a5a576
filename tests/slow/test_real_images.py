"""The main job on real images, as a researcher runs it. Minutes each: `make test-slow`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from server_app.run_store import runs_directory
from tests.deploy.test_simulate import simulate

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run(blood: Path, **settings: Any) -> tuple[dict[str, Any], float]:
    before = set(runs_directory().glob("*"))
    started = time.monotonic()
    answer = simulate(10, timeout=3500, **{"dataset": "npz", "data-path": blood, **settings})
    seconds = time.monotonic() - started
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (directory,) = set(runs_directory().glob("*")) - before
    last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    summary = json.loads((directory / "summary.json").read_text())
    return summary | {"last_test_accuracy": last["test"]["accuracy"]}, seconds


def test_ten_hospitals_reach_91_percent_within_15_minutes_with_and_without_secagg(
    blood: Path,
) -> None:
    """The paper lost 0.65 points to secure aggregation; here it is at most 0.1.

    Compared after the last round, the same in both: which round validates best may differ.
    """
    settings = {"partition": "size-skew", "model-width": 0.25, "privacy": "none"}
    plain, seconds = run(blood, secagg=False, **settings)
    assert plain["test_accuracy"] >= 0.91
    assert seconds < 900
    secure, seconds = run(blood, secagg=True, **settings)
    assert seconds < 900
    assert secure["test_accuracy"] >= 0.91
    assert abs(secure["last_test_accuracy"] - plain["last_test_accuracy"]) <= 0.001


def test_a_private_run_keeps_epsilon_at_every_hospital_by_both_accountants(blood: Path) -> None:
    settings = {"partition": "size-skew", "model-width": 0.25, "privacy": "local", "epsilon": 6.0}
    summary, _ = run(blood, **settings)
    assert summary["accountants_agree"]
    assert len(summary["epsilon_by_hospital"]) == 10
    for e in summary["epsilon_by_hospital"].values():
        assert 5.9 < e["pld"] <= 6.0
        assert 5.9 < e["prv"] <= 6.0


@pytest.mark.parametrize("hospitals", [10, 20])
def test_full_width_updates_go_through_secure_aggregation(hospitals: int) -> None:
    """4.8 million parameters; one round on synthetic cells, through Ray."""
    answer = simulate(
        hospitals, timeout=3500, dataset="synthetic", rounds=1,
        **{"local-epochs": 1, "model-width": 1.0, "privacy": "none", "synthetic-size": 1000,
           "partition-min-size": 5, "partition": "iid"},
    )  # fmt: skip
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (directory,) = runs_directory().glob("*")
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["secagg"] is True
    line = json.loads((directory / "metrics.jsonl").read_text().splitlines()[1])
    assert len(line["contributed"]) == hospitals

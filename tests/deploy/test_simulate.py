"""`flwr run` for real: Ray, Flower's own processes, a SuperLink of the run's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from deploy.inprocess import run_in_process
from server_app.run_store import runs_directory
from tests.server_app.test_federation import TINY

CONSILIUM = str(Path(sys.executable).parent / "consilium")


def simulate(
    hospitals: int, *, timeout: float = 240, **settings: object
) -> subprocess.CompletedProcess[str]:
    command = [CONSILIUM, "simulate", "--hospitals", str(hospitals)]
    for name, value in settings.items():
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        command += ["--set", f"{name}={shown}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


def superlinks() -> list[str]:
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [x for x in listing.stdout.splitlines() if "flower-superlink" in x]


def test_flwr_run_and_the_in_process_grid_give_the_same_model_bit_for_bit() -> None:
    answer = simulate(3, **TINY)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    (real,) = runs_directory().iterdir()
    assert json.loads((real / "summary.json").read_text())["status"] == "completed"
    assert "report:" in answer.stdout
    run_in_process(TINY, num_hospitals=3)
    (direct,) = set(runs_directory().iterdir()) - {real}
    for name in ("round-0000", "round-0001", "round-0002", "model", "best"):
        file = f"{name}.safetensors"
        assert (real / file).read_bytes() == (direct / file).read_bytes(), name
    assert superlinks() == []


def test_a_run_that_fails_exits_non_zero_says_why_and_leaves_no_process() -> None:
    answer = simulate(2, **{**TINY, "partition-min-size": 5000})
    assert answer.returncode == 1
    assert "minimum" in answer.stdout + answer.stderr
    assert superlinks() == []

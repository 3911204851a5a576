"""`flwr run` for real: Ray, Flower's own processes, a SuperLink of the run's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import common.devices as devices
from deploy.inprocess import run_in_process
from deploy.simulate import _descendants, _end_leftovers, resources
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


@pytest.mark.parametrize(
    ("gpus", "cores", "expected"),
    [(0, 4, ""), (1, 16, "0.062"), (1, 3, "0.333"), (2, 2, "1"), (8, 4, "1")],
)  # fmt: skip
def test_hospitals_share_the_gpus_so_that_as_many_train_as_there_are_cores(
    gpus: int, cores: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "gpu_count", lambda _: gpus)
    monkeypatch.setattr(devices, "usable_cores", lambda: cores)
    share = f" client-resources-num-gpus={expected}" if expected else ""
    assert resources("auto") == f"client-resources-num-cpus=1{share}"


def test_who_is_below_a_process_is_known_also_in_another_group_and_under_another_name() -> None:
    inner = "import time; time.sleep(60)"
    outer = (
        "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', "
        f"{inner!r}], env={{}}, start_new_session=True); print(p.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True) as top:
        assert top.stdout is not None
        below = int(top.stdout.readline())
        family = _descendants(top.pid)
        top.kill()
    assert set(family) == {below}
    _end_leftovers("no-such-run-anywhere", {below: "another birth"})
    assert Path(f"/proc/{below}").exists()
    _end_leftovers("no-such-run-anywhere", family)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{below}/environ").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{below}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{below}").exists()


def left_behind() -> list[str]:
    """Command lines of processes that a run of this test's home has started."""
    home = str(runs_directory().parent).encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if home in (entry / "environ").read_bytes() and int(entry.name) != os.getpid():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


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
    assert left_behind() == []


def test_a_run_that_fails_exits_non_zero_says_why_and_leaves_no_process() -> None:
    answer = simulate(2, **{**TINY, "partition-min-size": 5000})
    assert answer.returncode == 1
    assert "minimum" in answer.stdout + answer.stderr
    assert left_behind() == []


def test_a_run_that_is_told_to_stop_takes_everything_down() -> None:
    command = [CONSILIUM, "simulate", "--hospitals", "2"]
    for name, value in {**TINY, "rounds": 500}.items():
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        command += ["--set", f"{name}={shown}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "has started" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.monotonic() + 60  # Ray ends some of its agents late on a busy machine
    while left_behind() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left_behind() == []

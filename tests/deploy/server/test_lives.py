"""Servers that are killed, and runs on real hospitals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.provision.federation import FederationFolder
from deploy.runtime.ports import free_port
from tests.deploy.server.conftest import CONSILIUM, Federation, alive, until


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_no_process_and_the_next_one_has_the_same_nodes(
    fed: Federation,
) -> None:
    node = fed.admit("a")
    fed.start()
    before, everything = fed.nodes(), list(fed.commands())
    assert len(everything) == 4
    fed.stop(signal.SIGKILL)
    until(lambda: not any(alive(pid) for pid in everything), 10)
    fed.start()
    assert fed.nodes() == before
    assert fed.activate(node) == int(before["a"])
    fed.stop()
    # A new database knows nobody: all are registered anew.
    for path in (fed.folder.root / "state").glob("superlink.db*"):
        path.unlink()
    fed.start()
    assert set(fed.nodes()) == {"a"} and fed.nodes() != before
    fed.activate(node)


SETTINGS = (
    "rounds=3", "model-width=0.03125", "privacy=none", "batch-size=16", "num-shares=3",
    "reconstruction-threshold=3", "min-cohort=3", "learning-rate-schedule=constant",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_outlives_the_superlink_can_be_followed_stopped_and_resumed(tmp_path: Path) -> None:
    port = free_port()
    demo = tmp_path / "demo"
    subprocess.run(
        [CONSILIUM, "federation", "demo", demo, "--hospitals", "3", "--images", "240",
         "--address", f"localhost:{port}"],
        check=True, capture_output=True,
    )  # fmt: skip
    for policy in demo.glob("hospital-*/policy.toml"):
        text = re.sub(r"(?m)^(min-cohort|min-threshold) = .*$", r"\1 = 3", policy.read_text())
        policy.write_text(text.replace("allow-non-private = false", "allow-non-private = true"))
    (tmp_path / "own").mkdir()
    fed = Federation(tmp_path / "own", port)
    fed.folder = FederationFolder(demo / "coordinator")
    nodes: list[subprocess.Popen[bytes]] = []
    words = [CONSILIUM, "run", "--federation", str(fed.folder.root)]
    configured = [w for s in SETTINGS for w in ("--set", s)]
    try:
        fed.start()
        for folder in sorted(demo.glob("hospital-*")):
            with (tmp_path / f"{folder.name}.log").open("wb") as log:
                nodes.append(subprocess.Popen([CONSILIUM, "hospital", "start", folder],
                                              stdout=log, stderr=log))  # fmt: skip
        output = tmp_path / "run.log"
        with output.open("wb") as log:
            run = subprocess.Popen([*words, *configured], stdout=log, stderr=log)
        until(lambda: "round 1/3 " in output.read_text(), 120)
        os.kill(fed.service("superlink"), signal.SIGKILL)
        assert run.wait(240) == 0, output.read_text()
        said = output.read_text()
        assert [said.count(f"round {n}/3  ") for n in (1, 2, 3)] == [1, 1, 1]
        directory = Path(re.findall(r"the run's directory: (.*)", said)[0])
        assert (directory / "model.safetensors").exists()

        # Detached by Ctrl-C, then followed and stopped from elsewhere.
        detached = tmp_path / "detached.log"
        with detached.open("wb") as log:
            run = subprocess.Popen(
                [sys.executable, "-c", "import signal, sys; signal.signal(signal.SIGINT, "
                 "signal.default_int_handler); from deploy.cli import main; main()", *words[1:],
                 *configured, "--set", "rounds=50"],
                stdout=log, stderr=log,
            )  # fmt: skip
        until(lambda: "round 1/50  " in detached.read_text(), 120)
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 130
        (flower,) = set(re.findall(r"--stop (\d+)", detached.read_text()))
        with (tmp_path / "follow.log").open("wb") as log:
            follower = subprocess.Popen([*words, "--follow", flower], stdout=log, stderr=log)
        until(lambda: "round 1/50  " in (tmp_path / "follow.log").read_text(), 60)
        subprocess.run([*words, "--stop", flower], check=True, capture_output=True)
        assert follower.wait(60) == 1
        followed = (tmp_path / "follow.log").read_text()
        assert "finished:stopped" in followed
        (name,) = set(re.findall(r"--resume (\S+)", followed))
        done = (fed.folder.root / "home/runs" / name / "metrics.jsonl").read_text().count("\n")
        answer = subprocess.run(
            [*words, "--resume", name, "--set", f"rounds={done + 1}"],
            capture_output=True, text=True, check=False, timeout=200,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stdout + answer.stderr
    finally:
        for process in nodes:
            process.terminate()
        for process in nodes:
            process.wait(30)
        if fed.process is not None:
            code, seconds = fed.stop()
            assert code == 0 and seconds < 10

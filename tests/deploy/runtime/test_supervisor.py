"""A supervisor's services come back when they end, and end when it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

import deploy
from deploy.runtime import supervisor
from deploy.runtime.supervisor import Service, Supervisor

ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1"}


def service(name: str, script: str, **more: object) -> Service:
    return Service(name, ["-c", textwrap.dedent(script)], ENVIRONMENT, **more)  # type: ignore[arg-type]


def run_for(supervised: Supervisor, seconds: float) -> None:
    timer = threading.Timer(seconds, supervised.stop)
    timer.start()
    supervised.run()
    timer.cancel()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def gone(pid: int, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_a_service_that_ends_is_started_again_with_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.3)
    said: list[str] = []
    starts = tmp_path / "starts"
    script = f"""
        import time
        open({str(starts)!r}, "a").write(f"{{time.time()}}\\n")
        print("reason 17")
        raise SystemExit(3)
    """
    explained = service("one", script, explain=lambda line: "it means so" if "17" in line else None)
    run_for(Supervisor([explained], tmp_path / "logs", said.append), 6.0)
    times = [float(line) for line in starts.read_text().split()]
    pauses = [later - sooner for sooner, later in pairwise(times)]
    assert len(times) >= 3
    assert pauses[1] > 1.5 * pauses[0]
    assert any("one has ended (3)" in line for line in said)
    assert "it means so" in said
    assert "reason 17" in (tmp_path / "logs" / "one.log").read_text()


def test_a_log_is_its_owners_and_is_rotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOG_BYTES", 1000)
    monkeypatch.setattr(supervisor, "LOG_FILES", 2)
    chatty = service("chatty", "for i in range(200): print('x' * 50)\nimport time; time.sleep(60)")
    run_for(Supervisor([chatty], tmp_path / "logs", lambda line: None), 2.0)
    files = sorted((tmp_path / "logs").iterdir())
    assert [f.name for f in files] == ["chatty.log", "chatty.log.1", "chatty.log.2"]
    assert all(f.stat().st_size <= 1100 for f in files)
    assert (tmp_path / "logs").stat().st_mode & 0o077 == 0
    assert (tmp_path / "logs" / "chatty.log").stat().st_mode & 0o077 == 0


def test_stopping_ends_services_and_their_children_even_deaf_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    pids = tmp_path / "pids"
    script = f"""
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
        time.sleep(600)
    """
    supervised = Supervisor([service("deaf", script)], tmp_path / "logs", lambda line: None)
    run_for(supervised, 2.0)
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_a_service_ends_with_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    inner = f"""
        import os, time
        from deploy.runtime.flower import die_with_parent
        die_with_parent()
        open({str(pid_file)!r}, "w").write(str(os.getpid()))
        time.sleep(600)
    """
    outer = f"""
        import os
        from pathlib import Path
        from deploy.runtime.supervisor import Service, Supervisor
        inner = Service("inner", ["-c", {textwrap.dedent(inner)!r}], dict(os.environ))
        Supervisor([inner], Path({str(tmp_path / "logs")!r}), print).run()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(outer)])
    try:
        deadline = time.monotonic() + 20
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        pid = int(pid_file.read_text())
        assert alive(pid)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert gone(pid)


def test_a_service_takes_no_code_from_the_folder_that_it_is_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that others may write to, `deploy` or `json` could be theirs."""
    (tmp_path / "deploy").mkdir()
    for name in ("deploy/__init__.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('evil')")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    script = "import deploy, json, time; print(deploy.__file__, flush=True); time.sleep(60)"
    supervised = Supervisor([service("one", script)], tmp_path / "logs", said.append)

    def stop() -> None:
        while not said:
            time.sleep(0.05)
        supervised.stop()

    threading.Thread(target=stop, daemon=True).start()
    supervised.run()
    assert said[0] == f"one | {deploy.__file__}"

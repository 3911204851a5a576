"""``flwr run`` in simulation mode, with a SuperLink of its own that lives as long as the run.

Flower's own local SuperLink outlives the command that started it, and gives every later run the
environment of the first. Here each simulation starts its own on loopback, with its own
``FLWR_HOME``, and takes it down again; the run's status is asked for, since ``flwr run`` exits
0 for a run that failed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
from rich.console import Console

import deploy
from common.config import BY_NAME, Value
from common.errors import ConfigError, ConsiliumError
from common.files import consilium_home, read_json
from server_app.run_store import new_run_id, runs_directory

APP = Path(deploy.__file__).resolve().parent.parent
START_TIMEOUT = 60.0
SWITCHES = {
    # Nothing is fetched, nothing is told to anyone, while a run goes on.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    # A hospital's thread count is the run's `threads`, not what a library finds.
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
_NOISE = re.compile(
    r"^(\d\d/\d\d/\d{4} [\d:]+:)?(\x1b\[\d+m)?(INFO|DEBUG|WARNING)|^\(ClientAppActor|^\(raylet"
    r"|Successfully (started|installed)|FutureWarning|UserWarning|warnings\.warn|loss\.backward"
)


def simulate(hospitals: int, values: Mapping[str, Value], *, verbose: bool = False) -> int:
    """Run a simulation; returns 0 if the run completed, 1 if it failed.

    ``values``: checked run-config keys over their defaults. Progress goes to stdout as it comes.
    """
    if not (APP / "pyproject.toml").exists():
        raise ConfigError(
            "the Flower app's pyproject.toml is not beside the installed packages",
            "work in a clone of the repository, installed with `pip install -e .`",
        )
    # Told to stop, take everything down again first: an exit runs the clean-up, a signal does not.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = str(values.get("resume") or "") or new_run_id()
    home = runs_directory() / run
    flower_home = consilium_home() / "flower" / run
    environment = {**os.environ, **SWITCHES, "FLWR_HOME": str(flower_home), "CONSILIUM_RUN": run}
    with _superlink(flower_home, environment) as address:
        flower_home.joinpath("config.toml").write_text(
            f'[superlink]\ndefault = "simulation"\n\n[superlink.simulation]\n'
            f'address = "{address}"\ninsecure = true\n'
        )
        run_id = _flwr_run(hospitals, values, environment, verbose)
        status = _status(run_id, environment)
    if status == "finished:completed":
        return 0
    summary = home / "summary.json"
    reason = read_json(summary).get("reason") if summary.exists() else None
    Console(stderr=True).print(
        f"[red]The run failed ({status}).[/red] {reason or 'Its log above says why.'}",
        highlight=False,
    )
    return 1


@contextmanager
def _superlink(flower_home: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """A SuperLink in simulation mode on a free loopback port; yields its address."""
    flower_home.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    log = flower_home / "superlink.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "flower-superlink"),
                "--insecure", "--simulation", "--isolation", "subprocess",
                "--host", "127.0.0.1", "--port", str(port),
            ],
            env={**environment, "PATH": _path(environment)},
            stdout=out,
            stderr=out,
            start_new_session=True,  # its children go with it: one group, one end
        )  # fmt: skip
    try:
        _wait_until_healthy(process, port, log)
        yield f"127.0.0.1:{port}"
    finally:
        _end(process)
        _end_leftovers(environment["CONSILIUM_RUN"])


def _wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1.0).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise ConsiliumError(
        f"Flower's SuperLink did not start within {START_TIMEOUT:.0f} s", f"read {log}"
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process group, SIGKILL to what is left of it after 10 s."""
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue


def _end_leftovers(run: str) -> None:
    """SIGKILL to what the run has started and not ended: Ray's processes leave the group.

    They are known by their environment, which holds the run's id; this process and those above
    it are spared. Where there is no /proc, nothing is done.
    """
    spared, pid = set(), os.getpid()
    while pid > 1:
        spared.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    mark = f"CONSILIUM_RUN={run}".encode()
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in entry.read_bytes().split(b"\0") and int(entry.parent.name) not in spared:
                os.kill(int(entry.parent.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue  # ended meanwhile, or somebody else's


def _flwr_run(
    hospitals: int, values: Mapping[str, Value], environment: Mapping[str, str], verbose: bool
) -> str:
    """Start the run and stream its log; returns Flower's id of it."""
    command = [_flwr(), "run", str(APP), "--stream"]
    federation = f"num-supernodes={hospitals} client-resources-num-cpus=1"
    command += ["--federation-config", federation]
    for name, value in values.items():
        command += ["--run-config", f"{name}={BY_NAME[name].as_toml(value)}"]
    run_id, started = "", False
    with subprocess.Popen(
        command, env={**environment, "PATH": _path(environment)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            found = re.search(r"Successfully started run (\d+)", line)
            run_id = found.group(1) if found else run_id
            # Flower's own lines are left out from here on, but never an error.
            started = started or bool(run_id)
            if verbose or not started or not _NOISE.search(line):
                print(line, end="", flush=True)
    if not run_id:
        raise ConsiliumError("`flwr run` did not start the run", "read what it printed above")
    return run_id


def _status(run_id: str, environment: Mapping[str, str]) -> str:
    """Flower's status of a run, such as ``finished:completed``; waits until it has ended."""
    for _ in range(60):
        answer = subprocess.run(
            [_flwr(), "ls", "--run-id", run_id, "--format", "json"],
            env={**environment, "PATH": _path(environment)}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        try:
            status = str(json.loads(answer.stdout)["runs"][0]["status"])
        except (ValueError, KeyError, IndexError):
            status = "unknown"
        if status.startswith("finished"):
            return status
        time.sleep(0.5)
    return status


def _flwr() -> str:
    return str(Path(sys.executable).parent / "flwr")


def _path(environment: Mapping[str, str]) -> str:
    """PATH with this environment's commands first: Flower finds its helpers there."""
    return f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

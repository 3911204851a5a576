"""``flwr run`` in simulation mode, with a SuperLink of its own that lives as long as the run.

Flower's own local SuperLink outlives the command that started it, and gives every later run the
environment of the first. Here each simulation starts its own on loopback, with its own
``FLWR_HOME``, and takes it down again; the run's status is asked for, since ``flwr run`` exits
0 for a run that failed.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from rich.console import Console

from common.config import RunConfig, Value
from common.errors import ConsiliumError
from common.files import consilium_home, read_json
from deploy.runtime.flower import command
from deploy.runtime.flower import environment as flower_environment
from deploy.runtime.ports import free_port
from deploy.server import launch
from deploy.server.control import Control
from server_app.run_store import new_run_id, runs_directory

START_TIMEOUT = 60.0
CONNECTION = "simulation"


def simulate(hospitals: int, values: Mapping[str, Value], *, verbose: bool = False) -> int:
    """Run a simulation; returns 0 if the run completed, 1 if it failed.

    ``values``: checked run-config keys over their defaults. Progress goes to stdout as it comes.
    """
    launch.check_app()
    # Told to stop, take everything down again first: an exit runs the clean-up, a signal does not.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = str(values.get("resume") or "") or new_run_id()
    home = runs_directory() / run
    flower_home = consilium_home() / "flower" / run
    environment = flower_environment(flower_home) | {
        "CONSILIUM_RUN": run, "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    with _superlink(flower_home, environment) as address:
        flower_home.joinpath("config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
            f'address = "{address}"\ninsecure = true\n'
        )
        federation = f"num-supernodes={hospitals} {resources(RunConfig.parse(values).device)}"
        options = ["--federation-config", federation]
        started = launch.start(CONNECTION, values, environment, options)
        lines = launch.Lines(verbose=verbose)
        status = launch.follow(lambda: Control(address, None), started, lines, patience=30.0)
    if status.text == "finished:completed":
        return 0
    summary = home / "summary.json"
    reason = read_json(summary).get("reason") if summary.exists() else None
    Console(stderr=True).print(
        f"[red]The run failed ({status.text}).[/red] {reason or 'Its log above says why.'}",
        highlight=False,
    )
    return 1


def resources(device: str) -> str:
    """What each simulated hospital has, as Flower's federation config says it: a core, and where
    models are trained on GPUs a share of those, so that as many hospitals train as there are cores.

    Ray hides all GPUs from whoever has no share.
    """
    from common.devices import gpu_count, usable_cores  # torch, which takes seconds

    told, gpus, cores = "client-resources-num-cpus=1", gpu_count(device), usable_cores()
    if not gpus:
        return told
    share = 1.0 if gpus >= cores else math.floor(1000 * gpus / cores) / 1000
    return f"{told} client-resources-num-gpus={share:g}"


@contextmanager
def _superlink(flower_home: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """A SuperLink in simulation mode on a free loopback port; yields its address."""
    flower_home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    log = flower_home / "superlink.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [
                command("flower-superlink"),
                "--insecure", "--simulation", "--isolation", "subprocess",
                "--host", "127.0.0.1", "--port", str(port),
            ],
            env=dict(environment),
            stdout=out,
            stderr=out,
            start_new_session=True,  # its children go with it: one group, one end
        )  # fmt: skip
    try:
        _wait_until_healthy(process, port, log)
        yield f"127.0.0.1:{port}"
    finally:
        family = _descendants(process.pid)  # while their parents live, and tell whose they are
        _end(process)
        _end_leftovers(environment["CONSILIUM_RUN"], family)


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


def _end_leftovers(run: str, family: Mapping[int, str]) -> None:
    """SIGKILL to what the run has started and not ended: Ray's processes leave the group.

    They are those of ``family`` (:func:`_descendants`), and those whose environment holds the
    run's id; this process and those above it are spared. Where there is no /proc, nothing is done.
    """
    for pid, born in family.items():
        now = _parent_and_birth(pid)
        if now is not None and now[1] == born:  # not another that has got its number
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
    spared, pid = set(), os.getpid()
    while pid > 1:
        spared.add(pid)
        above = _parent_and_birth(pid)
        if above is None:
            break
        pid = above[0]
    # Ray's renamed processes write over some or all of what /proc shows: any trace counts.
    mark, deadline = run.encode(), time.monotonic() + 10.0
    # Some are just starting others: look again until nobody is left.
    while _kill_all_with(mark, spared) and time.monotonic() < deadline:
        time.sleep(0.1)


def _descendants(root: int) -> dict[int, str]:
    """The processes below ``root``, whatever their group: number → when each was born."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        found = _parent_and_birth(int(entry.name))
        if found is not None:
            parents[int(entry.name)] = found
    below: dict[int, str] = {}
    layer = {root}
    while layer:
        layer = {pid for pid, (parent, _) in parents.items() if parent in layer} - set(below)
        below |= {pid: parents[pid][1] for pid in layer}
    return below


def _parent_and_birth(pid: int) -> tuple[int, str] | None:
    """Of a process, from /proc; None where it has ended, or there is no /proc."""
    try:
        told = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(told[1]), told[19]
    except (OSError, ValueError, IndexError):
        return None


def _kill_all_with(mark: bytes, spared: set[int]) -> bool:
    """SIGKILL to the processes with ``mark`` in their environment; whether there were any."""
    found = False
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in entry.read_bytes() and int(entry.parent.name) not in spared:
                os.kill(int(entry.parent.name), signal.SIGKILL)
                found = True
        except (OSError, ValueError):
            continue  # ended meanwhile, or somebody else's
    return found

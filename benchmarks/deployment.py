"""Seconds per stage and per round of a federation on real processes: ours beside stock Flower.

    python -m benchmarks.deployment [--hospitals 5] [--rounds 4] [--data bloodmnist.npz]

Both run the same app (FedAvg, SecAgg+, DP), model and pictures on this machine, over TLS with node
authentication. ``stock``: flower-superlink, flower-supernode and `flwr run` as they come, each
node in subprocess isolation. ``ours``: `consilium federation serve`, `consilium hospital start`,
`consilium run`. They run one after the other, never at once, in turns (``--turns``). Kept in
``benchmarks/results/deployment.json``: medians over the rounds after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from client_app.hospital_file import HospitalFolder
from common.federation_file import read_key
from common.files import read_json, write_json
from deploy.provision.federation import FederationFolder
from deploy.runtime.flower import SWITCHES, command
from deploy.runtime.ports import free_port
from deploy.server.launch import APP

RESULTS = Path(__file__).parent / "results" / "deployment.json"
STAGES = ("share", "masked", "consistency", "unmask")
"""The stages in which hospitals only compute and answer; `train` is mostly training."""
SETTINGS = {
    "model-width": "0.25", "privacy": "local", "epsilon": "8.0", "secagg": "true", "quorum": "1.0",
}  # fmt: skip
PATIENCE = 120.0
PICTURES = 300
"""Synthetic ones in the whole federation: few, since waiting is measured and not training."""


def make_federation(root: Path, hospitals: int, data: Path | None, port: int) -> list[Path]:
    """A demonstration federation for a server on loopback; the hospitals' folders."""
    arguments = ["federation", "demo", str(root), "--hospitals", str(hospitals)]
    arguments += ["--address", f"localhost:{port}"]
    arguments += ["--data", str(data)] if data else ["--images", str(PICTURES)]
    subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments], check=True, capture_output=True
    )
    return sorted(path for path in root.glob("hospital-*"))


@contextmanager
def process(
    arguments: Sequence[str], log: Path, extra: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, ended with the block."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        started = subprocess.Popen(
            arguments, stdout=out, stderr=out, env=surroundings(extra), start_new_session=True
        )
    try:
        yield started
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(started.pid, number)
                started.wait(15)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def surroundings(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment: nothing is fetched, one thread."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # What Flower comes with: its own poll interval.
    switches = {k: v for k, v in SWITCHES.items() if "POLL" not in k}
    return {**os.environ, **switches, "PATH": path, **(extra or {})}


def wait_for_server(port: int, authority: Path) -> None:
    """Until the server answers; RuntimeError if it never does."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"https://localhost:{port}/health", verify=str(authority)).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise RuntimeError("the server did not start")


def values_of(coordinator: FederationFolder, rounds: int) -> dict[str, str]:
    """The run config of both systems."""
    settings = coordinator.load()
    return SETTINGS | {
        "rounds": str(rounds), "dataset": "hospitals", "classes": ",".join(settings.classes),
        "image-size": str(settings.image_size), "channels": str(settings.channels),
    }  # fmt: skip


def run_stock(root: Path, port: int, rounds: int) -> tuple[Path, float]:
    """One run on stock Flower; its directory, and when it was asked for."""
    coordinator = FederationFolder(root / "coordinator")
    home = root / "stock"
    flower = {"FLWR_HOME": str(home / "flower"), "CONSILIUM_HOME": str(home)}
    with ExitStack() as stack:
        stack.enter_context(
            process(
                [
                    command("flower-superlink"),
                    "--ssl-ca-certfile", str(coordinator.authority),
                    "--ssl-certfile", str(coordinator.server),
                    "--ssl-keyfile", str(coordinator.server_key), "--enable-supernode-auth",
                    "--database", str(home / "state.db"), "--isolation", "subprocess",
                    "--host", "127.0.0.1", "--port", str(port),
                ],
                home / "superlink.log", flower,
            )
        )  # fmt: skip
        wait_for_server(port, coordinator.authority)
        (home / "flower").mkdir(parents=True, exist_ok=True)
        (home / "flower" / "config.toml").write_text(
            '[superlink]\ndefault = "federation"\n\n[superlink.federation]\n'
            f'address = "localhost:{port}"\nroot-certificates = "{coordinator.authority}"\n'
        )
        for key in sorted(coordinator.hospitals.glob("*.pub")):
            flwr("supernode", "register", str(key), environment=flower)
        for place in sorted(root.glob("hospital-*")):
            folder = HospitalFolder(place)
            stack.enter_context(
                process(
                    [
                        command("flower-supernode"), "--superlink", f"localhost:{port}",
                        "--root-certificates", str(folder.authority),
                        "--auth-supernode-private-key", str(folder.node_key),
                        "--host", "127.0.0.1", "--port", str(free_port()),
                        "--node-config", f'hospital="{place}"',
                    ],
                    home / f"{place.name}.log", {"FLWR_HOME": str(home / place.name)},
                )
            )  # fmt: skip
        asked = time.time()
        arguments = ["run", str(APP), "federation"]
        values = values_of(coordinator, rounds) | {
            "roster": str(coordinator.roster), "coordinator-key": key_text(coordinator)
        }  # fmt: skip
        for name, value in values.items():
            number = value.replace(".", "").isdigit() or value == "true"
            arguments += ["--run-config", f"{name}={value if number else json.dumps(value)}"]
        flwr(*arguments, environment=flower)
        wait_for_end(home / "runs")
    return newest(home / "runs"), asked


def run_ours(root: Path, port: int, rounds: int) -> tuple[Path, float]:
    """One run on ours; its directory, and when it was asked for.

    RuntimeError, with the command's last lines, for a run that failed.
    """
    coordinator = FederationFolder(root / "coordinator")
    cli, logs = [sys.executable, "-m", "deploy.cli"], root / "ours"
    own = {"CONSILIUM_HOME": str(root / "ours")}
    with ExitStack() as stack:
        serve = [*cli, "federation", "serve", str(coordinator.root), "--host", "127.0.0.1"]
        stack.enter_context(process(serve, logs / "serve.log", own))
        wait_for_server(port, coordinator.authority)
        for place in sorted(root.glob("hospital-*")):
            start = [*cli, "hospital", "start", str(place)]
            stack.enter_context(process(start, logs / f"{place.name}.log", own))
        asked = time.time()
        arguments = [*cli, "run", "--federation", str(coordinator.root)]
        for name, value in (SETTINGS | {"rounds": str(rounds)}).items():
            arguments += ["--set", f"{name}={value}"]
        told = logs / "run.log"
        with told.open("ab") as out:
            done = subprocess.run(
                arguments, env=surroundings(own), stdout=out, stderr=out, check=False
            )
        if done.returncode:
            raise RuntimeError(f"the run failed: {told.read_text()[-600:]}")
    return newest(coordinator.root / "home" / "runs"), asked


def key_text(coordinator: FederationFolder) -> str:
    """The coordinator's public key in base64."""
    read_key(coordinator.coordinator)
    return coordinator.coordinator.read_text().strip()


def flwr(*arguments: str, environment: Mapping[str, str]) -> None:
    """One of Flower's commands; raises if it fails."""
    done = subprocess.run(
        [command("flwr"), *arguments], env=surroundings(environment), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"flwr {arguments[0]}: {done.stdout}{done.stderr}")


def newest(runs: Path) -> Path:
    """The directory of the last run."""
    return max(runs.iterdir())


def wait_for_end(runs: Path, patience: float = 1200.0) -> None:
    """Until the run has a summary."""
    deadline = time.monotonic() + patience
    while not list(runs.glob("*/summary.json")):
        if time.monotonic() > deadline:
            raise RuntimeError("the run did not end")
        time.sleep(0.2)


def measure(directory: Path, asked: float) -> dict[str, Any]:
    """Rounds and stages of a run, in seconds; RuntimeError if a round was not whole."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    rounds = [row for row in map(json.loads, lines) if row["round"] > 0]
    if any(row["status"] != "ok" or row["dropped"] for row in rounds):
        raise RuntimeError(f"a round of {directory} was not whole")
    first = (directory / "round-0001.safetensors").stat().st_mtime - asked
    return {
        "start_to_first_round": round(first, 2),
        "rounds": [row["seconds"] for row in rounds],
        "stages": [{s: row["stage_seconds"][s] for s in STAGES} for row in rounds],
        "train": [row["stage_seconds"]["train"] for row in rounds],
    }


def row(system: str, hospitals: int, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of one system: medians over all turns' rounds but each turn's first."""
    rounds = [s for part in parts for s in part["rounds"][1:]]
    stages = [part["stages"][1:] for part in parts]
    flat = [s for turn in stages for one in turn for s in one.values()]
    each = {s: _median([one[s] for turn in stages for one in turn]) for s in STAGES}
    return {
        "system": system, "hospitals": hospitals, "seconds_per_stage": _median(flat),
        "seconds_per_round": _median(rounds), "slowest_stage": round(max(flat), 2),
        "slowest_round": round(max(rounds), 2), "seconds_by_stage": each,
        "seconds_training": _median([s for part in parts for s in part["train"][1:]]),
        "start_to_first_round": [part["start_to_first_round"] for part in parts],
        "n_rounds": len(rounds), "n_stages": len(flat),
    }  # fmt: skip


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 2)


def main() -> None:
    """Measure both in turns, keep the figures, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hospitals", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--data", type=Path, help="an npz file in MedMNIST's form; else synthetic")
    parser.add_argument("--systems", default="stock,ours")
    parser.add_argument("--keep", type=Path, help="keep everything in this folder")
    arguments = parser.parse_args()
    place = arguments.keep or Path(tempfile.mkdtemp(prefix="consilium-"))
    systems = arguments.systems.split(",")
    parts: dict[str, list[dict[str, Any]]] = {system: [] for system in systems}
    try:
        for turn in range(arguments.turns):
            for system in systems:
                root, port = (place / f"{system}-{turn}").absolute(), free_port()
                make_federation(root, arguments.hospitals, arguments.data, port)
                run = run_stock if system == "stock" else run_ours
                parts[system].append(measure(*run(root, port, arguments.rounds)))
                print(system, parts[system][-1], flush=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(place, ignore_errors=True)
    rows = [row(system, arguments.hospitals, found) for system, found in parts.items()]
    if RESULTS.exists():
        key = {(r["system"], r["hospitals"]) for r in rows}
        old = read_json(RESULTS)["rows"]
        rows += [r for r in old if (r["system"], r["hospitals"]) not in key]
    write_json(
        RESULTS,
        {
            "command": f"python -m benchmarks.deployment --hospitals {arguments.hospitals} "
                       f"--rounds {arguments.rounds} --turns {arguments.turns}",
            "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
            "settings": SETTINGS | {"pictures": "npz" if arguments.data else "synthetic"},
            "rows": rows,
        },
    )  # fmt: skip
    table = Table("system", "hospitals", "s a stage", "s a round", "of that training")
    for r in rows:
        table.add_row(r["system"], str(r["hospitals"]), f"{r['seconds_per_stage']:.2f}",
                      f"{r['seconds_per_round']:.2f}", f"{r['seconds_training']:.2f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()

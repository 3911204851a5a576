"""Time to accuracy under stragglers with real processes: the deployment, and a wall clock.

    python -m benchmarks.vectors.processes --data bloodmnist.npz [--rounds 5] [--bases 12]
        [--share 0.35] [--epochs 5]

Five hospitals' nodes and a server on loopback, TLS and node keys on, no privacy and no secure
aggregation; all start from one public base (``--epochs`` of pre-training). Real hospitals have a
machine each, and these share one: so each one's apps compute the ``--share`` of the time (they
are stopped the rest), which should be the machine's cores / 5 or less; with 1 they compete. One
hospital computes a tenth of that, one is off half of the time (all its processes stand still for
a minute, then run for a minute). Rounds first, then vectors, in the same federation. A round
waits for everybody who is connected, and counts with three of five: who stands still long enough
is taken for away. The row goes to ``results/async.json`` beside those of the simulated clock.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.deployment import make_federation, process, surroundings, wait_for_server
from benchmarks.vectors.asynchronous import RESULTS
from common.federation_file import TIME
from common.files import read_json, write_json
from deploy.provision.federation import FederationFolder
from deploy.runtime.ports import free_port

CLI = [sys.executable, "-m", "deploy.cli"]
SETTING = "one 10x slower, one off half of the time"
POLICY = """version = 1
[aggregation]
secagg = "optional"
[privacy]
total-epsilon = inf
run-epsilon = inf
allow-non-private = true
metrics = "exact"
[vectors]
send = "any"
"""
Curve = list[tuple[float, float]]
"""(seconds since the first base was there, test accuracy from then on)."""


def descendants(pid: int) -> list[int]:
    """``pid`` and every process below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        found.append(waiting.pop())
        waiting += parents.get(found[-1], [])
    return found


def apps(pid: int) -> list[int]:
    """The processes of a node that compute: its apps, without the SuperNode."""
    found = []
    for one in descendants(pid):
        with suppress(OSError):
            if "deploy.node.apps" in Path(f"/proc/{one}/cmdline").read_text().split("\0"):
                found.append(one)
    return found


@contextmanager
def paced(node: int, share: float, off: float = 0.0) -> Iterator[None]:
    """Let a node's apps compute the ``share`` of each second.

    With ``off`` all its processes stand still for so many seconds, then go on as long, in turn.
    """
    ended = threading.Event()

    def halted(which: Callable[[int], Sequence[int]], seconds: float) -> None:
        stopped = which(node)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in stopped:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            if number == signal.SIGSTOP:
                ended.wait(seconds)

    def turns() -> None:
        while not ended.is_set():
            if off:
                halted(descendants, off)
            until = time.monotonic() + off if off else math.inf
            while time.monotonic() < until and not ended.is_set():
                if share < 1.0:
                    halted(apps, 1.0 - share)
                ended.wait(min(share, until - time.monotonic()))

    thread = threading.Thread(target=turns)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def run(root: Path, port: int, share: float, values: dict[str, str]) -> Path:
    """One run in a federation of its own processes, with its stragglers; the run's directory."""
    coordinator, own = FederationFolder(root / "coordinator"), {"CONSILIUM_HOME": str(root)}
    with ExitStack() as stack:
        serve = [*CLI, "federation", "serve", str(coordinator.root), "--host", "127.0.0.1"]
        stack.enter_context(process(serve, root / "serve.log", own))
        wait_for_server(port, coordinator.authority)
        nodes = [
            stack.enter_context(
                process([*CLI, "hospital", "start", str(place)], root / f"{place.name}.log", own)
            )
            for place in sorted(root.glob("hospital-*")) if place.is_dir()
        ]  # fmt: skip
        slow, off, *others = (node.pid for node in nodes)
        stack.enter_context(paced(slow, share / 10))
        stack.enter_context(paced(off, share, off=60.0))
        for node in others:
            stack.enter_context(paced(node, share))
        arguments = [*CLI, "run", "--federation", str(coordinator.root)]
        for name, value in values.items():
            arguments += ["--set", f"{name}={value}"]
        with (root / "run.log").open("ab") as out:
            subprocess.run(arguments, env=surroundings(own), stdout=out, stderr=out, check=True)
    return max((coordinator.root / "home" / "runs").iterdir())


def curve_of_rounds(directory: Path) -> Curve:
    """Of a fedavg run, by when each round's model was written."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    written = [
        (directory / f"round-{row['round']:04d}.safetensors").stat().st_mtime for row in rows
    ]
    return [(t - written[0], row["test"]["accuracy"]) for t, row in zip(written, rows, strict=True)]


def curve_of_vectors(directory: Path) -> Curve:
    """Of a run of vectors, by when each base was published."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    bases = [row for row in rows if row["event"] == "base"]
    times = [datetime.strptime(row["time"], TIME).timestamp() for row in bases]
    return [
        (t - times[0], row["test"]["accuracy"]) for t, row in zip(times, bases, strict=True)
    ]  # fmt: skip


def reached(curve: Curve, accuracy: float) -> float:
    """When the accuracy was first that high."""
    return next(t for t, value in curve if value >= accuracy)


def main() -> None:
    """Measure both, keep the row, print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="an npz file in MedMNIST's form")
    parser.add_argument("--hospitals", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5, help="of fedavg")
    parser.add_argument("--bases", type=int, default=12, help="that the run of vectors publishes")
    parser.add_argument("--share", type=float, default=0.35, help="of a second that apps compute")
    parser.add_argument("--epochs", type=int, default=5, help="of the base's pre-training")
    parser.add_argument("--keep", type=Path, help="keep everything in this folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    place = (arguments.keep or Path(tempfile.mkdtemp(prefix="consilium-"))).absolute()
    port, root, data = free_port(), place / "federation", arguments.data.resolve()
    try:
        make_federation(root, arguments.hospitals, data, port)
        for folder in root.glob("hospital-*"):
            (folder / "policy.toml").write_text(POLICY)
        base = place / "base.safetensors"
        subprocess.run(
            [
                *CLI,
                "pretrain",
                "--out",
                str(base),
                "--data",
                str(data),
                "--epochs",
                str(arguments.epochs),
            ],
            check=True,
        )
        common = {
            "privacy": "none", "secagg": "false", "test-data": str(data), "base": str(base),
            "local-epochs": "1",
        }  # fmt: skip
        rounds = curve_of_rounds(
            run(
                root,
                port,
                arguments.share,
                common | {"rounds": str(arguments.rounds), "quorum": "0.6"},
            )
        )
        vectors = curve_of_vectors(
            run(
                root,
                port,
                arguments.share,
                common | {"mode": "vectors", "versions": str(arguments.bases)},
            )
        )
    finally:
        if not arguments.keep:
            shutil.rmtree(place, ignore_errors=True)
    # Without the base itself, at time 0: what is asked is when training has got somewhere.
    rounds, vectors = rounds[1:], vectors[1:]
    level = min(max(a for _, a in rounds), max(a for _, a in vectors))
    ours, theirs = reached(vectors, level), reached(rounds, level)
    row: dict[str, Any] = {
        "setting": SETTING, "synchronous": "all that are connected", "partition": "size-skew",
        "seed": 0,
        "clock": f"real processes, {arguments.share:g} of a core each",
        "hospitals": arguments.hospitals, "accuracy": level,
        "time": ours, "time_synchronous": theirs, "speedup": theirs / ours,
        "test_accuracy": vectors[-1][1], "test_accuracy_synchronous": rounds[-1][1],
        "curve": vectors, "curve_synchronous": rounds,
    }  # fmt: skip
    rows = read_json(arguments.out) if arguments.out.exists() else []
    write_json(arguments.out, [r for r in rows if r["clock"] != row["clock"]] + [row])
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()

"""What one or two lying hospitals of ten cost, with the defence and without: whole runs in-process.

    python -m benchmarks.poison [--rounds 12] [--seeds 0] [--partitions size-skew] [--only TEXT]

Each cell is a run of the product (ServerApp, ClientApp, secure aggregation) on synthetic cells, in
a process of its own; the liar keeps the protocol and masks what it likes (:mod:`liar`). Accuracy is
the last model's on other images of the same generator. What is done already is read from
``benchmarks/results/poison.json`` and not done again (``--again`` does); the table is printed from
it. Honest runs count what the defence did though nobody lied.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import environment
from benchmarks.tables import show_table
from common.errors import RoundError
from common.files import read_json, write_json

RESULTS = Path(__file__).parent.parent / "results" / "poison.json"
HONEST = "honest"
LIARS = (3, 7)
HOSPITALS = 10
MEASURED_BY = 6000
"""Synthetic images of the set whose test split measures all models alike."""


def settings(rounds: int, partition: str, seed: int) -> dict[str, Any]:
    """Run-config keys of every cell."""
    return {
        "dataset": "synthetic", "synthetic-size": 1000, "partition": partition, "rounds": rounds,
        "batch-size": 8, "learning-rate": 1e-3, "model-width": 0.03125, "privacy": "none",
        "partition-min-size": 10, "seed": seed, "test-every": rounds,
        "round-timeout": 3000.0, "stage-timeout": 600.0,
    }  # fmt: skip


def one(cell: dict[str, Any]) -> dict[str, Any]:
    """Run a cell in this process, in a folder that is thrown away."""
    import torch
    from safetensors.numpy import load_file

    from benchmarks.poison.liar import LIES, LyingApp
    from common.config import RunConfig
    from common.model import ModelSpec
    from common.simulation import load_dataset
    from deploy.inprocess import run_in_process
    from server_app.evaluation import Evaluator
    from server_app.run_store import runs_directory

    torch.set_num_threads(1)
    values = settings(cell["rounds"], cell["partition"], cell["seed"])
    values["defence"] = cell["defence"]
    liars = LIARS[: cell["liars"]]
    lies = dict.fromkeys(liars, LIES[cell["lie"]]) if liars else {}
    began, failed = time.perf_counter(), None
    with tempfile.TemporaryDirectory() as home:
        os.environ["CONSILIUM_HOME"] = home
        try:
            run_in_process(values, num_hospitals=HOSPITALS, client_app=LyingApp(lies))
        except RoundError as error:
            failed = error.what
        (directory,) = runs_directory().iterdir()
        summary = read_json(directory / "summary.json")
        lines = [json.loads(x) for x in (directory / "metrics.jsonl").read_text().splitlines()]
        config = RunConfig.parse(values | {"synthetic-size": MEASURED_BY, "seed": 0})
        dataset = load_dataset(config)
        spec = ModelSpec.of(config, num_classes=dataset.num_classes, channels=dataset.channels)
        measure = Evaluator(spec, dataset.test, dataset.class_names)
        accuracy = measure(load_file(directory / "model.safetensors"))["accuracy"]
    told = [line.get("defence", {}) for line in lines]
    found = summary["defence"] or {"named": {}, "suspected": []}
    named_in = [line["round"] for line, t in zip(lines, told, strict=True) if "named" in t]
    return {
        **cell,
        "accuracy": round(float(accuracy), 4),
        "named": sorted(found["named"]),
        "suspected": found["suspected"],
        "named_in_rounds": named_in,
        "set_aside": sum("set_aside" in t for t in told),
        "rolled_back": len(summary["rolled_back_rounds"]),
        "in_halves": sum("halves" in line for line in lines),
        "failed": failed,
        "seconds": round(time.perf_counter() - began, 1),
    }


def cells(rounds: int, seeds: list[int], partitions: list[str]) -> list[dict[str, Any]]:
    """Every run of the table, those that matter most first."""
    from benchmarks.poison.liar import LIES

    ways = [(HONEST, 0)] + [(lie, liars) for liars in (1, 2) for lie in LIES]
    return [
        {"lie": lie, "liars": liars, "defence": defence, "partition": partition, "seed": seed,
         "rounds": rounds}
        for (lie, liars), partition, seed, defence in itertools.product(
            ways, partitions, seeds, (True, False)
        )
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each lie, number of liars and partition: means over seeds."""
    head = ["lie", "liars", "partition", "without, %", "with, %", "named", "in round",
            "set aside", "rolled back", "runs"]  # fmt: skip
    lines = [head]
    keys = dict.fromkeys((r["lie"], r["liars"], r["partition"]) for r in rows)
    for lie, liars, partition in keys:
        mine = [
            r for r in rows if (r["lie"], r["liars"], r["partition"]) == (lie, liars, partition)
        ]
        on, off = ([r for r in mine if r["defence"] is d] for d in (True, False))
        truth = {f"hospital-{i:02d}" for i in LIARS[:liars]}
        right = sum(len(truth & set(r["named"])) for r in on)
        wrong = sum(len(set(r["named"]) - truth) for r in on)
        named = f"{right} of {liars * len(on)}" + (f", {wrong} wrongly" if wrong else "")
        when = [str(n) for r in on for n in r["named_in_rounds"]]
        lines.append([
            lie, str(liars), partition, _mean(off), _mean(on), named, ", ".join(when) or "–",
            str(sum(r["set_aside"] for r in on)), str(sum(r["rolled_back"] for r in on)),
            str(len(mine)),
        ])  # fmt: skip
    return lines


def _mean(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "–"
    shown = f"{100 * sum(r['accuracy'] for r in rows) / len(rows):.1f}"
    return shown + (" (stopped)" if any(r["failed"] for r in rows) else "")


def _key(cell: dict[str, Any]) -> tuple[Any, ...]:
    names = ("lie", "liars", "defence", "partition", "seed", "rounds")
    return tuple(cell[name] for name in names)


def main() -> None:
    """Run what is missing, write, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--partitions", nargs="+", default=["size-skew"])
    parser.add_argument("--only", default="", help="cells whose lie has this text")
    parser.add_argument("--liars", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--cell", default="", help=argparse.SUPPRESS)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(one(json.loads(args.cell))))
        return
    rows: list[dict[str, Any]] = read_json(args.results)["rows"] if args.results.exists() else []
    done = set() if args.again else {_key(row) for row in rows}
    for cell in cells(args.rounds, args.seeds, args.partitions):
        if args.only not in cell["lie"] or cell["liars"] not in args.liars or _key(cell) in done:
            continue
        command = [sys.executable, "-m", "benchmarks.poison", "--cell", json.dumps(cell)]
        came = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(came.stdout.splitlines()[-1])
        rows = [r for r in rows if _key(r) != _key(cell)] + [row]
        write_json(args.results, {"machine": environment(), "rows": rows})
        print(row, flush=True)
    show_table(table(rows), markdown=args.markdown)


if __name__ == "__main__":
    main()

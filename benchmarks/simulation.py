"""Whole simulations on real images: what secure aggregation and differential privacy cost.

    python -m benchmarks.simulation --data bloodmnist.npz --cells plain,secagg,local

Each cell is one ``consilium simulate`` with the defaults of the run config and ten hospitals,
size-skew, width 0.25. Rows are kept in ``benchmarks/results/simulation.json``, cell by cell; a
cell that is there is not run again (``--fresh`` to start anew).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.files import read_json, write_json
from server_app.run_store import runs_directory

RESULTS = Path(__file__).parent / "results" / "simulation.json"
HOSPITALS = 10
CELLS: dict[str, dict[str, str]] = {
    "plain": {"privacy": "none", "secagg": "false"},
    "secagg": {"privacy": "none", "secagg": "true"},
    "local": {"privacy": "local", "secagg": "true"},
}


def run_cell(data: Path, cell: str, seed: int, extra: list[str]) -> dict[str, Any]:
    """One simulation; its row."""
    settings = {
        "dataset": "npz", "data-path": str(data.resolve()), "partition": "size-skew",
        "model-width": "0.25", "seed": str(seed), **CELLS[cell],
    }  # fmt: skip
    command = [sys.executable, "-m", "deploy.cli", "simulate", "--hospitals", str(HOSPITALS)]
    for assignment in [*(f"{k}={v}" for k, v in settings.items()), *extra]:
        command += ["--set", assignment]
    before = set(runs_directory().glob("*"))
    started = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - started
    (directory,) = set(runs_directory().glob("*")) - before
    summary = read_json(directory / "summary.json")
    last = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    config = read_json(directory / "config.json")
    return {
        "cell": cell, "seed": seed, "hospitals": HOSPITALS, "privacy": config["privacy"],
        "secagg": config["secagg"], "rounds": summary["rounds"],
        "local_epochs": config["local-epochs"], "batch_size": config["batch-size"],
        "learning_rate": config["learning-rate"], "model_width": config["model-width"],
        "epsilon": summary["epsilon"], "delta": summary["delta"],
        "test_accuracy": summary["test_accuracy"], "test_macro_f1": summary["test_macro_f1"],
        "test_macro_auc": summary["test_macro_auc"], "wall_s": round(seconds, 1),
        "best_round": summary["best_round"], "last_round_test_accuracy": last["test"]["accuracy"],
        "source": summary["source"], "source_sha256": summary["source_sha256"],
    }  # fmt: skip


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="an npz file in MedMNIST's form")
    parser.add_argument("--cells", default="plain,secagg,local")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--set", action="append", default=[], help="key=value over the defaults")
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if RESULTS.exists() and not arguments.fresh:
        rows = read_json(RESULTS)
    done = {(row["cell"], row["seed"]) for row in rows}
    for seed in map(int, arguments.seeds.split(",")):
        for cell in arguments.cells.split(","):
            if (cell, seed) not in done:
                rows.append(run_cell(arguments.data, cell, seed, arguments.set))
                write_json(RESULTS, rows)
    table = Table(title="Ten hospitals, size-skew, one row a run")
    columns = ["cell", "seed", "epsilon", "test_accuracy", "test_macro_f1", "wall_s"]
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(json.dumps(row[c]) for c in columns))
    Console().print(table)


if __name__ == "__main__":
    main()

"""What merged task vectors reach, beside single hospitals, FedAvg and centralised training.

    python -m benchmarks.vectors --data bloodmnist.npz [--epochs 10] [--seeds 0,1,2]
        [--bases public,none] [--partitions size-skew,dirichlet] [--fresh]

Ten hospitals, DPResNet at width 0.25, no privacy, the same total compute for every method: each
image is passed ``epochs`` times. One cell is a partition, a base and a seed; a cell that is in
``benchmarks/results/vectors.json`` is not run again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tables import show_table, spread
from benchmarks.vectors.methods import BASES, base_of, centralised, federated_last, merged, repeated
from benchmarks.vectors.world import Workers, config_of
from common.files import read_json, write_json

RESULTS = Path(__file__).parents[1] / "results" / "vectors.json"
KEY = ("partition", "base", "seed", "epochs")
FIGURES = ("test_accuracy", "test_macro_f1", "val_accuracy")
METHODS = {"fedavg": federated_last, "asynchronous": repeated, "centralised": centralised}
Row = dict[str, Any]


def main() -> None:
    """Run what is missing, keep it cell by cell, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="an npz file in MedMNIST's form; else synthetic")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--bases", default=",".join(BASES))
    parser.add_argument("--partitions", default="size-skew,dirichlet")
    parser.add_argument("--methods", default=",".join(("merged", *METHODS)))
    parser.add_argument("--base-epochs", type=int, default=40, help="of the public base")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    parser.add_argument("--markdown", action="store_true", help="print the kept table, run nothing")
    arguments = parser.parse_args()
    if arguments.markdown:
        show_table(table_of(read_json(arguments.out)), markdown=True)
        return
    rows: list[Row] = []
    if arguments.out.exists() and not arguments.fresh:
        rows = read_json(arguments.out)
    workers = Workers()
    try:
        for base in arguments.bases.split(","):
            for seed in map(int, arguments.seeds.split(",")):
                for partition in arguments.partitions.split(","):
                    cell = {"partition": partition, "base": base, "seed": seed,
                            "epochs": arguments.epochs}  # fmt: skip
                    if all(present(rows, cell, m) for m in arguments.methods.split(",")):
                        continue
                    started = time.monotonic()
                    rows += run_cell(workers, arguments, cell, rows)
                    write_json(arguments.out, rows)
                    print(cell, f"{time.monotonic() - started:.0f} s", flush=True)
    finally:
        workers.close()
    show_table(table_of(rows))


def present(rows: Sequence[Row], cell: Row, method: str) -> bool:
    """Whether a cell's rows of a method are there; ``merged`` stands for the base, the single
    hospitals, every rule and the ensemble."""
    name = "merged: mean" if method == "merged" else method
    return any(r["method"] == name and all(r[k] == cell[k] for k in KEY) for r in rows)


def run_cell(
    workers: Workers, arguments: argparse.Namespace, cell: Row, known: Sequence[Row]
) -> list[Row]:
    """The asked methods that a cell lacks; centralised training is the same for all partitions."""
    config = config_of(arguments.data, cell["partition"], cell["seed"])
    base = base_of(workers, config, cell["base"], arguments.base_epochs)
    found: dict[str, Row] = {}
    for method in arguments.methods.split(","):
        if present(known, cell, method):
            continue
        elsewhere = [r for r in known if r["method"] == method == "centralised"
                     and all(r[k] == cell[k] for k in KEY if k != "partition")]  # fmt: skip
        if elsewhere:
            found[method] = {k: elsewhere[0][k] for k in FIGURES}
        elif method == "merged":
            found |= merged(workers, config, base, arguments.epochs)
        else:
            found[method] = METHODS[method](workers, config, base, arguments.epochs).row()
    return [{**cell, "method": method, **figures} for method, figures in found.items()]


def table_of(rows: list[Row]) -> list[list[str]]:
    """Test accuracy in %, mean ± sd over the seeds: a head, then a line for each method."""
    columns = sorted({(r["base"], r["partition"]) for r in rows}, reverse=True)
    lines = [["method", *(f"{base} base, {partition}" for base, partition in columns)]]
    for method in dict.fromkeys(r["method"] for r in rows):
        line = [method]
        for base, partition in columns:
            values = [
                r["test_accuracy"] for r in rows
                if (r["method"], r["base"], r["partition"]) == (method, base, partition)
            ]  # fmt: skip
            line.append(f"{spread(values)} (n={len(values)})" if values else "–")
        lines.append(line)
    return lines


if __name__ == "__main__":
    main()

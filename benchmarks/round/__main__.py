"""The command: ``python -m benchmarks.round``.

    python -m benchmarks.round                                          # one process; minutes
    python -m benchmarks.round --prior prior.safetensors --cells prior --rounds 12
    python -m benchmarks.round --places simulation,processes --cells local-0.25

Results are kept row by row in ``benchmarks/results/round.json``; a row is measured anew each time
that it is asked for.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np

from benchmarks.machine import bandwidth, durable_write, flops, hashing
from benchmarks.measure import environment
from benchmarks.round import places
from benchmarks.round.figures import Row, rounds_of, shares
from benchmarks.round.model import model_figures
from benchmarks.tables import show_table
from common.files import read_json, write_json

RESULTS = Path(__file__).resolve().parents[1] / "results" / "round.json"
CELLS: dict[str, dict[str, Any]] = {
    f"{privacy}-{width:g}": {"privacy": privacy, "model-width": width, "secagg": True}
    for width in (0.25, 1.0)
    for privacy in ("none", "local")
}
PRIOR = "prior"
T = TypeVar("T")
KEY = ("place", "cell", "hospitals", "source", "images", "local_epochs")


def values_of(arguments: argparse.Namespace, cell: str) -> dict[str, Any]:
    """The run config of one cell."""
    values: dict[str, Any] = {"dataset": "synthetic", "synthetic-size": arguments.images}
    if arguments.data:
        values = {"dataset": "npz", "data-path": str(arguments.data.resolve())}
    values |= {"rounds": arguments.rounds, "local-epochs": arguments.local_epochs}
    if cell != PRIOR:
        return values | CELLS[cell]
    if arguments.prior is None:
        raise SystemExit("cell prior needs a prior: give --prior FILE (of `consilium prior`)")
    return values | {
        "recipe": "prior-distributed",
        "base": str(arguments.prior.resolve()),
        "min-cohort": arguments.hospitals,
    }


def measured(arguments: argparse.Namespace, place: str, cell: str) -> Row:
    """One run; its row: medians over its rounds but the first (two with a prior) and the last.

    The first calibrate noise and compute features; the last is the one that is profiled.
    """
    values, started = values_of(arguments, cell), time.monotonic()
    if place != "inprocess":
        values["rounds"] = max(3, int(values["rounds"]))  # two, and the first
    row: Row = {
        "place": place, "cell": cell, "hospitals": arguments.hospitals,
        "images": count_of(arguments.data) if arguments.data else arguments.images,
        "source": "npz" if arguments.data else "synthetic",
        "local_epochs": arguments.local_epochs,
    }  # fmt: skip
    profile, limit = place == "inprocess" and not arguments.no_profile, arguments.limit
    try:
        if place == "inprocess":
            spans, more = places.in_process(
                values, arguments.hospitals, profile=profile, limit=limit
            )
        elif place == "simulation":
            spans, more = places.simulation(values, arguments.hospitals, limit=limit)
        else:
            spans, more = places.processes(values, arguments.hospitals, limit=limit)
    except places.NotRun as error:
        return row | {"error": str(error)}
    rounds = rounds_of(spans)
    skip = 3 if cell == PRIOR else 1
    row |= shares(spans, counted(rounds, skip=skip, profiled=profile)) | more
    if "cpu_s_all" in row:
        row["cpu_s"] = median(counted(row["cpu_s_all"], skip=skip, profiled=profile))
        row["cpu_share_not_training"] = round(1 - row["train_cpu_s"] / row["cpu_s"], 4)
    row |= model_figures(values, row)
    return row | {"machine": bounds(), "run_s": round(time.monotonic() - started, 1)}


def count_of(data: Path) -> int:
    """Pictures of all splits in an npz file of MedMNIST's form."""
    with np.load(data, allow_pickle=False) as file:
        return sum(len(file[name]) for name in file.files if name.endswith("_labels"))


def counted(rounds: Sequence[T], *, skip: int, profiled: bool) -> Sequence[T]:
    """The rounds of which medians are taken; all of them where too few are left."""
    kept = rounds[skip : len(rounds) - profiled]
    return kept or rounds


def bounds() -> dict[str, Any]:
    """What this machine reaches at most, measured now, beside the row."""
    return {
        **environment(),
        "memory_gb_per_s": round(bandwidth(4_802_120), 2),
        "gflop_per_s_one_thread": round(_one_thread(), 1),
        "sha256_gb_per_s": round(hashing(), 2),
        "durable_write_ms": round(durable_write(RESULTS.parent), 2),
    }


def _one_thread() -> float:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return flops()
    finally:
        torch.set_num_threads(before)


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A head, then a line a row."""
    lines = [["place", "cell", "hospitals", "pictures", "number", "s a round", "training",
              "validation",
              "test", "rest", "not training", "of CPU s", "not training", "GFLOP/s"]]  # fmt: skip
    for row in rows:
        head = [str(row[k]) for k in KEY[:-1]]
        if "error" in row:
            lines.append([*head, "could not be run", *[""] * 8])
            continue
        seconds = [f"{row[f'{part}_s']:.2f}" for part in ("wall", "train", "validate", "test")]
        cpu = (
            [f"{row['cpu_s']:.2f}", f"{100 * row['cpu_share_not_training']:.1f} %"]
            if "cpu_s" in row
            else ["–", "–"]
        )
        reached = row.get("training_gflop_per_s")
        lines.append(
            [*head, *seconds, f"{row['rest_s']:.2f}", f"{100 * row['share_not_training']:.1f} %",
             *cpu, "–" if reached is None else f"{reached:.0f}"]
        )  # fmt: skip
    return lines


def main() -> None:
    """Measure the cells that are asked for, keep each, print the kept table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", default=",".join(CELLS), help=f"of {', '.join(CELLS)}, {PRIOR}")
    parser.add_argument("--places", default="inprocess", help="inprocess,simulation,processes")
    parser.add_argument("--hospitals", type=int, default=10)
    parser.add_argument("--images", type=int, default=2000, help="synthetic ones, 6/10 to train on")
    parser.add_argument("--data", type=Path, help="an npz file in MedMNIST's form; else synthetic")
    parser.add_argument("--prior", type=Path, help="a file of `consilium prior`, for cell prior")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--local-epochs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that a cell may take")
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="print the kept table, run nothing")
    arguments = parser.parse_args()
    rows: list[Row] = read_json(arguments.out) if arguments.out.exists() else []
    if not arguments.markdown:
        for place in arguments.places.split(","):
            for cell in arguments.cells.split(","):
                row = measured(arguments, place, cell)
                rows = [r for r in rows if any(r.get(k) != row[k] for k in KEY)] + [row]
                write_json(arguments.out, rows)
                print(row.get("error") or table([row])[1], flush=True)
    show_table(table(rows), markdown=arguments.markdown)


if __name__ == "__main__":
    main()

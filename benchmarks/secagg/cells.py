"""Cells: both protocols on one case, repeated; each result is kept, and not measured again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.measure import CpuClock, OverTime, environment
from benchmarks.secagg.case import Case
from benchmarks.secagg.figures import Measured, Row, figures_of, medians, ratio
from benchmarks.secagg.ours import run_ours
from benchmarks.secagg.stock import run_stock
from common.files import read_json, write_json

REPEAT_WITHIN = 120.0
"""A cell is repeated only while that is expected to end within so many wall seconds."""

PROTOCOLS: dict[str, Callable[[Case, CpuClock], Measured]] = {
    "ours": run_ours,
    "stock": run_stock,
}


def measure(case: Case, *, repeat: int = 1, limit: float = float("inf")) -> Row:
    """Run both protocols in turn, ``repeat`` times, and take medians (of errors: the largest).

    ``limit``: wall seconds for all of it. A protocol that fails, or has not finished once by
    then, has no figures; the row's ``error`` says why.
    """
    started = time.monotonic()
    exact = list(case.exact().values())
    runs: dict[str, list[Row]] = {name: [] for name in PROTOCOLS}
    errors: dict[str, str] = {}
    for done in range(repeat):
        elapsed = time.monotonic() - started
        if done and elapsed * (done + 1) / done > min(REPEAT_WITHIN, limit):
            break
        for name, run in PROTOCOLS.items():
            if name in errors:
                continue
            clock = CpuClock(limit - (time.monotonic() - started))
            try:
                runs[name].append(figures_of(case, run(case, clock), exact))
            except OverTime:
                if not runs[name]:
                    errors[name] = f"left out: the cell took over {limit:g} s"
            except Exception as error:  # the benchmark goes on with the other protocol
                errors[name] = f"{type(error).__name__}: {error}"
    row: Row = {
        "hospitals": case.hospitals,
        "parameters": case.parameters,
        "dropouts": case.dropouts,
        "num_shares": case.num_shares,
        "threshold": case.threshold,
        "repeats": min(map(len, runs.values())),
    }
    for name, figures in runs.items():
        row |= {f"{name}_{key}": value for key, value in medians(figures).items()}
    row["max_error"] = row.pop("ours_max_error")
    row["ratio_cpu"] = ratio(row["ours_cpu_s"], row["stock_cpu_s"])
    row["ratio_cpu_without_fedavg"] = ratio(row["ours_cpu_s"], row["stock_cpu_without_fedavg_s"])
    row["ratio_bytes_up"] = ratio(row["ours_bytes_up"], row["stock_bytes_up"])
    row["error"] = "; ".join(f"{name}: {what}" for name, what in errors.items()) or None
    row["environment"] = environment()
    return row


def key_of(row: Mapping[str, Any]) -> tuple[int, ...]:
    """What makes two rows one cell."""
    fields = ("parameters", "num_shares", "threshold", "hospitals", "dropouts")
    return tuple(row[field] for field in fields)


def run_cells(
    cases: Sequence[Case], out: Path, *, repeat: int, limit: float, fresh: bool, console: Console
) -> list[Row]:
    """Measure what ``out`` does not hold yet (or holds with an error), saved cell by cell."""
    rows: dict[tuple[int, ...], Row] = {}
    if out.exists() and not fresh:
        rows = {key_of(row): row for row in read_json(out)}
    missing = [c for c in cases if rows.get(key_of(vars(c)), {"error": ""})["error"] is not None]
    if missing:
        # Imports, caches and the allocator's thresholds: otherwise the first cell pays for them.
        measure(min(missing, key=lambda case: case.hospitals), limit=limit)
    for case in missing:
        key = key_of(vars(case))
        started = time.monotonic()
        rows[key] = measure(case, repeat=repeat, limit=limit)
        write_json(out, [rows[k] for k in sorted(rows)])
        console.print(
            f"{case.hospitals} hospitals, {case.dropouts} dropped: "
            f"{rows[key]['repeats']} × in {time.monotonic() - started:.0f} s"
            + (f"; {rows[key]['error']}" if rows[key]["error"] else "")
        )
    return [rows[key_of(vars(case))] for case in cases]

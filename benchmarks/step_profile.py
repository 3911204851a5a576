"""Where the time of a training step goes, with what the machine reaches at most beside it.

    python -m benchmarks.step_profile
    python -m benchmarks.step_profile --markdown        # the kept table

For the plain step and ours in each dtype: torch's operators by the time that is spent in
themselves, and the arithmetic reached, as if each image cost three forward passes (what the plain
step computes). One thread. Kept in ``benchmarks/results/step_profile.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.dp_step import METHODS, OPACUS, Step, prepared
from benchmarks.machine import bandwidth, flops
from benchmarks.measure import environment
from benchmarks.round.model import multiply_adds
from benchmarks.tables import show_table
from common.files import write_json
from common.model import ModelSpec, build

RESULTS = Path(__file__).parent / "results" / "step_profile.json"
TOP = 8
"""Operators that a row names."""
Row = dict[str, Any]


def operators(step: Step) -> list[dict[str, Any]]:
    """The operators in which one call of ``step`` spends most, largest first.

    Time in an operator is without the operators that it calls; ``share`` is of all of them. What
    Python does between operators is in none.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        step()
    events = sorted(found.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [
        {
            "operator": event.key,
            "calls": event.count,
            "ms": round(event.self_cpu_time_total / 1e3, 2),
            "share": round(event.self_cpu_time_total / total, 3),
        }
        for event in events[:TOP]
    ]


def measure(method: str, dtype: str, width: float, batch: int, repeats: int) -> Row:
    """A row: the step's median time, GFLOP/s and costliest operators."""
    step, seconds = prepared(method, dtype, width, batch), []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])  # the first warms up
    work = 6 * multiply_adds(build(ModelSpec(width=width)), torch.zeros(3, 28, 28)) * batch
    return {
        "method": method, "dtype": dtype, "width": width, "batch": batch, "threads": 1,
        "step_ms": round(1e3 * median, 1), "gflop_per_s": float(f"{work / median / 1e9:.3g}"),
        "operators": operators(step),
    }  # fmt: skip


def bounds() -> dict[str, float]:
    """One thread's arithmetic in both dtypes, and its way to memory."""
    return {
        "gflop_per_s_float32": round(flops(), 1),
        "gflop_per_s_bfloat16": round(flops(dtype=torch.bfloat16), 1),
        "memory_gb_per_s": round(bandwidth(4_802_120), 2),
    }


def show(kept: dict[str, Any], *, markdown: bool = False) -> None:
    """Print what the rows have reached, and their operators."""
    lines = [["width", "batch", "method", "ms", "GFLOP/s", "where the time goes"]]
    for row in kept["rows"]:
        parts = [f"{op['operator']} {100 * op['share']:.0f} %" for op in row["operators"]]
        lines.append([
            f"{row['width']:g}", str(row["batch"]), f"{row['method']}, {row['dtype']}",
            f"{row['step_ms']:.0f}", f"{row['gflop_per_s']:.0f}", ", ".join(parts),
        ])  # fmt: skip
    show_table(lines, markdown=markdown)
    print(kept["machine"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", default="0.25,1", help="by commas")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="print the kept table only")
    args = parser.parse_args(arguments)
    if not args.markdown:
        torch.set_num_threads(1)
        methods = [case for case in METHODS if case[0] not in OPACUS]
        rows = [
            measure(*case, width, args.batch, args.repeats)
            for width in map(float, args.widths.split(","))
            for case in methods
        ]
        write_json(args.out, {"machine": {**environment(), **bounds()}, "rows": rows})
    show(json.loads(args.out.read_text()), markdown=args.markdown)


if __name__ == "__main__":
    main()

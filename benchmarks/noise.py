"""What secure noise costs: ours beside torch's generator, which no privacy may rest on.

    python -m benchmarks.noise

Prints a table and writes ``benchmarks/results/noise.json``. In each repeat all cases run one
after the other, so that a busy machine slows all of them; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import environment
from common.files import write_json
from common.privacy.gaussian import GaussianSum
from common.privacy.randomness import SecureRandom

RESULTS = Path(__file__).parent / "results" / "noise.json"
SIGMA, CLIP = 1.0, 1.0


def cases(n: int) -> dict[str, tuple[str, Callable[[], object]]]:
    """Name → (the case that it is weighed against, what is timed); each makes ``n`` values."""
    stream = SecureRandom()
    single, double = torch.zeros(n), torch.zeros(n, dtype=torch.float64)
    mechanism = GaussianSum(SIGMA, CLIP, n)
    bare, added = "torch.randn", "torch.randn, times σC, added"
    return {
        bare: (bare, lambda: torch.randn(n)),
        added: (added, lambda: torch.randn(n).mul_(SIGMA * CLIP).add_(single)),
        "SecureRandom.normal": (bare, lambda: stream.normal((n,), SIGMA * CLIP)),
        "SecureRandom.normal, added": (
            added,
            lambda: stream.normal((n,), SIGMA * CLIP).add_(single),
        ),
        "GaussianSum.release of float32": (added, lambda: mechanism.release(single, stream)),
        "GaussianSum.release of float64": (added, lambda: mechanism.release(double, stream)),
    }


def measure(n: int, threads: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each case: median seconds for ``n`` values, and the ratio to its yardstick."""
    torch.set_num_threads(threads)
    timed = cases(n)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for repeat in range(repeats + 1):
        for name, (_, run) in timed.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(all_) for name, all_ in seconds.items()}
    return [
        {
            "case": name, "threads": threads, "values": n,
            "median_s": round(median[name], 5), "min_s": round(min(seconds[name]), 5),
            "against": against, "ratio": round(median[name] / median[against], 2),
            "repeats": repeats,
        }
        for name, (against, _) in timed.items()
    ]  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(title=f"Gaussian noise, {rows[0]['values']:,} values, median")
    for column in ("threads", "case", "ms", "ratio", "against"):
        table.add_column(
            column, justify="right" if column in ("threads", "ms", "ratio") else "left"
        )
    for row in rows:
        table.add_row(
            str(row["threads"]), row["case"], f"{1000 * row['median_s']:.1f}",
            f"{row['ratio']:.2f}", row["against"],
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--values", type=int, default=5_000_000)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--threads", default="1,2", help="numbers of threads, by commas")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for threads in map(int, args.threads.split(",")):
        rows += measure(args.values, threads, args.repeats)
    show(rows)
    write_json(args.out, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()

"""Time to accuracy under stragglers: task vectors whenever they come, beside synchronous rounds.

    python -m benchmarks.vectors.asynchronous --data bloodmnist.npz [--seeds 0,1,2] [--rounds 10]

Training is real, waiting is on a simulated clock (:mod:`benchmarks.vectors.clock`). Ten hospitals
that start from the same public base; one takes ten times as long, another is off half of the time
(beside it: no straggler, to see what is lost then). A synchronous round waits for all. Beside it
stands a round that waits for eight of ten (the quorum) and leaves the slowest out for good.
``speedup``: the time of the rounds over that of the vectors, to the accuracy (on the hospitals' own
validation images) that both reach; figures on the test split stand beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.vectors.clock import Asynchronous, Hospital
from benchmarks.vectors.methods import base_of, federated
from benchmarks.vectors.world import HOSPITALS, Figures, Workers, config_of, sizes
from common.config import RunConfig
from common.files import read_json, write_json

RESULTS = Path(__file__).parents[1] / "results" / "async.json"
SLOW, OFF = 0, 1
QUICK = round(0.8 * HOSPITALS)
PUBLISH_EVERY = QUICK
"""Vectors for a new base. Five (the default: half of the hospitals) made the first bases of the
smallest hospitals alone; chosen on the hospitals' validation images with seed 0."""
SETTINGS: dict[str, tuple[float, float]] = {
    "one 10x slower, one off half of the time": (10.0, 10.0),
    "no straggler": (1.0, 0.0),
}
"""Name → (slowness of one hospital, how long another is off at a time)."""
LEVEL = 0.92
"""An accuracy on the way to the best: the last half point is learned while rates fall."""
Curve = list[tuple[float, Figures]]
"""(time, figures of the model that is there from then on)."""


def hospitals_of(setting: str) -> list[Hospital]:
    """The ten hospitals of a setting."""
    slowness, away = SETTINGS[setting]
    made = [Hospital(i) for i in range(HOSPITALS)]
    made[SLOW] = Hospital(SLOW, slowness=slowness)
    made[OFF] = Hospital(OFF, away=away)
    return made


def synchronous(
    config: RunConfig, hospitals: Sequence[Hospital], found: Sequence[Figures], among: Sequence[int]
) -> Curve:
    """When each round would have ended; what it learned does not hang on the clock."""
    count = sizes(config)
    mean, now, curve = sum(count) / len(count), 0.0, []
    for figures in found:
        now = max(hospitals[i].finish(now, count[i] / mean) for i in among)
        curve.append((now, figures))
    return curve


def reached(curve: Curve, accuracy: float) -> float | None:
    """When the validation accuracy was first that high."""
    return next((now for now, f in curve if f.val_accuracy >= accuracy), None)


def best(curve: Curve) -> float:
    """The highest validation accuracy of a curve."""
    return max(f.val_accuracy for _, f in curve)


def run_seed(
    workers: Workers, data: Path | None, seed: int, rounds: int, partition: str
) -> list[dict[str, Any]]:
    """Every setting with one seed."""
    config = config_of(data, partition, seed)
    base = base_of(workers, config, "public", 40)
    everybody = list(range(HOSPITALS))
    rows = []
    rounds_of_all = federated(workers, config, base, rounds)
    without: dict[tuple[int, ...], list[Figures]] = {}
    for setting in SETTINGS:
        hospitals = hospitals_of(setting)
        ends = sorted(everybody, key=lambda i: hospitals[i].finish(0, sizes(config)[i]))
        quick = tuple(sorted(ends[:QUICK]))
        if quick not in without:
            without[quick] = federated(workers, config, base, rounds, quick)
        waits = synchronous(config, hospitals, rounds_of_all, everybody)
        quorum = synchronous(config, hospitals, without[quick], quick)
        clock = Asynchronous(
            workers, config, hospitals, passes=1, publish_every=PUBLISH_EVERY,
            until=1.5 * quorum[-1][0] + 5,
        )  # fmt: skip
        arrivals: Curve = [(a.time, a.figures) for a in clock.run(base)]
        for peer, curve in (("all", waits), ("eight of ten", quorum)):
            level = min(best(curve), best(arrivals))
            ours, theirs = reached(arrivals, level), reached(curve, level)
            assert ours is not None and theirs is not None
            rows.append(
                {
                    "setting": setting, "synchronous": peer, "partition": partition, "seed": seed,
                    "clock": "simulated", "accuracy": level, "time": ours,
                    "time_synchronous": theirs, "speedup": theirs / ours,
                    "test_accuracy": arrivals[-1][1].test_accuracy,
                    "test_accuracy_synchronous": curve[-1][1].test_accuracy,
                    "curve": points(arrivals), "curve_synchronous": points(curve),
                }
            )  # fmt: skip
    return rows


def points(curve: Curve) -> list[tuple[float, float, float]]:
    """(time, validation accuracy, test accuracy), for a picture."""
    return [(round(t, 3), round(f.val_accuracy, 4), round(f.test_accuracy, 4)) for t, f in curve]


def main() -> None:
    """Run what is missing, keep it seed by seed, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="an npz file in MedMNIST's form; else synthetic")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--partitions", default="size-skew")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="forget earlier rows")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if arguments.out.exists() and not arguments.fresh:
        rows = read_json(arguments.out)
    done = {(r["partition"], r["seed"]) for r in rows if r["clock"] == "simulated"}
    workers = Workers()
    try:
        for seed in map(int, arguments.seeds.split(",")):
            for partition in arguments.partitions.split(","):
                if (partition, seed) in done:
                    continue
                started = time.monotonic()
                rows += run_seed(workers, arguments.data, seed, arguments.rounds, partition)
                write_json(arguments.out, rows)
                print(partition, seed, f"{time.monotonic() - started:.0f} s", flush=True)
    finally:
        workers.close()
    show(rows)


def speedup_to(row: dict[str, Any], accuracy: float) -> float | None:
    """The ratio of times to ``accuracy`` on validation images; None where one did not reach it."""
    times = [
        next((point[0] for point in row[curve] if point[1] >= accuracy), None)
        for curve in ("curve", "curve_synchronous")
    ]
    return times[1] / times[0] if times[0] and times[1] else None


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Medians over the seeds: to the best that both reach, and to :data:`LEVEL` on the way."""
    table = Table("setting", "rounds wait for", "clock", "n", "speed-up", "to accuracy",
                  f"to {100 * LEVEL:g} %")  # fmt: skip
    for key in dict.fromkeys((r["setting"], r["synchronous"], r["clock"]) for r in rows):
        same = [r for r in rows if (r["setting"], r["synchronous"], r["clock"]) == key]
        low, high = min(r["speedup"] for r in same), max(r["speedup"] for r in same)
        middle = np.median([r["speedup"] for r in same])
        level = np.mean([r["accuracy"] for r in same])
        on_the_way = [s for r in same if (s := speedup_to(r, LEVEL)) is not None]
        table.add_row(*key, str(len(same)), f"{middle:.1f} ({low:.1f}–{high:.1f})",
                      f"{100 * level:.1f} %",
                      f"{np.median(on_the_way):.1f}" if on_the_way else "–")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()

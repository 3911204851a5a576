"""How far it goes: 1 to 99 million parameters, 5 to 1000 hospitals, phases and memory apart.

    python -m benchmarks.secagg.scale
    python -m benchmarks.secagg.scale --parameters 4802120 --hospitals 100 --no-peers

One round of ours a cell: the server in a process of its own, the hospitals one after the other in
this one, each with an update that is drawn when its turn comes. Rows are kept in
``benchmarks/results/secagg_scale.json``; a cell that is there is not run again (``--fresh``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import bandwidth, peak_rss
from benchmarks.measure import CpuClock, OverTime, environment
from benchmarks.secagg.case import RANGE, Case
from benchmarks.secagg.ours import Hospital, binding_of, identity_of
from benchmarks.secagg.seat import Seat, sampled, seat, unwire, wire
from benchmarks.tables import show_table
from common.aggregation import flatten
from common.files import read_json, write_json

RESULTS = Path(__file__).resolve().parents[1] / "results" / "secagg_scale.json"
STAGES = ("advertise", "share", "masked", "consistency", "unmask")
PARAMETERS = (1_000_000, 4_802_120, 25_000_000, 99_000_000)
"""The last: a hospital's policy lets 100 million values through, the weight among them."""
HOSPITALS = (5, 10, 50, 100, 1000)
RING_BYTES = 4
"""Of one value under the default 32-bit ring, masked or summed."""
PEER_BYTES = 8_000_000_000
"""Stock SecAgg+ holds 16 bytes a value and hospital: above this it is not tried."""
Row = dict[str, Any]


def measure(case: Case, *, records: bool = False, limit: float = float("inf")) -> Row:
    """One round; CPU seconds by side and phase, wall seconds, and the server's memory.

    ``server_collecting_mb`` is what the server's process grew by, above its state before the round,
    until all masked vectors were in, ``server_peak_mb`` until the end, with the sum decoded to
    float64. ``bound_mb``: the sum, and one vector that comes in.
    OverTime after ``limit`` wall seconds; RuntimeError for a sum that is not the hospitals'.
    """
    started, clock = time.monotonic(), CpuClock(limit)
    chosen = sampled(case.parameters)
    exact = np.zeros(len(chosen))
    roster = {name: identity_of(name).public for name in case.names}
    hospitals = {name: Hospital(name, roster, clock) for name in case.names}
    with seat(case, records=records) as server:
        message: Mapping[str, bytes] | bytes = binding_of(case).to_bytes()
        sent = False
        for stage in STAGES:
            for name, hospital in hospitals.items():
                question = message if isinstance(message, bytes) else message[name]
                if stage == "masked":
                    exact += _encoded(case, name, hospital)[chosen]
                _answer(server, hospital, stage, question, records and sent, clock)
            if stage != STAGES[-1]:
                message, sent = server.close_stage(stage), True
        told = server.finish()
        base = server.base_mb
    weight = sum(map(case.weight, case.names))
    error = float(np.max(np.abs(np.array(told["mean"]) - exact / weight))) / RANGE
    if told["weight"] != weight or error > 1e-3:
        raise RuntimeError(f"the sum is not the hospitals': {told['weight']}, {error}")
    spent: defaultdict[str, float] = defaultdict(float)
    for (_, phase), seconds in clock.seconds.items():
        spent[f"hospitals.{phase}"] += seconds
    spent |= {f"server.{phase}": seconds for phase, seconds in told["cpu"].items()}
    ring = RING_BYTES * case.parameters / 1e6
    return {
        "wall_s": time.monotonic() - started,
        "hospital_cpu_s": sum(clock.seconds.values()) / case.hospitals,
        "server_cpu_s": sum(told["cpu"].values()),
        "phases_s": dict(spent),
        "max_error": error,
        "server_base_mb": base,
        "server_collecting_mb": told["collected_mb"] - base,
        "server_peak_mb": told["peak_mb"] - base,
        "bound_mb": 2 * ring,
        "all_vectors_mb": case.hospitals * ring,
        "hospitals_peak_mb": peak_rss(),
    }


def _encoded(case: Case, name: str, hospital: Hospital) -> np.ndarray:
    """Encode the update of ``name``; returns it, weighted, for the exact sum."""
    update, weight = case.update(name), case.weight(name)
    hospital.encode(update, weight)
    return weight * flatten(update)


def _answer(
    server: Seat, hospital: Hospital, stage: str, question: bytes, records: bool, clock: CpuClock
) -> None:
    if records:
        question = unwire(question)
    with clock.on(hospital.name, stage):
        answer = getattr(hospital, stage)(question)
    server.collect(stage, hospital.name, wire(answer) if server.records else answer)


def peer(case: Case, limit: float) -> Row:
    """Stock SecAgg+ on the same case, server and hospitals in one process: CPU and peak memory."""
    if 16 * case.parameters * case.hospitals > PEER_BYTES:
        return {"stock_error": "left out: it would hold all masked vectors, over 8 GB"}
    command = [sys.executable, "-m", "benchmarks.secagg.scale", "--stock"]
    asked = json.dumps({"parameters": case.parameters, "hospitals": case.hospitals})
    try:
        done = subprocess.run(
            [*command, asked], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"stock_error": f"left out: it took over {limit:g} s"}
    if done.returncode:
        return {"stock_error": (done.stderr.strip().splitlines() or ["?"])[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_stock_here(asked: str) -> None:
    """The peer's child process: one round of stock SecAgg+, told as JSON."""
    from benchmarks.secagg.stock import run_stock

    before, started, clock = peak_rss(), time.monotonic(), CpuClock()
    run_stock(Case(dropouts=0, **json.loads(asked)), clock)
    print(json.dumps({
        "stock_cpu_s": sum(clock.seconds.values()), "stock_wall_s": time.monotonic() - started,
        "stock_peak_mb": peak_rss() - before,
    }))  # fmt: skip


def expected(rows: Sequence[Row], case: Case) -> float:
    """Wall seconds that a cell will take, from kept rows of as many hospitals, or as long vectors.

    0 where nothing is known. Time grows with either by no more than in proportion, but for the
    cohort's own cost, which grows with its square.
    """
    done = [r for r in rows if r.get("error") is None]
    longer = [
        r["wall_s"] * case.parameters / r["parameters"]
        for r in done
        if r["hospitals"] == case.hospitals and r["parameters"] <= case.parameters
    ]
    wider = [
        r["wall_s"] * case.hospitals / r["hospitals"]
        for r in done
        if r["parameters"] == case.parameters and r["hospitals"] <= case.hospitals
    ]
    return min(longer[-1:] + wider[-1:], default=0.0)


def run_cell(case: Case, rows: Sequence[Row], *, limit: float, peers: bool) -> Row:
    """The row of a cell, or why it has none."""
    row: Row = {
        "parameters": case.parameters, "hospitals": case.hospitals,
        "num_shares": case.num_shares, "threshold": case.threshold, "error": None,
    }  # fmt: skip
    guess = expected(rows, case)
    if guess > 2 * limit:  # a guess: short of that, it is tried
        return row | {"error": f"left out: about {guess:.0f} s, more than {limit:g} s"}
    try:
        row |= measure(case, limit=limit)
    except OverTime:
        return row | {"error": f"left out: it took over {limit:g} s"}
    except (RuntimeError, MemoryError) as error:
        return row | {"error": f"{type(error).__name__}: {error}"}
    if peers:
        row |= peer(case, limit)
    speed = bandwidth(case.parameters)
    adding = 3 * RING_BYTES * case.parameters * case.hospitals / speed / 1e9
    return row | {
        "memory_gb_per_s": speed,
        "adding_bound_s": adding,
        "environment": environment(),
    }


def table(rows: Sequence[Row]) -> list[list[str]]:
    """What a round came to: a head, then a line a cell."""
    lines = [["parameters", "hospitals", "wall s", "a hospital: CPU s", "server: CPU s",
              "adding, bound s", "server MB: collecting", "bound", "decoding", "all vectors MB",
              "stock CPU s", "stock MB"]]  # fmt: skip
    for row in rows:
        head = [f"{row['parameters']:,}", str(row["hospitals"])]
        if row["error"] is not None:
            lines.append([*head, row["error"], *[""] * 9])
            continue
        stock = ["–", "–"]
        if row.get("stock_cpu_s") is not None:
            stock = [f"{row['stock_cpu_s']:.1f}", f"{row['stock_peak_mb']:.0f}"]
        lines.append(
            [*head, f"{row['wall_s']:.1f}", f"{row['hospital_cpu_s']:.3f}",
             f"{row['server_cpu_s']:.2f}", f"{row['adding_bound_s']:.2f}",
             f"{row['server_collecting_mb']:.0f}", f"{row['bound_mb']:.0f}",
             f"{row['server_peak_mb']:.0f}", f"{row['all_vectors_mb']:.0f}", *stock]
        )  # fmt: skip
    return lines


def phases(rows: Sequence[Row]) -> list[list[str]]:
    """CPU seconds by phase, one hospital's / the server's; encoding is in the masked phase."""
    lines = [["parameters", "hospitals", *STAGES, "server: decode"]]
    for row in rows:
        if row["error"] is not None:
            continue
        spent, n = row["phases_s"], row["hospitals"]
        each = {stage: spent[f"hospitals.{stage}"] / n for stage in STAGES}
        each["masked"] += (spent["hospitals.encode"] + spent["hospitals.keep"]) / n
        both = [f"{each[stage]:.3f} / {spent[f'server.{stage}']:.2f}" for stage in STAGES]
        lines.append(
            [f"{row['parameters']:,}", str(n), *both, f"{spent['server.decode']:.2f}"]
        )  # fmt: skip
    return lines


def main() -> None:
    """Measure what is missing, keep it cell by cell, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", default=",".join(map(str, PARAMETERS)))
    parser.add_argument("--hospitals", default=",".join(map(str, HOSPITALS)))
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a cell may take")
    parser.add_argument("--no-peers", action="store_true", help="without stock SecAgg+ beside it")
    parser.add_argument("--fresh", action="store_true", help="measure what is kept anew")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="print the kept table, run nothing")
    parser.add_argument("--stock", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stock:
        return run_stock_here(arguments.stock)
    rows: list[Row] = read_json(arguments.out) if arguments.out.exists() else []
    cells = [
        Case(parameters=int(parameters), hospitals=int(hospitals), dropouts=0)
        for parameters in arguments.parameters.split(",")
        for hospitals in arguments.hospitals.split(",")
    ]
    for case in [] if arguments.markdown else cells:
        kept = [r for r in rows if _key(r) == (case.parameters, case.hospitals)]
        if kept and kept[0]["error"] is None and not arguments.fresh:
            continue
        others = [r for r in rows if r not in kept]
        row = run_cell(case, others, limit=arguments.limit, peers=not arguments.no_peers)
        rows = sorted([*others, row], key=_key)
        write_json(arguments.out, rows)
        print(table([row])[1], flush=True)
    show_table(table(rows), markdown=arguments.markdown)
    show_table(phases(rows), markdown=arguments.markdown)
    return None


def _key(row: Row) -> tuple[int, int]:
    return int(row["parameters"]), int(row["hospitals"])


if __name__ == "__main__":
    main()

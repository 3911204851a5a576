"""Peak memory of a hospital's training, and of the server in a round; each in a process of its own.

    python -m benchmarks.memory                             # minutes: width 1 under privacy is slow
    python -m benchmarks.memory --widths 0.25 --batches 64 --hospitals 10

Kept row by row in ``benchmarks/results/memory.json``. ``peak_mb`` is what the process grew by over
its state before (everything imported, pictures loaded); ``bound_mb`` is what has to be held.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_rss, rss
from benchmarks.measure import environment
from benchmarks.secagg.case import PARAMETERS, Case
from benchmarks.secagg.scale import measure
from benchmarks.tables import show_table
from common.files import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "memory.json"
IMAGES, STEPS = 1024, 3
"""Synthetic pictures of a hospital, and batches of its training."""
KEY = ("what", "privacy", "width", "batch", "parameters", "hospitals")
Row = dict[str, Any]


def training(asked: Mapping[str, Any]) -> Row:
    """Train in this process; memory before, at most and needed, in MB, and seconds a batch.

    Needed are weights, gradients and Adam's two moments, and the activations that a batch leaves
    for the backward pass (counted as the convolutions' and norms' outputs). Under privacy a
    gradient for each picture is one way to the clipped sum; ``per_sample_mb`` is what they take.
    """
    import torch
    from torch import nn

    from common.model import ModelSpec, build, get_weights
    from common.training import PrivateStep, TrainSettings, train

    torch.set_num_threads(1)
    batch, private = int(asked["batch"]), asked["privacy"] != "none"
    spec = ModelSpec(model="dpresnet", width=float(asked["width"]), num_classes=8, channels=3)
    model, random = build(spec, seed=0), torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, 28, 28, generator=random) * 2 - 1
    labels = torch.randint(8, (IMAGES,), generator=random)
    outputs = 0

    def count(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal outputs
        outputs += output[0].numel()

    kinds = (nn.Conv2d, nn.GroupNorm)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(images[:1])
    for hook in hooks:
        hook.remove()
    settings = TrainSettings(
        epochs=1, batch_size=batch, learning_rate=1e-3, optimizer="adam",
        privacy=None if not private else PrivateStep(
            noise_multiplier=1.0, clipping_norm=1.0, sampling_rate=batch / IMAGES, steps=STEPS,
            expected_batch_size=batch,
        ),
    )  # fmt: skip
    used = images if private else images[: STEPS * batch]
    weights, before, begin = get_weights(model), rss(), time.monotonic()
    train(model, weights, used, labels[: len(used)], settings, seed=0)
    seconds = (time.monotonic() - begin) / STEPS
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "base_mb": before, "peak_mb": peak_rss() - before, "seconds_a_batch": seconds,
        "bound_mb": 4 * (4 * parameters + batch * outputs) / 1e6,
        "per_sample_mb": 4 * parameters * batch / 1e6,
    }  # fmt: skip


def in_a_process(asked: Mapping[str, Any], limit: float) -> Row:
    """:func:`training` in a process of its own, or why it has no figures."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(dict(asked))]
    # One arena: what was freed goes back, and is not counted as held.
    surroundings = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, env=surroundings, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took over {limit:g} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def serving(parameters: int, hospitals: int) -> Row:
    """A round's server, with Flower's records around the protocol: its own process's memory."""
    found = measure(Case(parameters=parameters, hospitals=hospitals, dropouts=0), records=True)
    return {
        "base_mb": found["server_base_mb"], "peak_mb": found["server_peak_mb"],
        "collecting_mb": found["server_collecting_mb"],
        "bound_mb": found["bound_mb"], "all_vectors_mb": found["all_vectors_mb"],
    }  # fmt: skip


def cells(arguments: argparse.Namespace) -> list[Row]:
    """What is asked for, each with the fields that tell it from the others."""
    asked: list[Row] = [
        {"what": "training", "privacy": privacy, "width": float(width), "batch": int(batch)}
        for width in arguments.widths.split(",")
        for batch in arguments.batches.split(",")
        for privacy in ("none", "local")
    ]
    asked += [
        {"what": "server", "parameters": PARAMETERS, "hospitals": int(hospitals)}
        for hospitals in arguments.hospitals.split(",")
        if hospitals
    ]
    return asked


def table(rows: Sequence[Row]) -> list[list[str]]:
    """A head, then a line a row."""
    lines = [["what", "width", "batch", "hospitals", "before MB", "peak MB more", "needed MB",
              "all at once MB", "against plain"]]  # fmt: skip
    plain = {
        (r["width"], r["batch"]): r["peak_mb"]
        for r in rows
        if r["what"] == "training" and r["privacy"] == "none" and "error" not in r
    }
    for row in rows:
        what = "server" if row["what"] == "server" else f"training, privacy={row['privacy']}"
        head = [what, *(str(row.get(k, "–")) for k in ("width", "batch", "hospitals"))]
        if "error" in row:
            lines.append([*head, row["error"], *[""] * 4])
            continue
        whole = row.get("per_sample_mb" if row.get("privacy") == "local" else "all_vectors_mb")
        beside = plain.get((row.get("width"), row.get("batch")))
        lines.append(
            [*head, f"{row['base_mb']:.0f}", f"{row['peak_mb']:.0f}", f"{row['bound_mb']:.0f}",
             "–" if whole is None else f"{whole:.0f}",
             "–" if not beside else f"{row['peak_mb'] / beside:.2f} ×"]
        )  # fmt: skip
    return lines


def main() -> None:
    """Measure each anew, keep it, print the kept table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--widths", default="0.25,1")
    parser.add_argument("--batches", default="64,256")
    parser.add_argument("--hospitals", default="10,50", help="cohorts of the server; empty: none")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that a training has")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="print the kept table, run nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return print(json.dumps(training(json.loads(arguments.child))))
    rows: list[Row] = read_json(arguments.out) if arguments.out.exists() else []
    for asked in [] if arguments.markdown else cells(arguments):
        if asked["what"] == "training":
            found = in_a_process(asked, arguments.limit)
        else:
            found = serving(asked["parameters"], asked["hospitals"])
        row = asked | found | {"environment": environment()}
        rows = [r for r in rows if any(r.get(k) != row.get(k) for k in KEY)] + [row]
        write_json(arguments.out, rows)
        print(table([row])[1], flush=True)
    show_table(table(rows), markdown=arguments.markdown)
    return None


if __name__ == "__main__":
    main()

"""What a private training step costs: ours, Opacus' ways, and the plain step beside them.

    python -m benchmarks.dp_step

Prints a table and writes ``benchmarks/results/dp_step.json``, where rows that it measures anew
replace the old ones. In each repeat all methods take one step each, one after the other, so that a
busy machine slows all of them; figures are medians. Memory is of a process for each method by
itself, with one thread.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import environment
from benchmarks.tables import show_table
from common.devices import CPU, CUDA, device_name, device_of
from common.files import read_json, write_json
from common.model import ModelSpec, build, get_weights
from common.optimizers import make_optimizer
from common.privacy.batches import PoissonBatches
from common.privacy.bookkeeping.module import BookKeeping
from common.privacy.engine import images_at_once, make_private
from common.privacy.randomness import SecureRandom
from common.recorded.plain import Batch, RecordedStep
from common.recorded.private import RecordedPrivateSteps
from common.training import StepRate, TrainSettings, _descend_private

RESULTS = Path(__file__).parent / "results" / "dp_step.json"
SIGMA, CLIP, RATE = 1.0, 1.0, 0.01
BASE, OURS = "plain SGD", "book-keeping"
RECORDED = ", recorded"
"""Of a method whose step is a replayed CUDA graph: on a GPU only."""
OPACUS = {f"Opacus, {mode}": mode for mode in ("hooks", "ghost", "functorch")}
METHODS = [(m, dtype) for m in (BASE, OURS) for dtype in ("float32", "bfloat16")] + [
    (name, "float32") for name in OPACUS
]

ON_GPU = [(m + RECORDED, dtype) for m in (BASE, OURS) for dtype in ("float32", "bfloat16")]

Step = Callable[[], object]


def plain(model: nn.Module, x: Tensor, y: Tensor, dtype: str) -> Step:
    """As :func:`common.training.train` does without privacy."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = F.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def ours(model: nn.Module, x: Tensor, y: Tensor, dtype: str) -> Step:
    """As :func:`common.training.train` does with privacy: parts, clipping, secure noise."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    batches = PoissonBatches(
        x, y, sampling_rate=1.0, steps=1, expected_batch_size=len(y), random=SecureRandom(),
        most_images=images_at_once(model),
    )  # fmt: skip
    wrapped, private, _ = make_private(
        model, optimizer, batches, noise_multiplier=SIGMA, clipping_norm=CLIP, precision=dtype
    )
    rate = StepRate(_settings(dtype), planned=1)
    return lambda: _descend_private(wrapped, private, batches, F.cross_entropy, rate)


def recorded_plain(model: nn.Module, x: Tensor, y: Tensor, dtype: str) -> Step:
    """As a training of many like it takes whole batches on a GPU."""
    how = _settings(dtype)
    step = RecordedStep(
        model, make_optimizer(model, how, recorded=True), F.cross_entropy, Batch(x, y, None),
        half=how.half,
    )  # fmt: skip
    return lambda: step(Batch(x, y, None))


def recorded_ours(model: nn.Module, x: Tensor, y: Tensor, dtype: str) -> Step:
    """The same with privacy: one batch that fills its place, clipping, secure noise."""
    how, n = _settings(dtype), len(y)
    batches = PoissonBatches(
        x, y, sampling_rate=1.0, steps=1, expected_batch_size=n, random=SecureRandom(),
        most_images=images_at_once(model),
    )  # fmt: skip
    books, private, engine = make_private(
        model, make_optimizer(model, how, recorded=True), batches,
        noise_multiplier=SIGMA, clipping_norm=CLIP, precision=dtype,
    )  # fmt: skip
    assert isinstance(books, BookKeeping)
    steps = RecordedPrivateSteps(books, private, engine, x[0], size=n, half=how.half)
    steps.begin(get_weights(model), batches, SIGMA)
    return lambda: [steps(part) for part in batches]


def _settings(dtype: str) -> TrainSettings:
    return TrainSettings(
        epochs=1, batch_size=1, learning_rate=RATE, optimizer="sgd", precision=dtype
    )


def opacus(model: nn.Module, x: Tensor, y: Tensor, mode: str) -> Step:
    """Opacus' own engine and noise, in its grad-sample ``mode``."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    loader = DataLoader(TensorDataset(x, y), batch_size=len(y))
    made = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=SIGMA,
        max_grad_norm=CLIP, poisson_sampling=False, grad_sample_mode=mode,
        criterion=nn.CrossEntropyLoss(),
    )  # fmt: skip
    wrapped, private = made[:2]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()

    def step() -> None:
        private.zero_grad()
        criterion(wrapped(x), y).backward()
        private.step()

    return step


def prepared(method: str, dtype: str, width: float, batch: int, device: str = CPU) -> Step:
    """A step of ``method`` on a fixed batch, model and images of its own."""
    where = device_of(device)
    model = build(ModelSpec(width=width), seed=0).to(where).train()
    x = torch.randn(batch, 3, 28, 28, generator=torch.Generator().manual_seed(0)).to(where)
    y = (torch.arange(batch) % 8).to(where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == BASE:
            return plain(model, x, y, dtype)
        if method.endswith(RECORDED):
            return (recorded_plain if BASE in method else recorded_ours)(model, x, y, dtype)
        return ours(model, x, y, dtype) if method == OURS else opacus(model, x, y, OPACUS[method])


def peak_mb(method: str, dtype: str, width: float, batch: int) -> float:
    """MiB by which this process grows at most in three steps, over what it holds before them.

    Linux only, and for a process that has not done anything larger before: see ``--memory``.
    """
    step = prepared(method, dtype, width, batch)
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return round((1024 * int(line.split()[1]) - held) / 2**20, 1)


@cache
def measured_apart(method: str, dtype: str, width: float, batch: int) -> float:
    """:func:`peak_mb` of a fresh process."""
    case = json.dumps([method, dtype, width, batch])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.dp_step", "--memory", case],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.splitlines()[-1])


def peak_on_gpu_mb(method: str, dtype: str, width: float, batch: int) -> float:
    """MiB of a GPU's memory that three steps take at most, model and images included."""
    gc.collect()  # an earlier case's graphs and hooks hold on to each other
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = prepared(method, dtype, width, batch, CUDA)
    for _ in range(3):
        step()
    return round((torch.cuda.max_memory_allocated() - held) / 2**20, 1)


def measure(
    width: float,
    batch: int,
    threads: int,
    repeats: int,
    methods: Sequence[tuple[str, str]],
    device: str = CPU,
) -> list[dict[str, Any]]:
    """A row for each method: median images/s, ratios to plain SGD, peak memory.

    The ratio of CPU seconds is what is left of the other's on a machine that others keep busy; with
    several threads it charges them for waiting, too.
    """
    torch.set_num_threads(threads)
    on_gpu = device == CUDA
    memory = peak_on_gpu_mb if on_gpu else measured_apart
    peaks = {case: memory(*case, width, batch) for case in methods}
    steps = {case: prepared(*case, width, batch, device) for case in methods}
    seconds: dict[tuple[str, str], list[float]] = {case: [] for case in methods}
    busy: dict[tuple[str, str], list[float]] = {case: [] for case in methods}
    for repeat in range(repeats + 1):
        for case, step in steps.items():
            start, cpu = time.perf_counter(), time.process_time()
            step()
            if on_gpu:
                torch.cuda.synchronize()
            if repeat:  # the first warms up
                seconds[case].append(time.perf_counter() - start)
                busy[case].append(time.process_time() - cpu)
    del steps
    median = {case: statistics.median(found) for case, found in seconds.items()}
    cpu_s = {case: statistics.median(found) for case, found in busy.items()}
    return [
        {
            "method": method, "dtype": dtype, "batch": batch, "threads": threads, "width": width,
            "images_per_s": round(batch / median[method, dtype], 1),
            "ratio_to_sgd_fp32": round(median[METHODS[0]] / median[method, dtype], 3),
            "cpu_ratio_to_sgd_fp32": round(cpu_s[METHODS[0]] / cpu_s[method, dtype], 3),
            "peak_mb": peaks[method, dtype],
            "repeats": repeats, "device": device_name(device_of(device)),
        }
        for method, dtype in methods
    ]  # fmt: skip


def show(rows: Sequence[dict[str, Any]], *, markdown: bool = False) -> None:
    """Print the table."""
    lines = [["device", "width", "threads", "batch", "method", "images/s", "of plain SGD",
              "by CPU time", "peak MiB"]]  # fmt: skip
    for row in rows:
        lines.append([
            row["device"], f"{row['width']:g}", str(row["threads"]), str(row["batch"]),
            f"{row['method']}, {row['dtype']}", f"{row['images_per_s']:.0f}",
            f"{row['ratio_to_sgd_fp32']:.2f}", f"{row['cpu_ratio_to_sgd_fp32']:.2f}",
            "–" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
        ])  # fmt: skip
    show_table(lines, markdown=markdown)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    order = (METHODS + ON_GPU).index((row["method"], row["dtype"]))
    return row["device"] != CPU, row["width"], row["batch"], row["threads"], order


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", default="0.25,1", help="by commas")
    parser.add_argument("--batches", default="64,256", help="by commas")
    parser.add_argument("--threads", default="1,2", help="numbers of threads, by commas")
    parser.add_argument("--device", default=CPU, choices=(CPU, CUDA))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", type=float, default=64.0,
                        help="largest width · batch at which Opacus is measured, too")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="print the kept table only")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        torch.set_num_threads(1)
        print(peak_mb(*json.loads(args.memory)))
        return
    if args.markdown:
        show(json.loads(args.out.read_text())["rows"], markdown=True)
        return
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    if args.out.exists():
        rows = {_key(row): row for row in json.loads(args.out.read_text())["rows"]}
    for width in map(float, args.widths.split(",")):
        for threads in map(int, args.threads.split(",")):
            for batch in map(int, args.batches.split(",")):
                few = width * batch > args.largest
                methods = [m for m in METHODS if not (few and m[0] in OPACUS)]
                methods += ON_GPU if args.device == CUDA else []
                found = measure(width, batch, threads, args.repeats, methods, args.device)
                show(found)
                rows |= {_key(row): row for row in found}
                kept = [rows[key] for key in sorted(rows)]
                kept_before = read_json(args.out) if args.out.exists() else {}
                where = "environment" if args.device == CPU else "environment_gpu"
                write_json(args.out, {**kept_before, where: environment(), "rows": kept})


if __name__ == "__main__":
    main()

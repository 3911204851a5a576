"""What this tree's private steps cost beside another checkout's, step by step in turn.

    git worktree add ../before COMMIT
    python -m benchmarks.dp_against ../before

Each tree has a process of its own, which takes a step whenever it is told to: first one tree's,
then the other's, so that a busy machine slows both. Printed is the ratio of CPU times, other / this
(below 1: this tree is slower), of the least and of the median of all repeats. The cases: DPResNet's
whole batches, its Poisson batches (where filling the last part up costs), and the clipped sum of a
prior's head.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.tables import show_table

CASES = ("dpresnet 0.25, 64", "dpresnet 0.25, 256", "dpresnet 0.25, Poisson 64", "head, 1600")

_STEPS = r"""
import sys, time, torch
torch.set_num_threads(1)
from torch import nn
from torch.nn import functional as F
from benchmarks.dp_step import OURS, _settings, prepared
from common.model import ModelSpec, build
from common.prior.model import Head
from common.privacy.batches import PoissonBatches
from common.privacy.clipped_sum import clipped_sum
from common.privacy.engine import images_at_once, make_private
from common.privacy.randomness import SecureRandom
from common.training import StepRate, _descend_private

def poisson():
    model = build(ModelSpec(width=0.25), seed=0).train()
    x, y = torch.randn(640, 3, 28, 28), torch.arange(640) % 8
    batches = PoissonBatches(
        x, y, sampling_rate=0.1, steps=1, expected_batch_size=64.0, random=SecureRandom(),
        most_images=images_at_once(model),
    )
    wrapped, private, _ = make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.01), batches, noise_multiplier=1.0,
        clipping_norm=1.0,
    )
    number = 0
    def step():
        nonlocal number
        number += 1  # the same batches in both trees
        batches.random = private.random = SecureRandom(key_for_tests=number.to_bytes(32, "big"))
        rate = StepRate(_settings("float32"), 1)
        _descend_private(wrapped, private, batches, F.cross_entropy, rate)
    return step

def head():
    x = F.normalize(torch.randn(1600, 301), dim=1)
    y, weights = torch.arange(1600) % 8, {"head.weight": torch.randn(8, 301).numpy()}
    return lambda: clipped_sum(
        Head(None, nn.Linear(301, 8, bias=False)), weights, x, y, sampling_rate=0.2,
        clipping_norm=0.25, random=SecureRandom(), expected_batch_size=320.0,
    )

case = sys.argv[1]
make = {"dpresnet 0.25, Poisson 64": poisson, "head, 1600": head}.get(case)
step = make() if make else prepared(OURS, "float32", 0.25, int(case.split(", ")[1]))
step()
print("ready", flush=True)
for _ in sys.stdin:
    before = time.process_time()
    step()
    print(time.process_time() - before, flush=True)
"""


class Tree:
    """One checkout's process for one case."""

    def __init__(self, root: Path, case: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _STEPS, case], cwd=root, text=True,
            env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._told()

    def _told(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit("error: a tree's process ended\nwhat to do: run its steps by hand")
        return line

    def step(self) -> float:
        """CPU seconds of one more step."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._told())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(other: Path, case: str, repeats: int) -> tuple[float, float, float]:
    """(least CPU ms of a step here, ratio of the least, ratio of the medians)."""
    here = Path(__file__).resolve().parents[1]
    trees = [Tree(here, case), Tree(other.resolve(), case)]
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for tree, found in zip(trees, seconds, strict=True):
            found.append(tree.step())
    for tree in trees:
        tree.close()
    mine, theirs = seconds
    median = statistics.median
    return 1e3 * min(mine), min(theirs) / min(mine), median(theirs) / median(mine)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="another checkout, with .venv's packages")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cases", default=json.dumps(CASES), help="a JSON list")
    args = parser.parse_args()
    lines = [["case", "this, ms", "ratio of least", "of medians"]]
    for case in json.loads(args.cases):
        least, ratio, median = measure(args.other, case, args.repeats)
        lines.append([case, f"{least:.1f}", f"{ratio:.3f}", f"{median:.3f}"])
    show_table(lines)


if __name__ == "__main__":
    main()

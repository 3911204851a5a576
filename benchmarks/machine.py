"""What this machine can do at most: the bounds that figures stand beside."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def best_of(repeats: int, task: Callable[[], object]) -> float:
    """Shortest wall seconds of a task: what others on the machine add is no bound."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        task()
        times.append(time.perf_counter() - begin)
    return min(times)


def bandwidth(values: int, repeats: int = 5) -> float:
    """GB/s, one thread: numpy adds two uint32 vectors of ``values`` elements in place.

    Counts the bytes that the addition names: two read, one written.
    """
    total, other = np.zeros(values, np.uint32), np.ones(values, np.uint32)
    seconds = best_of(repeats, lambda: np.add(total, other, out=total))
    return 3 * total.nbytes / seconds / 1e9


def flops(side: int = 1024, repeats: int = 5, dtype: torch.dtype | None = None) -> float:
    """GFLOP/s of a matrix product (in float32 unless told) with torch, on its threads of now."""
    import torch

    a, b = (torch.rand(side, side).to(dtype or torch.float32) for _ in range(2))
    return 2 * side**3 / best_of(repeats, lambda: a @ b) / 1e9


def hashing(size: int = 1 << 24, repeats: int = 3) -> float:
    """GB/s of SHA-256, one thread."""
    import hashlib

    data = bytes(size)
    return size / best_of(repeats, lambda: hashlib.sha256(data).digest()) / 1e9


def durable_write(folder: Path, repeats: int = 20) -> float:
    """Milliseconds until a small file is on the disk (fsync), the median's stand-in: the best."""
    path = folder / "written"

    def write() -> None:
        with path.open("wb") as file:
            file.write(b"x" * 512)
            file.flush()
            os.fsync(file.fileno())

    try:
        return 1e3 * best_of(repeats, write)
    finally:
        path.unlink(missing_ok=True)


def peak_rss() -> float:
    """Most resident memory of this process so far, in MB (10^6 bytes).

    Of this program alone where there is /proc: getrusage counts what the process held before it
    became this program, as a copy of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def rss() -> float:
    """Resident memory of this process now, in MB (10^6 bytes); needs /proc."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

"""Several processes at one registry, and what importing it brings along."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

from server_app.registry import Registry
from tests.common.vectors.building import base
from tests.server_app.registry.building import MEAN, content, fresh, send


def bring(folder: Path, numbers: list[int]) -> None:
    """Accept vectors, at the same time as others."""
    with Registry(folder) as registry:
        registry.add_base(base())
        for number in numbers:
            send(registry, number)


def test_processes_at_one_registry_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["pytest", "hypothesis", __name__])
    with fresh() as registry:
        for number in range(6):
            send(registry, number)
        expected = content(registry)
    shares = [[0, 1, 2], [2, 3, 0], [5, 4, 3], [4, 5, 1]]
    workers = [processes.Process(target=bring, args=(tmp_path, share)) for share in shares]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    with Registry(tmp_path, create=False) as registry:
        assert content(registry) == expected
        assert registry.publish(MEAN).version == 1


def test_neither_flower_nor_torch_comes_along() -> None:
    """Vectors are merged, listed and withdrawn by commands that must start at once."""
    script = (
        "import sys, common.vectors, server_app.registry\n"
        "print([m for m in ('torch', 'flwr', 'pickle5', 'dill') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr

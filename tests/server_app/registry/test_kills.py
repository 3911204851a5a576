"""kill -9 at any moment: the registry opens, counts nothing twice, and goes on as if nothing was.

Each process is a fork of a fork server that has imported the slow libraries: an operating
system's process like any other, in hundredths of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from multiprocessing.context import ForkServerContext
from pathlib import Path

from common.vectors import VectorError
from server_app.registry import Registry
from tests.common.vectors.building import base, serial
from tests.server_app.registry.building import KEYS, MEAN, content, ids, send, withdrawal

RANDOM_KILLS = 16


def work(folder: Path, started: str = "", fatal: int = 0) -> None:
    """The whole of a small federation; every step may have been done before, or half.

    ``fatal``: the number of the event at which the process dies. Events are the beginning of a
    transaction (the one before has been committed, nothing more), a file that gets its name (no
    row knows it yet) and a file that is removed.
    """
    if started:
        Path(started).touch()
    with Registry(folder) as registry:
        count = _die_at(fatal, registry)
        registry.add_base(base())
        _batch(registry, range(3), version=1)
        _batch(registry, range(3, 5), version=2)
        registry.exclude(serial(3), "harms")
        registry.withdraw(withdrawal(1), KEYS)
        _batch(registry, range(5, 7), version=3)
        registry.take_back(3)
        registry.withdraw(withdrawal(5), KEYS)
    if started:
        Path(started).write_text(str(count[0]))


def _batch(registry: Registry, numbers: range, version: int) -> None:
    """Vectors for the first base arrive, one of them twice; then they are published."""
    for number in [*numbers, numbers[0]]:
        try:
            send(registry, number)
        except VectorError as error:
            if error.code != "vector-withdrawn":  # before the process was killed
                raise
    # A coordinator that starts again looks at what is there before it publishes.
    if not any(p.version == version for p in registry.log().publications):
        made = registry.publish(MEAN)
        assert made.version == version


def _die_at(fatal: int, registry: Registry) -> list[int]:
    """Count events; kill -9 this process at number ``fatal``."""
    count = [0]

    def event() -> None:
        count[0] += 1
        if count[0] == fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def statement(text: str) -> None:
        if text.startswith("BEGIN IMMEDIATE"):
            event()

    def call(name: str, _: object) -> None:
        if name in ("os.rename", "os.remove"):
            event()

    registry._store._db.set_trace_callback(statement)
    if fatal:
        sys.addaudithook(call)
    return count


def _processes() -> ForkServerContext:
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["pytest", "hypothesis", __name__])
    return found


def _undisturbed(folder: Path) -> tuple[dict[str, object], float, int]:
    """What the steps lead to, how long they take and of how many events they are."""
    started = folder / "started-whole"
    begin, never = time.monotonic(), 1 << 30
    worker = _processes().Process(target=work, args=(folder / "whole", str(started), never))
    worker.start()
    while not started.exists():
        begin = time.monotonic()
        time.sleep(0.0005)
    worker.join()
    assert worker.exitcode == 0
    seconds = time.monotonic() - begin
    with Registry(folder / "whole", create=False) as registry:
        return content(registry), seconds, int(started.read_text())


def test_after_a_kill_at_any_event_the_same_steps_lead_to_the_same_registry(
    tmp_path: Path,
) -> None:
    expected, _, events = _undisturbed(tmp_path)
    assert events > 30
    for fatal in range(1, events + 1):
        folder = tmp_path / str(fatal)
        worker = _processes().Process(target=work, args=(folder, "", fatal))
        worker.start()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        _goes_on(folder, expected)


def test_after_a_kill_at_any_moment_the_same_steps_lead_to_the_same_registry(
    tmp_path: Path,
) -> None:
    expected, seconds, _ = _undisturbed(tmp_path)
    chosen, met = random.Random(3), Counter[str]()
    for kill in range(RANDOM_KILLS):
        folder, started = tmp_path / str(kill), tmp_path / f"started-{kill}"
        worker = _processes().Process(target=work, args=(folder, str(started)))
        worker.start()
        while not started.exists():
            time.sleep(0.0005)
        time.sleep(chosen.uniform(0, seconds))
        worker.kill()
        worker.join()
        met["killed"] += worker.exitcode == -signal.SIGKILL
        _goes_on(folder, expected)
    assert met["killed"] >= RANDOM_KILLS // 2, "the kills came too late to say anything"


def _goes_on(folder: Path, expected: dict[str, object]) -> None:
    """What a kill has left opens and is whole; the same steps again lead to ``expected``."""
    with Registry(folder) as registry:
        log = registry.log()
        recipes = [p.serials() for p in log.points]
        assert len(log.line) == len(recipes) + bool(log.line)
        assert recipes == [[i.row.serial for i in log.recipes[p.version]] for p in log.points]
        used = [serial for recipe in recipes for serial in recipe]
        assert len(used) == len(set(used))
        if log.line:
            assert registry.rebuild() == []
            assert content(registry)["line"] == ids(registry)
    work(folder)
    with Registry(folder, create=False) as registry:
        assert content(registry) == expected

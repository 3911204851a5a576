"""A hospital that is killed at any moment: what has left it is counted, and counted once."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

from safetensors import safe_open

from common.privacy.accounting import Event, epsilon_of
from common.privacy.ledger import Entry, Ledger, check_members, data_sets
from common.privacy.ledger.runs import TRAINING, VALIDATION
from tests.common.privacy.ledger.processes import (
    LEDGER,
    LOUD,
    NO_LIMITS,
    context,
    serve,
)

KILLS, PER_LEDGER = 100, 20


def test_after_a_hundred_kills_no_result_has_left_that_is_not_counted(tmp_path: Path) -> None:
    """A server asks for rounds, new and old; the process is killed at random moments.

    Every result that left (an update, a model's figures) is a sample of its own mechanism:
    two different ones for one reservation would cost twice and be counted once.
    """
    processes, chosen = context(), random.Random(7)
    met: Counter[str] = Counter()
    for kill in range(KILLS):
        folder = tmp_path / str(kill // PER_LEDGER)
        folder.mkdir(exist_ok=True)
        before = _size(folder / "told")
        worker = processes.Process(target=serve, args=(folder, kill))
        worker.start()
        while _size(folder / "told") == before and worker.is_alive():
            time.sleep(0.001)
        time.sleep(min(0.4, chosen.expovariate(1 / 0.07)))
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        _check(folder, met)
    # The kills fell where it matters, or this test says nothing.
    for where in ("inside a commit", "reserved, not kept", "kept, not settled", "head behind"):
        assert met[where] > 0, met


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(folder: Path, met: Counter[str]) -> None:
    met["inside a commit"] += (folder / f"{LEDGER}-journal").exists()
    with Ledger(folder / LEDGER, create=False) as ledger:  # opening verifies
        check_members(ledger.chain)
        entries = ledger.chain.entries()
        noted = (folder / "ledger.head").read_text().split()[1]
        met["head behind"] += noted != entries[-1].hash
        reserved = [e for e in entries if e.kind == "reserve"]
        settled = {e.refers for e in entries if e.kind == "settle"}
        open_rounds = [e for e in reserved if e.mechanism == TRAINING and e.seq not in settled]
        kept = _kept(folder / "update.safetensors")
        for e in open_rounds[-1:]:
            same = kept == f"{e.round}:{e.model}"
            met["kept, not settled" if same else "reserved, not kept"] += 1
        told = [line.split() for line in (folder / "told").read_text().splitlines()]
        released = {kind: _released(told, kind) for kind in ("update", "figures")}
        _covers(reserved, TRAINING, released["update"])
        _covers(reserved, VALIDATION, released["figures"])
        (known,) = data_sets(ledger.chain)
        total = ledger.total(known.fingerprint, NO_LIMITS)
        rounds = len(set(released["update"]))
        step = Event(LOUD.noise_multiplier, LOUD.sampling_rate, LOUD.steps_per_round * rounds)
        assert total.epsilon >= epsilon_of([step], NO_LIMITS.total_delta).value


def _kept(path: Path) -> str:
    if not path.exists():
        return ""
    with safe_open(os.fspath(path), framework="numpy") as file:
        return str(file.metadata()["question"])


def _released(told: list[list[str]], kind: str) -> list[tuple[str, str, str]]:
    """(round, model, result) of everything of a kind that left, each once."""
    return sorted({(n, model, result) for what, n, model, result in told if what == kind})


def _covers(reserved: list[Entry], mechanism: str, released: list[tuple[str, str, str]]) -> None:
    """Every distinct result has a reservation to itself."""
    have = Counter((str(e.round), e.model) for e in reserved if e.mechanism == mechanism)
    need = Counter((number, model) for number, model, _ in released)
    lacking = {what: (n, have[what]) for what, n in need.items() if n > have[what]}
    assert not lacking, f"{mechanism}: (round, model) → (results that left, reserved): {lacking}"

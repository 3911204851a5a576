"""What other processes do in the ledger's tests, and how they are started cheaply.

A fork server imports the slow libraries once; each process is then a fork of it, an operating
system's process like any other, in hundredths of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import secrets
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import torch

from client_app.data import HospitalData, Part
from client_app.hospital import Hospital
from client_app.private import PrivateRun
from common.config import RunConfig
from common.datasets import ImageSet
from common.evaluation import EvalResult
from common.model import Weights
from common.privacy.ledger import Ledger, Subjects
from common.privacy.limits import BudgetExhausted, PrivacyLimits
from common.privacy.plan import Promise, RunPlan
from common.training import to_tensor
from tests.common.privacy.ledger.building import plan, promise

RUN = "run-1"
LEDGER = "ledger.sqlite"


def context() -> ForkServerContext:
    """Starts processes that have imported this module already."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["pytest", "opacus.accountants", "dp_accounting", __name__])
    return found


# A server that asks what it likes, of a hospital that is killed.

NO_LIMITS = PrivacyLimits.none()
ENDLESS = promise(rounds=1_000_000, epsilon=1000.0)
LOUD = plan(ENDLESS, sigma=0.05, validation_sigma=0.05)
"""So little noise that only RDP's bound is computed: a reservation takes no time."""


def hospital(home: Path) -> tuple[Hospital, HospitalData]:
    """A hospital with eight training and four validation images."""

    def part(first: int, count: int) -> Part:
        images = np.zeros((count, 16, 16, 1), dtype=np.uint8)
        images[:, 0, 0, 0] = np.arange(first, first + count)
        labels = np.arange(count, dtype=np.int64) % 2
        return Part(to_tensor(images), torch.from_numpy(labels), ImageSet(images, labels))

    return (
        Hospital("st-mary", home, RunConfig.parse({}), 0, 1),
        HospitalData(part(0, 8), part(100, 4), 2),
    )


def run_of(folder: Path, ledger: Ledger, name: str = RUN) -> PrivateRun:
    """The endless run at the hospital in ``folder``, admitted."""
    who, data = hospital(folder)
    state = ledger.admit(name, ENDLESS, data.subjects(), NO_LIMITS, lambda: LOUD)
    return PrivateRun(name, state.plan, who, data, folder, ledger)


def train_anew() -> Weights:
    """An update that no other training has made."""
    return {"token": np.frombuffer(secrets.token_bytes(8), dtype=np.uint8).copy()}


def evaluate() -> EvalResult:
    """The exact figures, always the same: what differs is the noise."""
    return EvalResult(2.0, 2, 4, np.full((4, 2), 0.5, dtype=np.float32))


def serve(folder: Path, seed: int) -> None:
    """Answer requests until killed; write down in ``told`` what has left, as soon as it has.

    Requests as a server makes them that wants more than is counted: what was asked when the
    process was killed, a new round, the first one again; then whatever comes.
    """
    torch.set_num_threads(1)
    chosen = random.Random(seed)
    told = os.open(folder / "told", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    before = os.pread(told, 1 << 24, 0).decode().splitlines()
    interrupted = int(before[-1].split()[1]) if before else 1
    asked: list[int] = [interrupted, 0, interrupted]
    while True:
        with Ledger(folder / LEDGER) as ledger:
            run = run_of(folder, ledger)
            state = ledger.state(RUN)
            assert state is not None
            newest = state.rounds + 1
            earlier = max(1, newest - chosen.randint(1, 3))
            number = asked.pop(0) if asked else chosen.choice([newest, earlier])
            number = number or newest
            model = f"model-{number}"
            os.write(told, f"asked {number} {model} -\n".encode())
            update = run.update(number, model, train_anew)
            os.write(told, f"update {number} {model} {update['token'].tobytes().hex()}\n".encode())
            figures = run.figures(number, model, evaluate)
            os.write(told, f"figures {number} {model} {figures.correct!r}\n".encode())


# Several processes at one ledger. Each function returns what it was told, as text.


def together(begin: float) -> None:
    """Wait for ``begin`` (monotonic seconds), as others do."""
    time.sleep(max(0.0, begin - time.monotonic() - 0.002))
    while time.monotonic() < begin:
        pass


def admit(
    path: Path,
    begin: float,
    run: str,
    asked: Promise,
    made: RunPlan,
    parts: dict[str, Subjects],
    limits: PrivacyLimits,
) -> str:
    """``admitted`` or ``refused``."""
    together(begin)
    with Ledger(path) as ledger:
        try:
            ledger.admit(run, asked, parts, limits, lambda: made)
        except BudgetExhausted:
            return "refused"
    return "admitted"


def reserve(path: Path, begin: float, run: str, number: int, model: str) -> str:
    """The reservation's number, or ``refused``."""
    with Ledger(path) as ledger:
        together(begin)
        try:
            return str(ledger.reserve_round(run, number, model).seq)
        except BudgetExhausted:
            return "refused"


def salt_of(path: Path, begin: float) -> str:
    """The salt of a ledger that may have to be made."""
    together(begin)
    with Ledger(path) as ledger:
        return ledger.chain.meta("salt").hex()


def at_once(tasks: list[tuple[Callable[..., str], tuple[object, ...]]]) -> list[str]:
    """Run every (function, arguments) in a process of its own, all from the same moment.

    Each function gets that moment as its second argument.
    """
    begin = time.monotonic() + 0.15
    with context().Pool(len(tasks)) as pool:
        waiting = [pool.apply_async(do, (args[0], begin, *args[1:])) for do, args in tasks]
        return [answer.get(timeout=60) for answer in waiting]

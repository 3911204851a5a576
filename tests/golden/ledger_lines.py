"""A ledger with a line of each kind that the first release of the ledger could write.

Only what that release has, too, is called, so that the same lines can be written by the code of an
old commit (``python -m tests.golden.ledger_lines FOLDER`` with PYTHONPATH at a worktree of it).
``ledger/1-first`` was made so at commit 7ae204a, the first that had a ledger.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np

from common.privacy.ledger import Ledger, Subjects
from common.privacy.limits import PrivacyLimits
from common.privacy.plan import Promise, RunPlan

LIMITS = PrivacyLimits(
    total_epsilon=8.0, total_delta=1e-4, run_epsilon=8.0, allow_non_private=True, hold_days=3650.0
)
SALT, ID = bytes(range(32)), "0123456789abcdef"
_FIRST = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def digests(numbers: Iterable[int], kind: int) -> np.ndarray:
    """(N, 16) uint8: a digest for each number."""
    rows = [number.to_bytes(8, "big") + bytes([kind] * 8) for number in numbers]
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 16).copy()


def data(train: Iterable[int], val: Iterable[int]) -> dict[str, Subjects]:
    """A data set of images by number, two of a patient."""
    parts = {"train": list(train), "val": list(val)}
    return {
        part: Subjects(digests(numbers, 1), digests([n // 2 for n in numbers], 2))
        for part, numbers in parts.items()
    }


def promise() -> Promise:
    """Three rounds of one full batch for ε = 3."""
    return Promise(epsilon=3.0, delta=1e-4, clipping_norm=1.0, unit="image", rounds=3,
                   local_epochs=1, batch_size=8)  # fmt: skip


def plan() -> RunPlan:
    """The same with its noise, written down and not calibrated."""
    return RunPlan(promise=promise(), train_count=8, val_count=2, count_epsilon=0.1,
                   sampling_rate=1.0, steps_per_round=1, noise_multiplier=9.0, validations=4,
                   validation_noise_multiplier=9.0)  # fmt: skip


def write(path: Path) -> None:
    """Two private runs, one of them closed, and one without privacy; salt, id and times fixed."""
    number = count()

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return _FIRST + timedelta(seconds=next(number))

    chain = "common.privacy.ledger.chain"
    with (
        patch(f"{chain}.datetime", Frozen),
        patch("common.privacy.ledger.ledger.datetime", Frozen),
        patch(f"{chain}.os.urandom", lambda size: SALT[:size]),
        patch(f"{chain}.secrets.token_hex", lambda size: ID),
        Ledger(path) as ledger,
    ):
        for run, parts in (("run-a", data(range(8), (8, 9))), ("run-b", data(range(1, 9), (9,)))):
            ledger.admit(run, promise(), parts, LIMITS, plan)
            ledger.settle(ledger.reserve_round(run, 1, "m" * 64))
            validated = ledger.reserve_validation(run, 1, "m" * 64)
            assert validated is not None
            ledger.settle(validated)
            ledger.reserve_round(run, 2, "n" * 64)
        ledger.close_run("run-a")
        ledger.note_non_private("run-c", data((20, 21), (22,)), LIMITS)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "ledger.sqlite")

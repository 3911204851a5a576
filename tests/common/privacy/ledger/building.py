"""Small data sets, promises and plans: what the ledger's tests are made of.

Plans here are written down, not calibrated: full batches of a plain Gaussian, whose ε both
accountants know in milliseconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from common.errors import PrivacyError
from common.privacy.ledger import DataSet, Ledger, Subjects, data_sets
from common.privacy.limits import PrivacyLimits
from common.privacy.plan import COUNT_EPSILON, Promise, RunPlan

LIMITS = PrivacyLimits(total_epsilon=8.0, total_delta=1e-4, run_epsilon=8.0)


def subjects(images: Iterable[int], patients: Mapping[int, int] | None = None) -> Subjects:
    """Images by number, each its own digest; ``patients``: image → whose, where it is known."""
    numbers = list(images)
    whose = patients or {}
    return Subjects(
        _digests([n + 1 for n in numbers], 1),
        _digests([whose[n] + 1 if n in whose else 0 for n in numbers], 2),
    )


def _digests(numbers: list[int], kind: int) -> np.ndarray:
    """Number 0 stands for nothing known: zeros."""
    rows = np.zeros((len(numbers), 16), dtype=np.uint8)
    for row, number in zip(rows, numbers, strict=True):
        if number:
            row[:8] = np.frombuffer(number.to_bytes(8, "big"), dtype=np.uint8)
            row[15] = kind
    return rows


def data(
    train: Iterable[int], val: Iterable[int] = (), patients: Mapping[int, int] | None = None
) -> dict[str, Subjects]:
    """A data set's two parts, as the ledger asks for them."""
    return {"train": subjects(train, patients), "val": subjects(val, patients)}


def promise(**changes: Any) -> Promise:
    """Three rounds of one full batch for ε = 3."""
    values: dict[str, Any] = {
        "epsilon": 3.0,
        "delta": 1e-4,
        "clipping_norm": 1.0,
        "unit": "image",
        "rounds": 3,
        "local_epochs": 1,
        "batch_size": 8,
    }
    return Promise(**(values | changes))


def plan(
    made_for: Promise | None = None,
    *,
    sigma: float = 4.0,
    validation_sigma: float = 6.0,
    validations: int | None = None,
) -> RunPlan:
    """A plan for ``made_for``: full batches, so that a round is one Gaussian of ``sigma``."""
    made_for = made_for or promise()
    allowed = made_for.rounds + 1 if validations is None else validations
    return RunPlan(
        promise=made_for,
        train_count=8,
        val_count=2,
        count_epsilon=COUNT_EPSILON,
        sampling_rate=1.0,
        steps_per_round=1,
        noise_multiplier=sigma,
        validations=allowed,
        validation_noise_multiplier=validation_sigma if allowed else 0.0,
    )


# What the tests of budgets ask of a ledger.

DELTA = LIMITS.total_delta
COUNT = plan().count_epsilon


def limits(**changes: Any) -> PrivacyLimits:
    return dataclasses.replace(LIMITS, **changes)


def use_up(ledger: Ledger, run: str) -> None:
    """Every round and every model's figures of ``run`` that its plan still allows."""
    state = ledger.state(run)
    assert state is not None
    for number in range(state.rounds + 1, state.plan.promise.rounds + 1):
        ledger.settle(ledger.reserve_round(run, number, f"m{number}"))
    number = 0
    while (reserved := ledger.reserve_validation(run, number, f"m{number}")) is not None:
        ledger.settle(reserved)
        number += 1


def newest(ledger: Ledger) -> DataSet:
    return data_sets(ledger.chain)[-1]


def refuses(ledger: Ledger, error: type[PrivacyError], do: Callable[[], object]) -> PrivacyError:
    """The error of ``do``, which leaves the ledger as it was."""
    before = ledger.chain.head()
    with pytest.raises(error) as caught:
        do()
    assert caught.value.what and caught.value.remedy
    assert ledger.chain.head() == before
    return caught.value

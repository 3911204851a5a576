"""What the worst-off image, or patient, of a data set has spent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.privacy.accounting import Event, epsilon_of, group_event
from common.privacy.filter import epsilon_at, renyi
from common.privacy.ledger.runs import Use
from common.privacy.ledger.subjects import History
from common.privacy.limits import PATIENT
from common.privacy.plan import PARTS


@dataclass(frozen=True)
class Spending:
    """ε of one image's whole history at a δ, and how it was computed.

    ``accountant`` is ``prv``, ``pld`` or ``rdp`` for a single run, whose parameters were fixed
    beforehand; ``renyi-filter`` for several runs, which followed one another; ``none`` where
    nothing was spent, and where training without privacy makes ε infinite.
    """

    epsilon: float
    delta: float
    accountant: str
    runs: tuple[str, ...] = ()


def worst(
    histories: Iterable[History],
    uses: Sequence[Use],
    *,
    unit: str,
    delta: float,
    order: float,
) -> Spending:
    """The largest spending over ``histories``; ``order``: the ledger's Rényi order.

    ``unit`` is what the promise is for. Under ``patient``, what was done for single images is
    counted for a group of as many as the patient had there.
    """
    found = Spending(0.0, delta, "none")
    for history in histories:
        cost = _cost(history, uses, unit, delta, order)
        if cost.epsilon > found.epsilon:
            found = cost
    return found


def _cost(history: History, uses: Sequence[Use], unit: str, delta: float, order: float) -> Spending:
    events: list[Event] = []
    pure = 0.0
    runs, trained = set(), set()
    for use in uses:
        parts = PARTS if use.part == "all" else (use.part,)
        images = sum(history.get((use.dataset, part), 0) for part in parts)
        if not images:
            continue
        size = images if unit == PATIENT != use.unit else 1
        runs.add(use.run)
        pure += use.pure * size
        if use.event is not None and use.event.steps:
            trained.add(use.run)
            events.append(group_event(use.event, size) if size > 1 else use.event)
    names = tuple(sorted(runs))
    if not events and pure == 0.0:
        return Spending(0.0, delta, "none", names)
    if math.isinf(pure):
        return Spending(math.inf, delta, "none", names)
    if len(trained) <= 1:
        # Pure ε adds to what one run costs by itself, whichever came first (basic composition).
        alone = epsilon_of(events, delta, pure=pure)
        return Spending(alone.value, delta, alone.accountant, names)
    divergence = renyi(events, order, pure=pure)
    return Spending(epsilon_at(divergence, order, delta), delta, "renyi-filter", names)

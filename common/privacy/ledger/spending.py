"""What the worst-off image, or patient, of a data set has spent."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.privacy.accounting import Event, epsilon_of, group_event
from common.privacy.filter import epsilon_at, renyi
from common.privacy.ledger.runs import Use
from common.privacy.ledger.subjects import Where
from common.privacy.limits import PATIENT


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
    histories: Iterable[frozenset[Where]],
    uses: Sequence[Use],
    *,
    unit: str,
    largest_patient: dict[str, int],
    delta: float,
    order: float,
) -> Spending:
    """The largest spending over ``histories``; ``order``: the ledger's Rényi order.

    ``unit`` is what the promise is for. Under ``patient``, what was done for single images is
    counted for a patient with ``largest_patient`` images of that data set.
    """
    found = Spending(0.0, delta, "none")
    for history in histories:
        mine = [u for u in uses if _touches(u, history)]
        cost = _cost(mine, unit, largest_patient, delta, order)
        if cost.epsilon > found.epsilon:
            found = cost
    return found


def _touches(use: Use, history: frozenset[Where]) -> bool:
    parts = ("train", "val") if use.part == "all" else (use.part,)
    return any((use.dataset, part) in history for part in parts)


def _cost(
    uses: Sequence[Use], unit: str, largest_patient: dict[str, int], delta: float, order: float
) -> Spending:
    events: list[Event] = []
    pure = 0.0
    for use in uses:
        size = largest_patient.get(use.dataset, 1) if unit == PATIENT != use.unit else 1
        pure += use.pure * size
        if use.event is not None and use.event.steps:
            events.append(group_event(use.event, size) if size > 1 else use.event)
    runs = tuple(sorted({u.run for u in uses}))
    if not events and pure == 0.0:
        return Spending(0.0, delta, "none", runs)
    if math.isinf(pure):
        return Spending(math.inf, delta, "none", runs)
    if len(runs) == 1:
        alone = epsilon_of(events, delta, pure=pure)
        return Spending(alone.value, delta, alone.accountant, runs)
    return Spending(
        epsilon_at(renyi(events, order, pure=pure), order, delta), delta, "renyi-filter", runs
    )

"""A run as the ledger's entries tell it, and the entries that a round of it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from common.privacy.accounting import Epsilon, Event, epsilon_of
from common.privacy.ledger.chain import Entry, LedgerError
from common.privacy.limits import PrivacyLimits
from common.privacy.plan import STATISTICS, TRAIN, VAL, Promise, RunPlan

COUNT = "geometric-count"
"""The numbers of images, with two-sided geometric noise: pure ε."""
TRAINING = "sampled-gaussian"
"""DP-SGD steps: Gaussian sums over Poisson-sampled units."""
VALIDATION = "gaussian-sum"
"""One model's figures on the validation images."""
NON_PRIVATE = "none"
"""Training without privacy: ε is infinite."""


@dataclass(frozen=True)
class Use:
    """What was done, or may still be done, with one part of a data set."""

    run: str
    dataset: str
    part: str
    """``train``, ``val``, or ``all`` for both."""
    unit: str
    event: Event | None = None
    pure: float = 0.0


@dataclass(frozen=True)
class RunState:
    """A run as the ledger knows it: its plan, what it has used, whether it holds the rest."""

    run: str
    dataset: str
    plan: RunPlan
    rounds: int
    """Rounds reserved so far."""
    validations: int
    """Models whose validation figures are reserved so far."""
    closed: bool
    lapsed: bool
    """Whether another run was admitted after the hold had expired: the rest may be gone."""
    last: datetime
    """When it was last admitted, or last reserved anything."""
    limits: Mapping[str, Any]
    """The limits under which the plan was last checked."""
    statistics: frozenset[str] = frozenset()
    """Which statistics of the features are reserved so far."""

    def rest(self) -> list[Use]:
        """What the plan still allows."""
        rounds = max(0, self.plan.chargeable_rounds - self.rounds)
        unreleased = [name for name in self.plan.statistics if name not in self.statistics]
        models = max(0, self.plan.validations - self.validations)
        unit = self.plan.promise.unit
        validation = self.plan.validation(models)
        return [
            Use(self.run, self.dataset, TRAIN, unit, self.plan.training(rounds)),
            Use(self.run, self.dataset, VAL, unit, validation),
            *(
                Use(self.run, self.dataset, TRAIN, unit, self.plan.statistic(name))
                for name in unreleased
            ),
        ]

    def holds(self, limits: PrivacyLimits, now: datetime) -> bool:
        """Whether the rest of the plan is kept for this run."""
        kept = now - self.last <= timedelta(days=limits.hold_days)
        return kept and not self.closed and not self.lapsed

    @property
    def unfinished(self) -> bool:
        """Whether the plan still allows anything."""
        return any(use.event is not None and use.event.steps for use in self.rest())


def state_of(entries: Sequence[Entry]) -> RunState | None:
    """The state of the run that all ``entries`` belong to; None without a plan."""
    plans = [e for e in entries if e.kind == "plan"]
    active = [e for e in entries if e.kind in ("plan", "reserve")]
    if not plans:
        return None
    latest = plans[-1]
    plan, limits = _planned(latest)
    reserved = [e.mechanism for e in entries if e.kind == "reserve"]
    return RunState(
        run=latest.run,
        dataset=latest.dataset,
        plan=plan,
        rounds=reserved.count(TRAINING),
        validations=reserved.count(VALIDATION),
        closed=any(e.kind == "close" for e in entries),
        lapsed=any(e.kind == "lapse" and e.seq > latest.seq for e in entries),
        last=datetime.fromisoformat(active[-1].time).astimezone(UTC),
        limits=limits,
        statistics=frozenset(reserved) & frozenset(STATISTICS),
    )


@lru_cache(maxsize=256)
def _planned(entry: Entry) -> tuple[RunPlan, Mapping[str, Any]]:
    """The plan, and the limits under which it was checked, that a ``plan`` entry notes.

    LedgerError for a plan or limits with parts that this version of consilium does not know.
    """
    note = entry.notes()
    plan = dict(note["plan"])
    try:
        PrivacyLimits.from_dict(note["limits"])
        return RunPlan(**(plan | {"promise": Promise(**plan["promise"])})), note["limits"]
    except TypeError:
        raise LedgerError(
            f"the plan of run {entry.run} has parts that this version of consilium does not know",
            "use the version of consilium that admitted the run, or a later one",
        ) from None


def reserved_use(entry: Entry) -> Use:
    """What a ``reserve`` entry counts for."""
    event = None
    if entry.noise_multiplier is not None:
        assert entry.sampling_rate is not None and entry.steps is not None
        event = Event(entry.noise_multiplier, entry.sampling_rate, entry.steps)
    pure = math.inf if entry.mechanism == NON_PRIVATE else entry.pure_epsilon or 0.0
    return Use(entry.run, entry.dataset, entry.part, entry.unit, event, pure)


def reservation(state: RunState, round: int, model: str, mechanism: str) -> Entry | None:
    """The entry that reserves a round's training, a statistic, or a model's validation figures.

    None where the plan allows no more of it.
    """
    plan = state.plan
    if mechanism == TRAINING:
        part, event = TRAIN, plan.training(1) if state.rounds < plan.chargeable_rounds else None
    elif mechanism in STATISTICS:
        part, event = TRAIN, None if mechanism in state.statistics else plan.statistic(mechanism)
    else:
        part, event = VAL, plan.validation(1) if state.validations < plan.validations else None
    if event is None:
        return None
    return Entry(
        kind="reserve",
        run=state.run,
        round=round,
        dataset=state.dataset,
        part=part,
        mechanism=mechanism,
        unit=plan.promise.unit,
        sampling_rate=event.sampling_rate,
        noise_multiplier=event.noise_multiplier,
        steps=event.steps,
        model=model,
    )


def cost_of_run(entries: Sequence[Entry]) -> Epsilon:
    """What all ``entries`` of one run cost, as it was computed when they were made.

    The worse of its training and its validation images, for the unit that the run promises, at its
    δ. Infinite for training without privacy, 0 for no entries.
    """
    if any(e.mechanism == NON_PRIVATE for e in entries):
        return Epsilon(math.inf, math.inf)
    state = state_of(entries)
    pure = state.plan.count_epsilon if state else 0.0
    so_far = {"": Epsilon(pure, pure)}
    for e in reversed(entries):  # the last of each part says what all before it cost, too
        steps = e.kind == "reserve" and e.mechanism in (TRAINING, VALIDATION, *STATISTICS)
        if steps and e.part not in so_far:
            so_far[e.part] = Epsilon(**e.notes()["run_so_far"])
    return max(so_far.values(), key=lambda e: e.value)


def cost_of(uses: Sequence[Use], part: str, delta: float, *, pure: float) -> Epsilon:
    """ε of one run's ``uses`` of one part, and ``pure`` ε besides, by both accountants."""
    events = [u.event for u in uses if u.part == part and u.event is not None]
    return epsilon_of(events, delta, pure=pure)

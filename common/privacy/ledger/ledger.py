"""The privacy ledger of one hospital: what its images were used for, and whether they may be again.

A run is *admitted* once: its whole plan must fit into what is left for each of its images, and
holds that budget until it is used, the hospital closes the run, or the hold expires. Each round
then *reserves* before it trains, and *settles* when the result is safely kept. What is reserved
counts as spent, settled or not, so a crash never counts less than was used. A reservation that
was not settled is handed out again for the same round and model: nothing had left.

Every decision and its entries are one SQLite transaction: two processes cannot both be told that
the last of the budget is theirs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from common.errors import PrivacyError
from common.privacy.accounting import Epsilon
from common.privacy.filter import best_order
from common.privacy.ledger.chain import Chain, Entry
from common.privacy.ledger.runs import (
    COUNT,
    NON_PRIVATE,
    TRAINING,
    VALIDATION,
    RunState,
    Use,
    cost_of,
    reservation,
    reserved_use,
    state_of,
)
from common.privacy.ledger.spending import Spending, worst
from common.privacy.ledger.subjects import DataSet, Subjects, data_sets, histories, remember
from common.privacy.limits import BudgetExhausted, NotAllowed, PrivacyLimits
from common.privacy.plan import Promise, RunPlan

DEFAULT_ORDER = 4.0
"""Rényi order of a ledger without a plan, in which nothing finite can have been spent."""


class Ledger:
    """One hospital's ledger; open it for as long as a message is worked on.

    Usable as a context manager. Raises :class:`~common.privacy.ledger.chain.LedgerError` on
    opening for anything that is not a whole, untouched ledger.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.chain = Chain(path, create=create)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.chain.close()

    def state(self, run: str) -> RunState | None:
        """What is known of ``run``; None if it was never admitted."""
        return state_of(self.chain.entries(run=run))

    def admit(
        self,
        run: str,
        promise: Promise,
        parts: Mapping[str, Subjects],
        limits: PrivacyLimits,
        calibrate: Callable[[], RunPlan],
    ) -> RunState:
        """The run's state, admitted now if it is new; raises before anything is trained.

        ``calibrate`` makes the plan of a new run; a known run keeps its plan, so that its noise
        stays what was calibrated. The check is made anew when the data set or the limits have
        changed, or the hold has expired. NotAllowed or BudgetExhausted where the whole plan does
        not fit into what is left of ``limits``; PrivacyError for a known run with another promise.
        """
        promise.check(limits)
        known = self.state(run)
        plan = known.plan if known else calibrate()  # seconds: not while others wait
        with self.chain.transaction():
            data = remember(self.chain, parts)
            known = self.state(run)  # another process may have admitted it meanwhile
            if known is not None:
                _same_promise(known.plan.promise, promise)
                unchanged = known.dataset == data.fingerprint and known.limits == limits.as_dict()
                if unchanged and known.holds(limits, datetime.now(UTC)):
                    return known
                plan = known.plan
            self._check_total(run, plan, known, data, limits)
            self._write_plan(run, plan, data, limits, first=known is None)
        state = self.state(run)
        assert state is not None
        return state

    def _write_plan(
        self, run: str, plan: RunPlan, data: DataSet, limits: PrivacyLimits, *, first: bool
    ) -> None:
        entry = Entry(
            kind="plan", run=run, dataset=data.fingerprint, part="all", unit=plan.promise.unit
        )
        note = {
            "plan": asdict(plan),
            "limits": limits.as_dict(),
            "order": self._order(plan, limits),
        }
        self.chain.append(replace(entry, note=json.dumps(note)))
        if first:  # the two counts are drawn: from now on they may be told
            pure = plan.count_epsilon
            self.chain.append(
                replace(entry, kind="reserve", mechanism=COUNT, pure_epsilon=pure,
                        note=_so_far(Epsilon(pure, pure)))
            )  # fmt: skip

    def _order(self, plan: RunPlan | None = None, limits: PrivacyLimits | None = None) -> float:
        """The ledger's Rényi order: fixed by its first plan, before anything was seen."""
        for entry in self.chain.entries():
            if entry.kind == "plan":
                return float(entry.notes()["order"])
        if plan is None or limits is None:
            return DEFAULT_ORDER
        whole = [plan.training(plan.promise.rounds)]
        return best_order(whole, limits.total_epsilon, limits.total_delta)

    def _check_total(
        self,
        run: str,
        plan: RunPlan,
        known: RunState | None,
        data: DataSet,
        limits: PrivacyLimits,
    ) -> None:
        if math.isinf(limits.total_epsilon):
            return
        order = self._order(plan, limits)
        others = self._uses() + self._held(limits, skip=run)
        if known is None:
            known = RunState(run, "", plan, 0, 0, False, datetime.now(UTC), {})
            count = Use(run, data.fingerprint, "all", plan.promise.unit, pure=plan.count_epsilon)
            this = [count]
        else:
            this = []
        this += replace(known, dataset=data.fingerprint).rest()
        after = self._worst(data.fingerprint, limits, others + this, order)
        if after.epsilon > limits.total_epsilon:
            before = self._worst(data.fingerprint, limits, others, order)
            raise BudgetExhausted(
                f"with this run the images would come to ε={after.epsilon:.3f} at "
                f"δ={limits.total_delta:g} ({after.accountant}); this hospital allows "
                f"{limits.total_epsilon:g} in all, and {before.epsilon:.3f} are spent or held",
                "ask the coordinator for a smaller epsilon; see `consilium ledger show`",
            )

    def reserve_round(self, run: str, round: int, model: str) -> Entry:
        """Reserve the training steps of ``round`` of ``run``, on the model with hash ``model``.

        What was reserved for the same round and model, and not settled, is handed out again.
        BudgetExhausted when all rounds of the plan are reserved.
        """
        entry = self._reserve(run, round, model, TRAINING)
        if entry is None:
            raise BudgetExhausted(
                "all rounds of the run's privacy budget are charged; one more would exceed it",
                "start a new run; its ε adds to this one's",
            )
        return entry

    def reserve_validation(self, run: str, round: int, model: str) -> Entry | None:
        """Reserve the release of a model's validation figures; None if no more may be released."""
        return self._reserve(run, round, model, VALIDATION)

    def _reserve(self, run: str, round: int, model: str, mechanism: str) -> Entry | None:
        with self.chain.transaction():
            mine = self.chain.entries(run=run)
            state = state_of(mine)
            if state is None or state.closed:
                raise PrivacyError(
                    f"run {run} was not admitted by the ledger, or was closed", "start a new run"
                )
            settled = {e.refers for e in mine if e.kind == "settle"}
            for e in mine:
                same = (e.mechanism, e.round, e.model) == (mechanism, round, model)
                if e.kind == "reserve" and same and e.seq not in settled:
                    return e
            entry = reservation(state, round, model, mechanism)
            if entry is None:
                return None
            uses = [reserved_use(e) for e in [*mine, entry] if e.kind == "reserve"]
            cost = cost_of(uses, entry.part, state.plan.promise.delta)
            return self.chain.append(replace(entry, note=_so_far(cost)))

    def settle(self, reserved: Entry) -> None:
        """Note that the reserved result is safely kept; twice notes nothing more."""
        with self.chain.transaction():
            mine = self.chain.entries(run=reserved.run)
            if not any(e.refers == reserved.seq for e in mine):
                self.chain.append(
                    replace(reserved, kind="settle", refers=reserved.seq, note="",
                            sampling_rate=None, noise_multiplier=None, steps=None)
                )  # fmt: skip

    def close_run(self, run: str) -> None:
        """Give back what an unfinished run holds; what it has reserved stays counted.

        The run cannot go on afterwards. PrivacyError for an unknown run.
        """
        with self.chain.transaction():
            state = self.state(run)
            if state is None:
                raise PrivacyError(f"the ledger knows no run {run}", "see `consilium ledger show`")
            if not state.closed:
                self.chain.append(Entry(kind="close", run=run, dataset=state.dataset, part="all"))

    def note_non_private(
        self, run: str, parts: Mapping[str, Subjects], limits: PrivacyLimits
    ) -> None:
        """Note, once a run and data set, training without privacy: its ε is infinite.

        NotAllowed unless the limits allow it.
        """
        if not limits.allow_non_private:
            raise NotAllowed(
                "the run has privacy=none; this hospital's policy allows no training without "
                "differential privacy",
                "ask the coordinator for privacy=local; only the hospital can allow it",
            )
        with self.chain.transaction():
            data = remember(self.chain, parts)
            if not any(
                e.mechanism == NON_PRIVATE and e.dataset == data.fingerprint
                for e in self.chain.entries(run=run)
            ):
                self.chain.append(
                    Entry(kind="reserve", run=run, dataset=data.fingerprint, part="all",
                          mechanism=NON_PRIVATE, unit=limits.unit)
                )  # fmt: skip

    def spent_by_run(self, run: str) -> Epsilon:
        """What ``run`` has cost: the worse of its training and its validation images.

        For the unit that the run promises, at its δ, by both accountants; as it was computed
        when it was reserved. Infinite for training without privacy, 0 for an unknown run.
        """
        so_far: dict[str, Epsilon] = {}
        for e in self.chain.entries(run=run):
            if e.mechanism == NON_PRIVATE:
                return Epsilon(math.inf, math.inf)
            if e.kind == "reserve":
                so_far[e.part] = Epsilon(**e.notes()["run_so_far"])
        return max(so_far.values(), key=lambda e: e.value, default=Epsilon(0.0, 0.0))

    def total(
        self, dataset: str, limits: PrivacyLimits, *, held: bool = False, skip: str = ""
    ) -> Spending:
        """What the worst-off image (or patient) of ``dataset`` has spent over all runs.

        At the limits' δ. With ``held``, what live runs still hold is counted too, except that of
        the run ``skip``.
        """
        uses = self._uses() + (self._held(limits, skip) if held else [])
        return self._worst(dataset, limits, uses, self._order())

    def runs(self) -> list[str]:
        """Every run that an entry is of, in order of appearance."""
        return list(dict.fromkeys(e.run for e in self.chain.entries() if e.run))

    def _uses(self, run: str | None = None) -> list[Use]:
        entries = self.chain.entries(run=run)
        return [reserved_use(e) for e in entries if e.kind == "reserve"]

    def _held(self, limits: PrivacyLimits, skip: str = "") -> list[Use]:
        now = datetime.now(UTC)
        states = [self.state(run) for run in self.runs() if run != skip]
        return [u for s in states if s is not None and s.holds(limits, now) for u in s.rest()]

    def _worst(
        self, dataset: str, limits: PrivacyLimits, uses: list[Use], order: float
    ) -> Spending:
        return worst(
            histories(self.chain, dataset, limits.unit),
            uses,
            unit=limits.unit,
            largest_patient={d.fingerprint: d.largest_patient for d in data_sets(self.chain)},
            delta=limits.total_delta,
            order=order,
        )


def _so_far(cost: Epsilon) -> str:
    return json.dumps({"run_so_far": asdict(cost)})


def _same_promise(kept: Promise, asked: Promise) -> None:
    if kept != asked:
        old, new = asdict(kept), asdict(asked)
        changed = [f"{k} {old[k]} → {new[k]}" for k in old if old[k] != new[k]]
        raise PrivacyError(
            "the run's privacy settings are not those of its first round: " + ", ".join(changed),
            "go on with the settings of the first round, or start a new run",
        )

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
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path

from common.errors import PrivacyError
from common.privacy.accounting import Epsilon, Event
from common.privacy.filter import best_order
from common.privacy.ledger.budget import Budget, runs_of
from common.privacy.ledger.chain import Chain, Entry
from common.privacy.ledger.runs import (
    COUNT,
    NON_PRIVATE,
    TRAINING,
    VALIDATION,
    RunState,
    Use,
    cost_of,
    cost_of_run,
    reservation,
    reserved_use,
    state_of,
)
from common.privacy.ledger.spending import Spending
from common.privacy.ledger.subjects import Subjects, remember
from common.privacy.limits import BudgetExhausted, NotAllowed, PrivacyLimits
from common.privacy.plan import COUNT_EPSILON, Promise, RunPlan

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

        ``calibrate`` makes the plan of a new run, from numbers that :meth:`tell_numbers` gave
        (others are charged here); a known run keeps its plan, and so its noise. The check is made
        anew when the data set or the limits have changed, or the hold has expired. NotAllowed or
        BudgetExhausted where the whole plan does not fit into what is left of ``limits``;
        PrivacyError for a closed run, or a known run with another promise.
        """
        promise.check(limits)
        known = self.state(run)
        plan = known.plan if known else calibrate()  # seconds: not while others wait
        with self.chain.transaction():
            data = remember(self.chain, parts, promise.unit).fingerprint
            known = self.state(run)  # another process may have admitted it meanwhile
            if known is not None:
                _same_promise(known.plan.promise, promise)
                if known.closed:
                    raise _over(run)
                plan = known.plan
            plan.check(limits)
            if known is not None:
                unchanged = known.dataset == data and known.limits == limits.as_dict()
                if unchanged and known.holds(limits, datetime.now(UTC)):
                    return known
            numbers = (plan.train_count, plan.val_count)
            told = [e.notes() for e in self.chain.entries() if _is_count(e, data, promise.unit)]
            if known is None and {"train": numbers[0], "val": numbers[1]} not in told:
                self._charge_numbers(run, data, promise.unit, limits, numbers, plan.count_epsilon)
            self._check_total(run, plan, known, data, limits)
            self._write_plan(run, plan, data, limits)
        state = self.state(run)
        assert state is not None
        return state

    def tell_numbers(
        self,
        run: str,
        parts: Mapping[str, Subjects],
        unit: str,
        limits: PrivacyLimits,
        draw: Callable[[], tuple[int, int]],
    ) -> tuple[int, int]:
        """(training, validation) units of a data set, with noise: drawn, and charged, once.

        Asking again, under other runs' names, does not average the noise away. Before anything
        is decided by the numbers, refusals included; BudgetExhausted where not even they fit.
        """
        with self.chain.transaction():
            data = remember(self.chain, parts, unit).fingerprint
            told = [e for e in self.chain.entries() if _is_count(e, data, unit)]
            if told:
                return told[-1].notes()["train"], told[-1].notes()["val"]
            self._charge_numbers(run, data, unit, limits, numbers := draw(), COUNT_EPSILON)
            return numbers

    def _charge_numbers(
        self,
        run: str,
        data: str,
        unit: str,
        limits: PrivacyLimits,
        numbers: tuple[int, int],
        epsilon: float,
    ) -> None:
        use = Use(run, data, "all", unit, pure=epsilon)
        self._check_fits(run, data, limits, [use])
        note = json.dumps({"train": numbers[0], "val": numbers[1]})
        self.chain.append(
            Entry(kind="reserve", run=run, dataset=data, part="all", unit=unit, mechanism=COUNT,
                  pure_epsilon=epsilon, note=note)
        )  # fmt: skip

    def _write_plan(self, run: str, plan: RunPlan, data: str, limits: PrivacyLimits) -> None:
        note = {
            "plan": asdict(plan),
            "limits": limits.as_dict(),
            "order": self._order(limits),
        }
        self.chain.append(
            Entry(kind="plan", run=run, dataset=data, part="all", unit=plan.promise.unit,
                  note=json.dumps(note))
        )  # fmt: skip

    def _order(self, limits: PrivacyLimits | None = None) -> float:
        """The ledger's Rényi order: written down with its first plan, and kept.

        It follows from the limits alone: noised numbers of images are an output already.
        """
        for entry in self.chain.entries():
            if entry.kind == "plan":
                return float(entry.notes()["order"])
        if limits is None:
            return DEFAULT_ORDER
        return best_order([Event(1.0, 1.0, 1)], limits.total_epsilon, limits.total_delta)

    def _check_total(
        self, run: str, plan: RunPlan, known: RunState | None, data: str, limits: PrivacyLimits
    ) -> None:
        """BudgetExhausted unless the rest of ``plan`` fits."""
        fresh = RunState(run, data, plan, 0, 0, False, False, datetime.now(UTC), {})
        rest = (replace(known, dataset=data) if known else fresh).rest()
        self._check_fits(run, data, limits, rest)

    def _check_fits(self, run: str, data: str, limits: PrivacyLimits, more: list[Use]) -> None:
        """BudgetExhausted unless ``more`` fits; where it does, other runs' expired holds lapse.

        That they lapse is written down: a clock that is set back does not revive them.
        """
        budget = self._budget(limits, self._order(limits))
        budget.check(run, data, more)
        for other in budget.expired(skip=run):
            lapse = Entry(kind="lapse", run=other.run, dataset=other.dataset, part="all")
            self.chain.append(lapse)

    def _budget(self, limits: PrivacyLimits, order: float) -> Budget:
        return Budget(self.chain, limits, order, datetime.now(UTC))

    def reserve_round(self, run: str, round: int, model: str, mechanism: str = TRAINING) -> Entry:
        """Reserve what ``round`` of ``run`` makes of the training images, on the model ``model``.

        Its training steps, or a statistic of the features. What was reserved for the same round
        and model (a hash), and not settled, is handed out again. BudgetExhausted when all that
        the plan allows is reserved.
        """
        return _within_plan(self._reserve(run, round, model, mechanism))

    def reserve_validation(self, run: str, round: int, model: str) -> Entry | None:
        """Reserve the release of a model's validation figures; None if no more may be released."""
        return self._reserve(run, round, model, VALIDATION)

    def charge_round(self, run: str, round: int, model: str, mechanism: str) -> None:
        """Reserve what ``round`` makes, as :meth:`reserve_round`, and settle it in one transaction.

        For what is charged for good before it is made: once this returns, nothing of it is ever
        handed out again. Where it raises, or the process dies before, nothing was released; it may
        have been charged all the same, if only the file's head could not be written.
        """
        self._warm(run, round, model, mechanism)
        with self.chain.transaction():
            self._settle(_within_plan(self._reserved(run, round, model, mechanism)))

    def _reserve(self, run: str, round: int, model: str, mechanism: str) -> Entry | None:
        self._warm(run, round, model, mechanism)
        with self.chain.transaction():
            return self._reserved(run, round, model, mechanism)

    def _reserved(self, run: str, round: int, model: str, mechanism: str) -> Entry | None:
        """The reservation, new or handed out again, inside a transaction; None: no more of it."""
        mine = self.chain.entries(run=run)
        state = state_of(mine)
        if state is None or state.closed:
            raise _over(run)
        settled = {e.refers for e in mine if e.kind == "settle"}
        # Not for another version of the data: its new images have not paid.
        asked = (mechanism, round, model, state.dataset)
        for e in mine:
            same = (e.mechanism, e.round, e.model, e.dataset) == asked
            if e.kind == "reserve" and same and e.seq not in settled:
                return e
        entry = reservation(state, round, model, mechanism)
        if entry is None:
            return None
        limits = PrivacyLimits.from_dict(state.limits)
        if not state.holds(limits, datetime.now(UTC)):
            self._check_total(run, state.plan, state, state.dataset, limits)
            self._write_plan(run, state.plan, state.dataset, limits)
        cost = _cost_so_far(state, mine, entry)
        return self.chain.append(replace(entry, note=_so_far(cost)))

    def _warm(self, run: str, round: int, model: str, mechanism: str) -> None:
        """Have the accountants compute, while nobody waits, what the reservation will cost.

        Their results are cached: inside the transaction the same question takes no time.
        """
        mine = self.chain.entries(run=run)
        state = state_of(mine)
        entry = reservation(state, round, model, mechanism) if state else None
        if state is not None and entry is not None:
            _cost_so_far(state, mine, entry)

    def settle(self, reserved: Entry) -> None:
        """Note that the reserved result is safely kept; twice notes nothing more."""
        with self.chain.transaction():
            self._settle(reserved)

    def _settle(self, reserved: Entry) -> None:
        mine = self.chain.entries(run=reserved.run)
        if not any(e.refers == reserved.seq for e in mine):
            self.chain.append(
                replace(reserved, kind="settle", refers=reserved.seq, note="",
                        sampling_rate=None, noise_multiplier=None, steps=None)
            )  # fmt: skip

    def settle_kept(self, run: str, round: int | None, model: str, mechanism: str) -> None:
        """Settle what is open of a result that was kept before, now that it is to leave.

        A process may have died between keeping and settling. Were the reservation still open
        when the result leaves, it could be handed out once more, for a second result.
        ``round`` None: of any round.
        """
        entries = self.chain.entries(run=run)
        settled = {e.refers for e in entries if e.kind == "settle"}
        for e in entries:
            same = e.kind == "reserve" and (e.mechanism, e.model) == (mechanism, model)
            if same and e.seq not in settled and round in (None, e.round):
                self.settle(e)

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
            data = remember(self.chain, parts, None)
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
        return cost_of_run(self.chain.entries(run=run))

    def total(
        self, dataset: str, limits: PrivacyLimits, *, held: bool = False, skip: str = ""
    ) -> Spending:
        """What the worst-off image (or patient) of ``dataset`` has spent over all runs.

        At the limits' δ. With ``held``, what live runs still hold is counted too, except that of
        the run ``skip``.
        """
        return self._budget(limits, self._order()).total(dataset, held=held, skip=skip)

    def runs(self) -> list[str]:
        """Every run that an entry is of, in order of appearance."""
        return runs_of(self.chain)


def _cost_so_far(state: RunState, mine: list[Entry], more: Entry) -> Epsilon:
    """ε of the run's entries and of one more, for the part of the data that it is about."""
    uses = [reserved_use(e) for e in [*mine, more] if e.kind == "reserve"]
    pure = state.plan.count_epsilon
    return cost_of(uses, more.part, state.plan.promise.delta, pure=pure)


def _within_plan(reserved: Entry | None) -> Entry:
    if reserved is None:
        raise BudgetExhausted(
            "all rounds of the run's privacy budget are charged; one more would exceed it",
            "start a new run; its ε adds to this one's",
        )
    return reserved


def _is_count(entry: Entry, data: str, unit: str) -> bool:
    """Whether it tells the noised numbers of ``data``: the first release's told none there."""
    asked = ("reserve", COUNT, data, unit)
    is_one = (entry.kind, entry.mechanism, entry.dataset, entry.unit) == asked
    return is_one and "train" in entry.notes()


def _over(run: str) -> PrivacyError:
    return PrivacyError(
        f"run {run} was not admitted by the ledger, or the hospital has closed it",
        "start a new run",
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

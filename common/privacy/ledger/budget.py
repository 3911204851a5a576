"""What a hospital's images have spent over all runs, and whether more fits under its limits.

A sum over the ledger's entries, made anew each time: nothing here is kept, and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from common.privacy.ledger.chain import Chain
from common.privacy.ledger.runs import RunState, Use, reserved_use, state_of
from common.privacy.ledger.spending import Spending, worst
from common.privacy.ledger.subjects import check_members, histories
from common.privacy.limits import BudgetExhausted, PrivacyLimits


def runs_of(chain: Chain) -> list[str]:
    """Every run that an entry is of, in order of appearance."""
    return list(dict.fromkeys(e.run for e in chain.entries() if e.run))


@dataclass(frozen=True)
class Budget:
    """The entries of a ledger as they count under ``limits`` at one moment."""

    chain: Chain
    limits: PrivacyLimits
    order: float
    """The ledger's Rényi order."""
    now: datetime
    """Decides which holds have expired."""

    def total(self, dataset: str, *, held: bool, skip: str = "") -> Spending:
        """What the worst-off image (or patient) of ``dataset`` has spent, at the limits' δ.

        With ``held``, what live runs still hold is counted too, except that of the run ``skip``.
        """
        return self._worst(dataset, self._used() + (self._held(skip) if held else []))

    def check(self, run: str, dataset: str, more: Sequence[Use]) -> None:
        """BudgetExhausted unless ``run`` may make ``more`` of ``dataset``.

        Counted beside all that was used, and what the other live runs hold. LedgerError if the
        lists of images were changed.
        """
        limits = self.limits
        if not math.isfinite(limits.total_epsilon):
            return
        check_members(self.chain)  # an image taken off the list would have a budget anew
        others = self._used() + self._held(run)
        after = self._worst(dataset, [*others, *more])
        if not after.epsilon <= limits.total_epsilon:
            before = self._worst(dataset, others)
            raise BudgetExhausted(
                f"with this run the images would come to ε={after.epsilon:.3f} at "
                f"δ={limits.total_delta:g} ({after.accountant}); this hospital allows "
                f"{limits.total_epsilon:g} in all, and {before.epsilon:.3f} are spent or held",
                "ask the coordinator for a smaller epsilon; see `consilium ledger show`",
            )

    def expired(self, skip: str) -> list[RunState]:
        """Unfinished runs, but for ``skip``, whose hold is over and not yet noted as lapsed."""
        return [
            state
            for state in self._states(skip)
            if state.unfinished
            and not (state.closed or state.lapsed or state.holds(self.limits, self.now))
        ]

    def _used(self) -> list[Use]:
        return [reserved_use(e) for e in self.chain.entries() if e.kind == "reserve"]

    def _states(self, skip: str) -> list[RunState]:
        runs = [run for run in runs_of(self.chain) if run != skip]
        states = [state_of(self.chain.entries(run=run)) for run in runs]
        return [state for state in states if state is not None]

    def _held(self, skip: str) -> list[Use]:
        live = [s for s in self._states(skip) if s.holds(self.limits, self.now)]
        return [use for state in live for use in state.rest()]

    def _worst(self, dataset: str, uses: Sequence[Use]) -> Spending:
        return worst(
            histories(self.chain, dataset, self.limits.unit),
            uses,
            unit=self.limits.unit,
            delta=self.limits.total_delta,
            order=self.order,
        )

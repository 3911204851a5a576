"""FedAvg in synchronous rounds, as the algorithm reads (McMahan et al. 2017).

In a round every hospital asked first validates the model that it was sent, then trains it: the
validation of a model comes back with the next round's updates and costs no exchange of its own.
After the last round the hospitals are asked once more, to validate only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from common.config import RunConfig
from common.errors import RoundError
from common.messages import Job
from common.model import ModelSpec, Weights, build, get_weights
from common.simulation import simulated_spending
from server_app.directory import Directory
from server_app.progress import Progress
from server_app.rounds import Outcome, add_update, plain_round
from server_app.run_store import RunStore
from server_app.secure_round import secure_round

CONSECUTIVE_FAILURES = 3
"""Rounds in a row that may fail (model unchanged each time) before the run gives up."""

Evaluate = Callable[[Mapping[str, np.ndarray]], dict[str, Any]]


@dataclass
class FedAvg:
    """One run: where it asks, what it trains, how it is measured, where it is kept."""

    grid: Grid
    config: RunConfig
    directory: Directory
    spec: ModelSpec
    store: RunStore
    progress: Progress
    evaluate: Evaluate | None
    """Central test figures of a model; None where the coordinator has no test set."""
    roster: Mapping[str, bytes] | None = None
    """Identity keys by hospital; None: hospitals are not authenticated."""

    def run(self) -> Weights:
        """All rounds that are left; returns the last model.

        Raises RoundError when CONSECUTIVE_FAILURES rounds in a row, or the last one, missed the
        quorum; every complete round stays in the store.
        """
        done, weights = self._start()
        failures = 0
        for number in range(done + 1, self.config.rounds + 1):
            started = time.monotonic()
            self.progress.round_starts(number)
            self.directory.refresh()
            cohort = self.directory.sample(self.config.fraction, seed=(self.config.seed, number))
            outcome = self._exchange(cohort, number, weights, train=True)
            self.store.set_validation(number - 1, outcome.validation())
            problem = outcome.missing(self.config.quorum)
            if problem is None and outcome.mean_update is not None:
                weights = add_update(weights, outcome.mean_update)
                failures = 0
            else:
                failures += 1
            record = self._record(number, outcome, weights, problem, time.monotonic() - started)
            self.store.save_round(record, weights)
            self.progress.round_ends(record)
            if failures and (failures == CONSECUTIVE_FAILURES or number == self.config.rounds):
                raise RoundError(
                    f"round {number} failed: {problem}; the model is unchanged",
                    f"mend what the round's record names, then go on with resume={self.store.run}",
                )
        final = self._exchange(self.directory.hospitals, self.config.rounds, weights, train=False)
        self.store.set_validation(self.config.rounds, final.validation())
        return weights

    def _start(self) -> tuple[int, Weights]:
        """(rounds done, weights): where an earlier run stopped, or round 0 with fresh weights."""
        fresh = get_weights(build(self.spec, seed=self.config.seed))
        done = self.store.last_round()
        if done is not None:
            kept = self.store.load_model(done)
            return done, {name: kept[name] for name in fresh}  # in the model's own order
        record: dict[str, Any] = {"round": 0, "status": "ok", "test": None, "seconds": 0.0}
        if self.evaluate is not None:
            record["test"] = self.evaluate(fresh)
        self.store.save_round(record, fresh)
        return 0, fresh

    def _exchange(
        self, cohort: Mapping[str, int], number: int, weights: Weights, *, train: bool
    ) -> Outcome:
        job = Job(self.store.run, number, self.spec.digest(), weights)
        if self.config.secagg:
            return secure_round(
                self.grid, cohort, job, self.config, train=train, roster=self.roster
            )
        return plain_round(self.grid, cohort, job, train=train, timeout=self.config.round_timeout)

    def _record(
        self, number: int, outcome: Outcome, weights: Weights, problem: str | None, seconds: float
    ) -> dict[str, Any]:
        spent = simulated_spending(self.store.run) if self.config.privacy != "none" else {}
        return {
            "round": number,
            "status": "ok" if problem is None else "failed",
            "reason": problem,
            "test": self.evaluate(weights) if self.evaluate is not None else None,
            "train": outcome.training(),
            "validation": None,
            "epsilon": max((e["epsilon"] for e in spent.values()), default=None),
            "epsilon_by_hospital": spent,
            **outcome.participation(),
            "seconds": round(seconds, 3),
        }

"""FedAvg in synchronous rounds, as the algorithm reads (McMahan et al. 2017).

In a round every hospital asked first validates the model that it was sent, then trains it: the
validation of a model comes back with the next round's updates and costs no exchange of its own.
After the last round the hospitals are asked once more, to validate only.

With ``server-step`` a round is one step of the server's optimizer instead (FedSGD): the same
exchange, with sums of gradients for updates (:mod:`server_app.server_step`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.serverapp import Grid

from common.config import RunConfig
from common.errors import RoundError
from common.messages import Job
from common.model import ModelSpec, Weights, moving_names, state_names
from common.simulation import simulated_spending
from server_app.averaged import Averaged
from server_app.directory import Directory
from server_app.exchange import Absence
from server_app.fixed import FixedParts
from server_app.progress import Progress
from server_app.rounds import Outcome, add_update, needed, plain_round, with_momentum
from server_app.run_store import RunStore
from server_app.secure_round import secure_round
from server_app.server_step import ServerStep

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
    start: Mapping[str, np.ndarray]
    """The weights before the first round; not looked at by a run that goes on."""
    evaluate: Evaluate | None
    """Central test figures of a model; None where the coordinator has no test set."""
    step: ServerStep | None = None
    """The optimizer, where rounds are steps of the server's."""
    roster: Mapping[str, bytes] | None = None
    """Identity keys by hospital; None: hospitals are not authenticated."""

    def __post_init__(self) -> None:
        self.averaged = Averaged(self.config.ema)
        self.parts = FixedParts()

    def run(self) -> Weights:
        """All rounds that are left; returns the last model.

        Raises RoundError when CONSECUTIVE_FAILURES rounds in a row, or the last one, missed the
        quorum; every complete round stays in the store.
        """
        done, weights, previous = self._start()
        failures = 0
        for number in range(done + 1, self.config.rounds + 1):
            started = time.monotonic()
            self.progress.round_starts(number)
            self.directory.refresh()
            names = self.directory.sample(self.config.fraction, seed=(self.config.seed, number))
            outcome = self._exchange(names, number, weights, train=True)
            self.store.set_validation(number - 1, outcome.validation())
            problem = outcome.missing(self.config.quorum)
            if problem is None:
                previous, weights = weights, self._moved(number, outcome, weights, previous)
                failures = 0
            else:
                previous, failures = weights, failures + 1
            model = self.averaged.weights
            record = self._record(number, outcome, model, problem, time.monotonic() - started)
            memory = self.averaged.memory(weights, previous)
            self.store.save_round(record, model, memory | (self.step.memory if self.step else {}))
            self.progress.round_ends(record)
            if failures and (failures == CONSECUTIVE_FAILURES or number == self.config.rounds):
                raise RoundError(
                    f"round {number} failed: {problem}; the model is unchanged",
                    f"mend what the round's record names, then go on with resume={self.store.run}",
                )
        if self.store.records[-1]["status"] != "ok":
            raise RoundError(
                f"the last round, {self.config.rounds}, had failed, and none is left",
                "evaluate the last good model, or start a new run from it",
            )
        model = self.averaged.weights
        final = self._exchange(self.directory.names, self.config.rounds, model, train=False)
        self.store.set_validation(self.config.rounds, final.validation())
        return model

    def _moved(self, number: int, outcome: Outcome, weights: Weights, previous: Weights) -> Weights:
        """The weights after a round that counts."""
        if self.step is not None:
            assert outcome.total is not None
            moved = self.step.moved(weights, outcome.total, outcome.sums["examples"], number)
            if self.step.is_statistic(number):
                self.averaged.begin(moved)  # earlier weights were for other features
            else:
                self.averaged.add(moved)
            return moved
        assert outcome.mean_update is not None
        momentum = self.config.server_momentum
        step = with_momentum(outcome.mean_update, weights, previous, momentum)
        moved = add_update(weights, step)
        self.averaged.add(moved)
        return moved

    def _start(self) -> tuple[int, Weights, Weights]:
        """(rounds done, weights, weights a round before): where an earlier run stopped, or fresh.

        The step before is all the state that FedAvg's momentum has.
        """
        order = state_names(self.spec)  # which a file does not keep
        done = self.store.last_round()
        if done is not None:
            return done, *self._recalled(done, order)
        fresh = {k: np.asarray(self.start[k]) for k in order}
        record: dict[str, Any] = {"round": 0, "status": "ok", "test": None, "seconds": 0.0}
        if self.evaluate is not None:
            record["test"] = self.evaluate(fresh)
        self.averaged.begin(fresh)
        self.store.save_round(record, fresh, self.averaged.memory(fresh, fresh))
        return 0, fresh, fresh

    def _recalled(self, done: int, order: Sequence[str]) -> tuple[Weights, Weights]:
        """(weights, weights a round before) after the round ``done`` of an earlier part."""
        last, before = (self.store.load_model(r) for r in (done, max(done - 1, 0)))
        model = {k: last[k] for k in order}
        memory = self.store.load_memory(done)
        if self.step is not None:
            self.step.recall(memory)
        if self.config.ema:
            return self.averaged.recall(memory, model)
        self.averaged.begin(model)
        return model, {k: before[k] for k in order}

    def _exchange(self, names: list[str], number: int, weights: Weights, *, train: bool) -> Outcome:
        """One round with the hospitals of these names; who is not connected is absent."""
        moving = moving_names(self.config, self.spec)
        job = Job(
            self.store.run, number, self.spec.digest(), {n: weights[n] for n in moving},
            fixed={n: array for n, array in weights.items() if n not in moving},
        )  # fmt: skip
        cohort, gone = self.directory.reach(names)
        if self.config.secagg:
            least = needed(len(names), self.config.quorum) if train else 0
            outcome = secure_round(
                self.grid, cohort, job, self.config,
                train=train, roster=self.roster, step=self.step if train else None,
                parts=self.parts, least=least,
            )  # fmt: skip
        else:
            outcome = plain_round(
                self.grid, cohort, job, train=train, timeout=self.config.round_timeout,
                parts=self.parts,
            )  # fmt: skip
        stage = "train" if train else "validate"
        outcome.expected = sorted(names)
        outcome.absent += [Absence(name, stage, "its node is not connected") for name in gone]
        outcome.absent += self.directory.left_out
        return outcome

    def _record(
        self, number: int, outcome: Outcome, weights: Weights, problem: str | None, seconds: float
    ) -> dict[str, Any]:
        spent = simulated_spending(self.store.run) if self.config.privacy != "none" else {}
        due = number % self.config.test_every == 0 or number == self.config.rounds
        return {
            "round": number,
            "status": "ok" if problem is None else "failed",
            "reason": problem,
            "test": self.evaluate(weights) if due and self.evaluate is not None else None,
            "train": outcome.training(),
            "validation": None,
            "epsilon": max((e["epsilon"] for e in spent.values()), default=None),
            "epsilon_by_hospital": spent,
            **outcome.participation(),
            "seconds": round(seconds, 3),
        }

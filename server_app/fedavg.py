"""FedAvg in synchronous rounds, as the algorithm reads (McMahan et al. 2017).

In a round every hospital asked first validates the model that it was sent, then trains it: the
validation of a model comes back with the next round's updates and costs no exchange of its own.
After the last round the hospitals are asked once more, to validate only.

With ``server-step`` a round is one step of the server's optimizer instead (FedSGD): the same
exchange, with sums of gradients for updates (:mod:`server_app.server_step`).

What a round may do to the model, after hospitals that lie were reckoned with, is
:mod:`server_app.defence`'s to say: its sums may be over two halves, be set aside, or be undone.
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
from server_app.defence.defence import Defence
from server_app.defence.guard import Guard, Turn
from server_app.directory import Directory
from server_app.exchange import Absence
from server_app.fixed import FixedParts
from server_app.mover import Mover
from server_app.progress import Progress
from server_app.rounds import Outcome, merged, needed, plain_round
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
    defence: Defence | None = None
    """None: of the config alone."""

    def __post_init__(self) -> None:
        self.mover = Mover(self.config, self.step)
        self.averaged = self.mover.averaged
        self.guard = Guard(self.defence or Defence(self.config, say=self.progress.say), self.mover)
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
            names = self.guard.defence.asked(names)
            parts = self._train(names, number, weights, whole=failures > 0)
            outcome = merged(parts)
            self.store.set_validation(number - 1, outcome.validation())
            problem = outcome.missing(self.config.quorum)
            turn = Turn(weights, weights, problem)
            if problem is None:
                turn = self.guard.follow(
                    number, parts, weights, previous, self._validating(outcome, number)
                )
            weights, previous = turn.weights, turn.previous
            failures = 0 if turn.problem is None else failures + 1
            model = self.averaged.weights
            record = self._record(number, outcome, model, turn, time.monotonic() - started)
            if len(parts) > 1:
                record["halves"] = [part.expected for part in parts]
            memory = self.averaged.memory(weights, previous) | self.guard.memory()
            self.store.save_round(record, model, memory | (self.step.memory if self.step else {}))
            self.progress.round_ends(record)
            if failures and (failures == CONSECUTIVE_FAILURES or number == self.config.rounds):
                raise RoundError(
                    f"round {number} failed: {turn.problem}; the model is unchanged",
                    f"mend what the round's record names, then go on with resume={self.store.run}",
                )
        if self.store.records[-1]["status"] == "failed":
            raise RoundError(
                f"the last round, {self.config.rounds}, had failed, and none is left",
                "evaluate the last good model, or start a new run from it",
            )
        return self._validate_last(self.averaged.weights)

    def _validate_last(self, model: Weights) -> Weights:
        """The last model, validated; the one before it if it turns out to harm."""
        number = self.config.rounds
        names = self.guard.defence.asked(self.directory.names)
        final = self._exchange(names, number, model, train=False)
        self.store.set_validation(number, final.validation())
        why = self.guard.last(final, number)
        if why is not None:
            model = self.averaged.weights
            told = {"round": number, "why": why, "step": 0.0}
            self.store.replace_last(model, {"rolled_back": told})
        return model

    def _train(
        self, names: list[str], number: int, weights: Weights, *, whole: bool
    ) -> list[Outcome]:
        """A round's sums, over all of ``names`` or over two halves of those that are there."""
        there, gone = self.directory.reach(names)
        groups = self.guard.defence.divide(list(there), number, whole=whole)
        groups[0] = sorted([*groups[0], *gone])  # they are missed by name
        return [self._exchange(group, number, weights, train=True) for group in groups]

    def _validating(self, outcome: Outcome, number: int) -> Callable[[Weights], Outcome]:
        """Lets those who contributed to ``outcome`` validate another model."""
        return lambda model: self._exchange(outcome.contributed, number, model, train=False)

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
        self.guard.recall(memory, model)
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
                parts=self.parts, sifted=self.guard.defence.sifted,
            )  # fmt: skip
        stage = "train" if train else "validate"
        outcome.expected = sorted(names)
        outcome.absent += [Absence(name, stage, "its node is not connected") for name in gone]
        outcome.absent += self.directory.left_out
        return outcome

    def _record(
        self, number: int, outcome: Outcome, weights: Weights, turn: Turn, seconds: float
    ) -> dict[str, Any]:
        spent = simulated_spending(self.store.run) if self.config.privacy != "none" else {}
        due = number % self.config.test_every == 0 or number == self.config.rounds
        return {
            "round": number,
            "status": turn.status,
            "reason": turn.problem or turn.rolled_back,
            "test": self.evaluate(weights) if due and self.evaluate is not None else None,
            "train": outcome.training(),
            "validation": None,
            "epsilon": max((e["epsilon"] for e in spent.values()), default=None),
            "epsilon_by_hospital": spent,
            **outcome.participation(),
            "seconds": round(seconds, 3),
            **({"defence": turn.told} if turn.told else {}),
        }

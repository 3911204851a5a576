"""The defence in the round loop: what a round that counts makes of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.model import Weights
from server_app.defence.defence import SMALLER, Defence, Ruling
from server_app.defence.figures import Validated
from server_app.defence.measuring import measured, validated
from server_app.mover import Moment, Mover
from server_app.rounds import Outcome, merged

_TRIES = 3
"""Ever smaller steps that are tried on the coordinator's own images."""

Ask = Callable[[Weights], Outcome]
"""Lets all hospitals of a round validate a model."""


@dataclass(frozen=True)
class Turn:
    """What a round came to."""

    weights: Weights
    previous: Weights
    """A round before, for momentum."""
    problem: str | None = None
    """Why the round did not count after all."""
    rolled_back: str | None = None
    told: dict[str, Any] = field(default_factory=dict)
    """What the round's record says of the defence."""

    @property
    def status(self) -> str:
        """For the round's record: ``ok``, ``failed``, or ``rolled-back``."""
        if self.problem is not None:
            return "failed"
        return "ok" if self.rolled_back is None else "rolled-back"


@dataclass
class Guard:
    """One run's: the rules (``defence``), and the model that they may set back (``mover``)."""

    defence: Defence
    mover: Mover
    safe: Moment | None = None
    """Before the last step; None: the model has not moved, or cannot be set back."""

    def follow(
        self,
        number: int,
        parts: Sequence[Outcome],
        weights: Weights,
        previous: Weights,
        validate: Ask,
    ) -> Turn:
        """The model after a round that reached its quorum, from its sums over one part or two."""
        defence, whole = self.defence, merged(parts)
        if not defence.on:
            moved = self.mover.moved(number, whole, weights, previous)
            return Turn(moved, weights)
        if defence.judge is None:
            why = defence.model_is_worse(
                validated(whole, defence.config), number - 1, can_return=self.safe is not None
            )
            if why is not None:
                told = {"rolled_back": {"round": number - 1, "why": why, "step": SMALLER}}
                back = self._smaller(weights)
                return Turn(back, back, rolled_back=_words(number - 1, why), told=told)
        elif not defence.validated:
            defence.model_is_worse(defence.judge(weights), number - 1, can_return=False)
        if not defence.config.secagg:
            return self._of_updates(number, whole, weights, previous)
        ruling = self._ruling(number, parts, weights, previous, validate)
        used = [parts[i] for i in ruling.used] or list(parts)
        if ruling.scale == 0.0:
            why = "; ".join(one["why"] for one in ruling.told["set_aside"])
            return Turn(weights, weights, problem=f"its sum was set aside: {why}", told=ruling.told)
        step = merged(used).scaled(ruling.scale)
        return self._step(number, step, weights, previous, ruling.told)

    def _ruling(
        self,
        number: int,
        parts: Sequence[Outcome],
        weights: Weights,
        previous: Weights,
        validate: Ask,
    ) -> Ruling:
        defence, step = self.defence, self.mover.step
        statistic = step is not None and step.is_statistic(number)
        sums = [measured(part, number, step) for part in parts]
        ruling = defence.look_at(sums, comparable=not statistic)
        # Under privacy a model's figures are paid for, and there is a plan's number of them.
        free = defence.judge is not None or defence.config.privacy == "none"
        if len(ruling.used) < 2 or statistic or not (defence.halves_validated and free):
            return ruling
        found: list[Validated | None] = []
        for part in parts:
            before = self.mover.moment(weights)
            candidate = self.mover.moved(number, part, weights, previous)
            self.mover.back_to(before)
            if defence.judge is not None:
                found.append(defence.judge(candidate))
                continue
            figures = validated(validate(candidate), defence.config)
            found.append(None if isinstance(figures, str) else figures)
        return defence.harmed(sums, found, ruling)

    def _of_updates(
        self, number: int, outcome: Outcome, weights: Weights, previous: Weights
    ) -> Turn:
        """Where each update was seen by itself (secagg=false)."""
        told: dict[str, Any] = {}
        if outcome.set_aside:
            aside = sorted(outcome.set_aside.items())
            told["set_aside"] = [{"members": [name], "why": why} for name, why in aside]
        if outcome.lowered:
            told["lowered"] = dict(sorted(outcome.lowered.items()))
        told |= self.defence.struck(outcome.set_aside)
        if not outcome.mean_update:
            return Turn(weights, weights, problem="every update was set aside", told=told)
        return self._step(number, outcome, weights, previous, told)

    def _step(
        self, number: int, outcome: Outcome, weights: Weights, previous: Weights, told: Any
    ) -> Turn:
        self.safe = self.mover.moment(weights)
        moved = self.mover.moved(number, outcome, weights, previous)
        judge, step = self.defence.judge, self.mover.step
        if judge is None or (step is not None and step.is_statistic(number)):
            return Turn(moved, weights, told=told)
        share, worst = 1.0, ""
        for _ in range(_TRIES):
            why = self.defence.model_is_worse(judge(moved), number, can_return=True)
            if why is None:
                break
            share, worst = share * SMALLER, worst or why
            moved = self._smaller(moved)
        else:
            self.mover.back_to(self.safe)
            told = {**told, "rolled_back": {"round": number, "why": worst, "step": 0.0}}
            return Turn(weights, weights, rolled_back=_words(number, worst), told=told)
        if share < 1.0:
            told = {**told, "rolled_back": {"round": number, "why": worst, "step": share}}
        return Turn(moved, weights, told=told)

    def _smaller(self, tried: Weights) -> Weights:
        """A smaller part of the way from the safe model to ``tried``, in its stead."""
        assert self.safe is not None
        back = self.defence.shrunk(self.safe.weights, tried)
        self.mover.back_to(self.safe)
        self.mover.averaged.add(back)
        return back

    def last(self, outcome: Outcome, number: int) -> str | None:
        """Whether the last model is worse than those before: then the mover is before its step."""
        if not self.defence.on or self.defence.judge is not None or self.safe is None:
            return None
        found = validated(outcome, self.defence.config)
        why = self.defence.model_is_worse(found, number, can_return=True)
        if why is not None:
            self.mover.back_to(self.safe)
        return why

    def memory(self) -> dict[str, np.ndarray]:
        """What a resumed run needs."""
        if not self.defence.on:
            return {}
        kept = {"defence": self.defence.memory()}
        return kept if self.safe is None else kept | self.safe.memory(self.mover.averaged.weights)

    def recall(self, memory: Mapping[str, np.ndarray], model: Weights) -> None:
        """Go on with what :meth:`memory` kept; ``model``: the last round's, as it was stored."""
        if "defence" in memory:
            self.defence.recall(memory["defence"])
            self.safe = Moment.recall(memory, model)


def _words(round: int, why: str) -> str:
    return f"the model of round {round} was rolled back: {why}"

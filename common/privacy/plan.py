"""A hospital's privacy plan for one run: noise for the whole of it, charged before each round.

The plan is calibrated once, for every step of every round, and kept in a file of the
hospital's own. Each round is charged *before* it trains: a crash in between leaves it charged,
so never less is counted than was spent. A round beyond the plan is refused.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import PrivacyError
from common.files import read_json, write_json
from common.privacy.accounting import Epsilon, Event, calibrate, epsilon_of

_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """What a hospital promised for a run, and how many of its steps are charged so far."""

    epsilon: float
    delta: float
    clipping_norm: float
    sampling_rate: float
    steps_per_round: int
    rounds: int
    noise_multiplier: float
    charged_rounds: int = 0

    @classmethod
    def calibrated(
        cls,
        *,
        epsilon: float,
        delta: float,
        clipping_norm: float,
        sampling_rate: float,
        steps_per_round: int,
        rounds: int,
    ) -> PrivacyPlan:
        """A plan whose ``rounds`` × ``steps_per_round`` steps cost at most (ε, δ) in total."""
        sigma = calibrate(
            epsilon=epsilon,
            delta=delta,
            sampling_rate=sampling_rate,
            steps=rounds * steps_per_round,
        )
        return cls(
            epsilon=epsilon,
            delta=delta,
            clipping_norm=clipping_norm,
            sampling_rate=sampling_rate,
            steps_per_round=steps_per_round,
            rounds=rounds,
            noise_multiplier=sigma,
        )

    @property
    def events(self) -> list[Event]:
        """Everything charged so far."""
        steps = self.charged_rounds * self.steps_per_round
        return [Event(self.noise_multiplier, self.sampling_rate, steps)]

    def spent(self) -> Epsilon:
        """ε of everything charged so far, by both accountants."""
        return epsilon_of(self.events, self.delta)

    def charge_round(self) -> PrivacyPlan:
        """This plan with one more round charged; PrivacyError if that exceeds the promise."""
        if self.charged_rounds >= self.rounds:
            raise PrivacyError(
                f"all {self.rounds} rounds of the run's privacy budget (ε={self.epsilon}, "
                f"δ={self.delta}) are charged; one more would exceed it",
                "start a new run; its ε adds to this one's",
            )
        return replace(self, charged_rounds=self.charged_rounds + 1)

    def same_promise(self, other: PrivacyPlan) -> bool:
        """Whether both plans differ in nothing but what is charged."""
        return replace(self, charged_rounds=0) == replace(other, charged_rounds=0)

    def save(self, path: Path) -> None:
        """Write the plan, with what both accountants make of it, atomically; owner-readable."""
        spent = self.spent()
        state: dict[str, Any] = {
            "version": _VERSION,
            "plan": asdict(self),
            "spent": {"epsilon": spent.value, "prv": spent.prv, "pld": spent.pld},
        }
        write_json(path, state, mode=0o600)

    @classmethod
    def load(cls, path: Path) -> PrivacyPlan:
        """Read a plan; PrivacyError if the file is damaged (never treated as nothing spent)."""
        try:
            state = read_json(path)
            if state["version"] != _VERSION:
                raise KeyError("version")
            return cls(**state["plan"])
        except (KeyError, TypeError) as e:
            raise PrivacyError(
                f"the privacy record {path} is damaged or of another version ({e})",
                "restore it from a backup; while it is unreadable nothing can be trained",
            ) from None

"""A run's defence against hospitals that lie: what the round loop asks of it, and its state.

A round goes like this. :meth:`Defence.divide` says over whom sums are taken: all, or two disjoint
halves. :meth:`Defence.model_is_worse` looks at the figures which came with the sums; they are of
the model that the round started from. If it is worse than those before it, it is rolled back,
and a quarter of its step stands in its place. Else :meth:`Defence.look_at` judges the sums:
what is set aside does not move the model. Halves that were harmed and halves that were not name the
hospital that harms, which is then left out.

Halves are taken in a run's first rounds, where there is nothing before to compare with, and after
alarms until :data:`QUIET` of them in a row were not. Each half has min-cohort hospitals or more,
and each model is in the sums of one division only. Both halves' sums together are the sum over all:
what is neither set aside nor refused is used as if there had been no halves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.config import RunConfig
from common.model import Weights
from server_app.defence import figures
from server_app.defence.figures import Validated
from server_app.defence.sums import (
    COUNT_NOISE,
    Measured,
    log_ratio,
    outsized,
    overclaimed,
    uneven,
    weight_bound,
)
from server_app.defence.suspects import FEWEST_SEEN, SHIFT, Seen, Suspects
from server_app.defence.updates import Sifted, sift

FIRST_ROUNDS = 2
"""Of a run (``halves=start``), in halves."""
QUIET = 3
"""Rounds in halves without a harmed one after which sums are over all hospitals again."""
SMALLER = 0.25
"""Of a step that is rolled back, this share is tried next."""
ALARMS = 2
"""Models rolled back, in the last :data:`_RECENT` rounds, after which halves are taken."""
_RECENT = 8
_NORMS = 8

Judge = Callable[[Mapping[str, np.ndarray]], Validated]


@dataclass(frozen=True)
class Ruling:
    """What becomes of a round's sums."""

    used: list[int]
    """Numbers of the parts that move the model; empty: none does as it is."""
    scale: float
    """Share of the step that is taken."""
    told: dict[str, Any]
    """For the round's record: ``set_aside``, ``lowered``, ``named``."""


@dataclass
class Defence:
    """State and decisions; ``on`` false: nothing is divided, judged or kept."""

    config: RunConfig
    agreed: Mapping[str, int] = field(default_factory=dict)
    """Most images by hospital, as agreed at admission; empty: nothing is."""
    judge: Judge | None = None
    """Figures of a model on the coordinator's own images (``adopted-by=public``)."""
    say: Callable[[str], None] = lambda line: None
    norms: list[float] = field(default_factory=list)
    entries: list[float] = field(default_factory=list)
    validated: list[Validated] = field(default_factory=list)
    suspects: Suspects = field(default_factory=Suspects)
    """Of what no hospital can make up: sums, and the coordinator's own images."""
    suspected: Suspects = field(default_factory=Suspects)
    """Of what the hospitals' validation figures say of halves."""
    named: dict[str, str] = field(default_factory=dict)
    """Hospital → why."""
    strikes: dict[str, int] = field(default_factory=dict)
    """Updates set aside one by one (secagg=false)."""
    halves_left: int = 0
    rolled_back: list[int] = field(default_factory=list)
    """Rounds whose models were."""

    @property
    def on(self) -> bool:
        """Whether the run has a defence."""
        return self.config.defence

    def asked(self, names: Sequence[str]) -> list[str]:
        """Those of ``names`` that are not named, if the others are enough; else all."""
        least = self.config.min_cohort if self.config.secagg else 1
        others = [name for name in names if name not in self.named]
        return others if len(others) >= least else list(names)

    def divide(self, names: Sequence[str], number: int, *, whole: bool = False) -> list[list[str]]:
        """Over whom round ``number`` takes sums; ``whole``: not in halves in any case.

        Deterministic in the run's seed: who is asked is no secret.
        """
        c = self.config
        due = self.halves_left > 0 or (c.halves == "start" and number <= FIRST_ROUNDS)
        if not (self.on and c.secagg and c.halves != "off" and due) or whole:
            return [list(names)]
        rng = np.random.default_rng([c.seed, number, 7])
        # Whichever knows more parts whom it suspects.
        by = max((self.suspects, self.suspected), key=Suspects.most)
        found = by.split(names, c.min_cohort, rng)
        return [list(names)] if found is None else [*found]

    def model_is_worse(
        self, found: Validated | str | None, round: int, *, can_return: bool
    ) -> str | None:
        """Why the model of ``round``, which ``found`` is of, is to be rolled back; or None.

        A model that is not is among those that later ones are compared with. ``can_return``: there
        is one to go back to.
        """
        if not self.on or found is None:
            return None
        if isinstance(found, str):
            self.alarm(found)
            return None
        why = figures.worse(found, self.validated, self.config.rollback_margin)
        if why is None or not can_return:
            self.validated = [*self.validated, found][-figures.WINDOW :]
            return None
        recent = {r for r in self.rolled_back if r > round - _RECENT}
        self.rolled_back = sorted(recent | {round})
        self.say(f"! the model of round {round} is rolled back: {why}")
        if len(self.rolled_back) >= ALARMS:
            self.alarm(f"{len(self.rolled_back)} models were rolled back")
        return why

    def alarm(self, why: str) -> None:
        """The next rounds are in halves, where there are hospitals enough."""
        if not self.halves_left:
            self.say(f"! {why}")
        self.halves_left = QUIET

    @property
    def halves_validated(self) -> bool:
        """Whether each half's own model is to be validated: sums alone did not show who harms."""
        return self.on and len(self.rolled_back) >= ALARMS

    def look_at(self, parts: Sequence[Measured], *, comparable: bool = True) -> Ruling:
        """Judge a round's sums; ``comparable``: the norm may be compared with earlier rounds'.

        Of two halves each is compared with the other as well, and that is an observation.
        """
        reasons = [self._reason(m, comparable) for m in parts]
        if len(parts) == 2:
            one, other = parts
            impossible = [why is not None for why in reasons]
            x = log_ratio(one, other)
            self.suspects.observe(Seen(one.members, other.members, x, *impossible))
            reasons = [reasons[0] or uneven(one, other), reasons[1] or uneven(other, one)]
        return self._ruling(parts, reasons, comparable)

    def _reason(self, m: Measured, comparable: bool) -> str | None:
        c = self.config
        bound = weight_bound(m.members, self.agreed, c.max_examples, private=c.privacy != "none")
        over = overclaimed(m, bound)
        if over or not comparable:
            return over
        return outsized(m, self.norms, self.entries, c.norm_factor)

    def harmed(
        self, parts: Sequence[Measured], found: Sequence[Validated | None], ruling: Ruling
    ) -> Ruling:
        """The ruling after each half's own model was validated: ``found``.

        On the coordinator's images this counts as the sums do. On the hospitals' figures it is a
        suspicion only: a liar could turn them against another.
        """
        margin, (one, other) = self.config.rollback_margin, found
        if one is None or other is None or len(ruling.used) < 2:
            return ruling
        reasons = [figures.worse(one, [other], margin), figures.worse(other, [one], margin)]
        if not any(reasons):
            return ruling
        flags = [why is not None for why in reasons]
        x = SHIFT * (flags[0] - flags[1])
        seen = Seen(parts[0].members, parts[1].members, x, *flags)
        if self.judge is None:
            self.suspected.observe(seen)
        else:
            # In the place of what the norms said, which did not show this harm.
            self.suspects.seen[-1:] = [seen]
        return self._ruling(parts, reasons, False)

    def _ruling(
        self, parts: Sequence[Measured], reasons: Sequence[str | None], comparable: bool
    ) -> Ruling:
        used = [i for i, why in enumerate(reasons) if why is None]
        aside = [
            {"members": list(m.members), "why": why}
            for m, why in zip(parts, reasons, strict=True)
            if why is not None
        ]
        for one in aside:
            whom = "all" if len(parts) == 1 else ", ".join(one["members"])
            self.say(f"! the sum over {whom} is set aside: {one['why']}")
        told: dict[str, Any] = {"set_aside": aside} if aside else {}
        told |= self._name()
        if len(parts) == 2:
            look_on = bool(aside) or self.suspects.any_suspect(self.named)
            self.halves_left = QUIET if look_on else max(self.halves_left - 1, 0)
        elif aside:
            self.alarm("the next rounds are in halves, as far as there are hospitals enough")
        scale = 1.0 if used else self._smaller(parts)
        if comparable and used:
            self.norms = [*self.norms, min(parts[i].signal for i in used)][-_NORMS:]
            self.entries = [*self.entries, min(parts[i].largest for i in used)][-_NORMS:]
        return Ruling(used, scale, told)

    def _smaller(self, parts: Sequence[Measured]) -> float:
        """Share of the step where every sum was set aside.

        None of a sum over all: the next round asks the same hospitals again, in halves if that can
        be. Where both halves were harmed the next must part other hospitals, and may not do so for
        the same model: a quarter of what the rounds before would have taken.
        """
        if len(parts) == 1:
            return 0.0
        longest = max(m.norm for m in parts)
        usual = float(np.median(self.norms)) if self.norms else longest
        return SMALLER * min(1.0, usual / longest) if longest > 0 else 0.0

    def sifted(self, claimed: Mapping[str, float], norms: Mapping[str, float]) -> Sifted:
        """What each of a round's updates weighs, where they are seen one by one."""
        c = self.config
        if not self.on:
            return Sifted(claimed, {}, {})
        return sift(
            claimed, norms, agreed=self.agreed, most=c.max_examples, share=c.weight_cap,
            room=8 * COUNT_NOISE if c.privacy != "none" else 0.0,
        )  # fmt: skip

    def struck(self, set_aside: Mapping[str, str]) -> dict[str, Any]:
        """Note single updates that were set aside (secagg=false); who repeats it is named."""
        before = set(self.named)
        for name, why in set_aside.items():
            self.strikes[name] = self.strikes.get(name, 0) + 1
            if self.strikes[name] >= FEWEST_SEEN:
                self.named.setdefault(name, f"{self.strikes[name]} updates set aside; {why}")
        return self._newly(before)

    def _name(self) -> dict[str, Any]:
        before = set(self.named)
        for name, probability in self.suspects.named().items():
            halves = sum(seen.points_at(name) for seen in self.suspects.seen)
            why = f"its halves stood out {halves} times; probability {probability:.3f}"
            self.named.setdefault(name, why)
        return self._newly(before)

    def _newly(self, before: set[str]) -> dict[str, Any]:
        new = sorted(set(self.named) - before)
        for name in new:
            self.say(f"! {name} harms ({self.named[name]}): it is left out from now on")
        return {"named": new} if new else {}

    def shrunk(self, safe: Weights, tried: Weights) -> Weights:
        """The model that is tried next: :data:`SMALLER` of the way from ``safe`` to ``tried``."""
        after = dict(tried)
        for name, array in safe.items():
            if np.issubdtype(array.dtype, np.floating):
                start = array.astype(np.float64)
                after[name] = (start + SMALLER * (tried[name] - start)).astype(array.dtype)
        return after

    def summary(self) -> dict[str, Any]:
        """For summary.json: who is named and why, and who is suspected by figures alone."""
        return {
            "named": dict(sorted(self.named.items())),
            "suspected": sorted(n for n in self.suspected.named() if n not in self.named),
        }

    def memory(self) -> np.ndarray:
        """The state as bytes, (n,) uint8, for the run's store."""
        kept = {
            "norms": self.norms,
            "entries": self.entries,
            "validated": [v.as_dict() for v in self.validated],
            "suspects": self.suspects.as_list(),
            "suspected": self.suspected.as_list(),
            "named": self.named,
            "strikes": self.strikes,
            "halves_left": self.halves_left,
            "rolled_back": self.rolled_back,
        }
        return np.frombuffer(json.dumps(kept).encode(), dtype=np.uint8)

    def recall(self, memory: np.ndarray) -> None:
        """Go on with what :meth:`memory` kept."""
        kept = json.loads(memory.tobytes())
        self.norms, self.entries = kept["norms"], kept["entries"]
        self.validated = [figures.from_dict(v) for v in kept["validated"]]
        self.suspects = Suspects.from_list(kept["suspects"])
        self.suspected = Suspects.from_list(kept["suspected"])
        self.named, self.strikes = kept["named"], kept["strikes"]
        self.halves_left, self.rolled_back = kept["halves_left"], kept["rolled_back"]

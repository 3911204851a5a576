"""Who harms: from sums over two disjoint halves, and by how much one stood out beside the other.

Group testing with graded answers (Dorfman 1943; Bayesian as in Aldridge, Johnson and Scarlett,
*Group Testing: An Information Theory Perspective*, 2019). A hypothesis is a set of none, one or two
liars. What is seen of two halves is x, the logarithm of the ratio of their means' norms. With a
liar in neither or in both, x is taken for normal around 0; with one in the first alone, around
:data:`SHIFT`; with one in the second alone, around −SHIFT; with standard deviation
:data:`SCATTER` each time. A half that is impossible by itself (a weight that nobody agreed to, a
norm beyond all before) counts as well. So a liar that pauses is not cleared by one round, and an
honest hospital is not named by one that happens to be uneven.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

PRIOR = 0.05
"""Probability of a hospital's lying, before anything was seen."""
SHIFT, SCATTER = 0.55, 0.25
"""Of x. A hospital that sends ten times its update shifts it by 0.3 to 0.9; of honest halves of ten
hospitals its standard deviation is 0.1 (equal shares) to 0.25 (label skew)."""
LARGEST = 0.8
"""|x| counts as no more."""
SEEN, FALSE = 0.75, 0.05
"""Probability of an impossible half with a liar in it, and without one."""
NAMED_FROM = 0.95
"""Probability from which a hospital is named …"""
FEWEST_SEEN = 3
"""… if so many observations, at least, point at it."""
SUSPECT_FROM = 0.3
"""Probability from which it is worth while to look on."""
MOST_PAIRED = 200
"""Hospitals up to which pairs are considered."""
_KEPT = 64
_TRIES = 200


@dataclass(frozen=True)
class Seen:
    """One round's two halves."""

    one: tuple[str, ...]
    other: tuple[str, ...]
    x: float
    """Logarithm of the ratio of their norms, of ``one`` to ``other``."""
    one_harmed: bool = False
    """Whether it is impossible by itself."""
    other_harmed: bool = False

    def scores(self, hits_one: np.ndarray, hits_other: np.ndarray) -> np.ndarray:
        """Log-likelihood of each hypothesis, against that of no liar.

        ``hits_one``, ``hits_other`` (hypotheses,) bool: whether it has a liar in that half.
        """
        x = min(max(self.x, -LARGEST), LARGEST)
        only_one, only_other = hits_one & ~hits_other, hits_other & ~hits_one
        found = np.where(only_one, (x - SHIFT / 2) * SHIFT / SCATTER**2, 0.0)
        found += np.where(only_other, (-x - SHIFT / 2) * SHIFT / SCATTER**2, 0.0)
        if self.one_harmed or self.other_harmed:
            halves = ((self.one_harmed, hits_one), (self.other_harmed, hits_other))
            for harmed, hits in halves:
                gain = math.log(SEEN / FALSE) if harmed else math.log((1 - SEEN) / (1 - FALSE))
                found += np.where(hits, gain, 0.0)
        return found

    def points_at(self, name: str) -> bool:
        """Whether the half with ``name`` stood out."""
        if name in self.one:
            return self.one_harmed or (self.x > SHIFT / 2 and not self.other_harmed)
        if name in self.other:
            return self.other_harmed or (-self.x > SHIFT / 2 and not self.one_harmed)
        return False


@dataclass
class Suspects:
    """Observations of a run's halves."""

    seen: list[Seen] = field(default_factory=list)
    """The latest :data:`_KEPT`."""

    def observe(self, seen: Seen) -> None:
        """One round's."""
        self.seen = [*self.seen, seen][-_KEPT:]

    def probabilities(self, names: Sequence[str]) -> dict[str, float]:
        """Of each of ``names`` and of whoever was in a half that it lies."""
        everyone = {*names, *(n for s in self.seen for n in (*s.one, *s.other))}
        ordered = sorted(everyone)
        n = len(ordered)
        sets: list[tuple[int, ...]] = [(), *((i,) for i in range(n))]
        if n <= MOST_PAIRED:
            sets += combinations(range(n), 2)
        chosen = np.zeros((len(sets), n), dtype=bool)
        for k, members in enumerate(sets):
            chosen[k, list(members)] = True
        scores = chosen.sum(axis=1) * math.log(PRIOR / (1 - PRIOR))
        for seen in self.seen:
            hits = [
                np.asarray((chosen & np.isin(ordered, half)).any(axis=1))
                for half in (seen.one, seen.other)
            ]
            scores += seen.scores(*hits)
        mass = np.exp(scores - scores.max())
        found = (mass[:, None] * chosen).sum(axis=0) / mass.sum()
        return dict(zip(ordered, found.tolist(), strict=True))

    def named(self) -> dict[str, float]:
        """Hospitals that harm, as far as halves show, with their probability."""
        return {
            name: p
            for name, p in self.probabilities(()).items()
            if p >= NAMED_FROM and sum(s.points_at(name) for s in self.seen) >= FEWEST_SEEN
        }

    def most(self) -> float:
        """Largest probability of any hospital; 0 where nothing was seen."""
        return max(self.probabilities(()).values(), default=0.0)

    def any_suspect(self, without: Mapping[str, Any]) -> bool:
        """Whether somebody beside ``without`` is worth looking on: lately a half stood out."""
        if not any(abs(s.x) > SHIFT / 2 or s.one_harmed or s.other_harmed for s in self.seen[-4:]):
            return False
        found = self.probabilities(())
        return any(p >= SUSPECT_FROM for name, p in found.items() if name not in without)

    def split(
        self, names: Sequence[str], least: int, rng: np.random.Generator
    ) -> tuple[list[str], list[str]] | None:
        """Two disjoint halves of ``names``; None where one would have fewer than ``least``.

        Of many random ones that which parts the suspects best: the one in which the least
        probability is together on one side.
        """
        if len(names) < 2 * least:
            return None
        found = self.probabilities(names)
        ordered = sorted(names)
        p = np.array([found[name] for name in ordered])
        middle = len(ordered) // 2
        best, least_together = rng.permutation(len(ordered)), math.inf
        for _ in range(_TRIES if self.seen else 1):
            order = rng.permutation(len(ordered))
            together = float(p[order[:middle]].sum() ** 2 + p[order[middle:]].sum() ** 2)
            if together < least_together - 1e-12:
                best, least_together = order, together
        return sorted(ordered[i] for i in best[:middle]), sorted(ordered[i] for i in best[middle:])

    def as_list(self) -> list[dict[str, Any]]:
        """JSON-ready."""
        return [asdict(s) for s in self.seen]

    @classmethod
    def from_list(cls, value: Sequence[Mapping[str, Any]]) -> Suspects:
        """Undo :meth:`as_list`."""
        return cls([
            Seen(**{**s, "one": tuple(s["one"]), "other": tuple(s["other"])}) for s in value
        ])  # fmt: skip

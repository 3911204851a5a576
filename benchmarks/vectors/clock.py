"""The strategy of ``mode="vectors"`` on a simulated clock: training is real, waiting is not.

One unit of time is what an ordinary hospital with the mean number of images takes for one pass
over them. The rules are the run's own: a hospital that is free and has not delivered for the
current base trains from it; a base is published once ``publish_every`` vectors for the current one
have come, or once every hospital's has, unless it validates worse by more than the run config's
margin on the coordinator's public images; a vector for an older base enters with its smaller step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.vectors.world import Figures, Task, Workers, settings_of, sizes
from common.config import RunConfig
from common.model import Weights
from common.vectors import Contribution, Rule, bucket_of, candidate, judge


@dataclass(frozen=True)
class Hospital:
    """``slowness``: 10 takes ten times as long. ``away``: how long it is off, then on, in turn."""

    number: int
    slowness: float = 1.0
    away: float = 0.0

    def finish(self, begun: float, work: float) -> float:
        """When ``work`` (units of an ordinary hospital's time) is done; it rests while it is off.

        It is off first, so that its first vector is late already.
        """
        left, now = work * self.slowness, begun
        if not self.away:
            return now + left
        while True:
            into = now % (2 * self.away)
            if into < self.away:
                now += self.away - into
                into = self.away
            until_off = 2 * self.away - into
            if left <= until_off:
                return now + left
            now, left = now + until_off, left - until_off


@dataclass(frozen=True)
class Arrivals:
    """A base that was published: when, of how many vectors, and what it is worth."""

    time: float
    version: int
    vectors: int
    figures: Figures


@dataclass(order=True)
class _Vector:
    done: float
    hospital: int
    version: int = field(compare=False)
    serial: int = field(compare=False)


class Asynchronous:
    """Runs the strategy; ``run`` yields each published base."""

    def __init__(
        self, workers: Workers, config: RunConfig, hospitals: Sequence[Hospital], *,
        passes: int, publish_every: int, most_vectors: int = 0, until: float = float("inf"),
    ) -> None:  # fmt: skip
        self._workers, self._config = workers, config
        self._hospitals, self._passes, self._every = list(hospitals), passes, publish_every
        self._most, self._until = most_vectors, until
        self._sizes = sizes(config)
        self._mean = sum(self._sizes) / len(self._sizes)
        self._made = dict.fromkeys(range(len(self._hospitals)), 0)
        self._updates: dict[int, Weights] = {}

    def duration(self, hospital: int) -> float:
        """How long a vector takes where nothing is slow or off."""
        return self._passes * self._sizes[hospital] / self._mean

    def run(self, base: Weights) -> Iterator[Arrivals]:
        """Until ``until``, or until every hospital has made ``most_vectors``."""
        rule, bases = Rule.parse("mean"), [base]
        training: list[_Vector] = []
        pending: list[_Vector] = []
        done = dict.fromkeys(range(len(self._hospitals)), -1)
        serial = 0
        for i in done:
            serial = self._begin(training, i, 0, 0.0, serial)
        while training:
            vector = heapq.heappop(training)
            if vector.done > self._until:
                return
            pending.append(vector)
            done[vector.hospital] = vector.version
            current = len(bases) - 1
            if vector.version < current:  # it came late: the current base is offered at once
                serial = self._begin(training, vector.hospital, current, vector.done, serial)
            fresh = sum(v.version == current for v in pending)
            settled = not training
            if not (fresh >= self._every or settled):
                continue
            made = candidate(bases[-1], self._vectors(pending, bases), rule)
            if not self._adopt(bases[-1], made):
                continue  # more vectors may come
            bases.append(made)
            count, pending = len(pending), []
            yield Arrivals(vector.done, len(bases) - 1, count,
                           self._workers.measures(self._config, [bases[-1]])[0])  # fmt: skip
            busy = {v.hospital for v in training}
            for i in sorted(set(done) - busy):
                serial = self._begin(training, i, len(bases) - 1, vector.done, serial)

    def _adopt(self, current: Weights, made: Weights) -> bool:
        found = self._workers.judged(self._config, [current, made])
        errors = self._config.publish_margin
        return judge(*(f.accuracy for f in found), count=found[0].count, errors=errors).adopt

    def _begin(
        self, training: list[_Vector], hospital: int, version: int, now: float, serial: int
    ) -> int:
        if self._most and self._made[hospital] >= self._most:
            return serial
        self._made[hospital] += 1
        done = self._hospitals[hospital].finish(now, self.duration(hospital))
        heapq.heappush(training, _Vector(done, hospital, version, serial))
        return serial + 1

    def _vectors(self, pending: Sequence[_Vector], bases: Sequence[Weights]) -> list[Contribution]:
        """Their trainings, done now: nothing in between could have changed them."""
        settings = settings_of(self._config, self._passes)
        new = [v for v in pending if v.serial not in self._updates]
        tasks = [
            Task(self._config, v.hospital, bases[v.version], settings, draw=1000 + v.serial)
            for v in new
        ]
        made = self._workers.updates(tasks)
        self._updates |= {v.serial: update for v, update in zip(new, made, strict=True)}
        return [
            Contribution(f"{v.serial:032x}", f"hospital-{v.hospital:02d}", self._updates[v.serial],
                         float(bucket_of(self._sizes[v.hospital])), len(bases) - 1 - v.version)
            for v in pending
        ]  # fmt: skip

"""The simulated clock of the task-vector benchmarks keeps the strategy's rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.vectors.clock import Arrivals, Asynchronous, Hospital
from benchmarks.vectors.world import HOSPITALS, Figures, Task, Verdict, config_of, sizes
from common.config import RunConfig
from common.model import Weights

CONFIG = config_of(None, "size-skew", 0)


class NoTraining:
    """Workers whose updates say only who made them, and when they were asked."""

    def __init__(self, worth: Callable[[float], float] = lambda value: 0.9) -> None:
        self.tasks: list[Task] = []
        self.worth = worth

    def updates(self, tasks: Sequence[Task]) -> list[Weights]:
        self.tasks += tasks
        return [{"w": np.ones(1, dtype=np.float32)} for _ in tasks]

    def judged(self, config: RunConfig, models: Sequence[Weights]) -> list[Verdict]:
        return [Verdict(self.worth(float(m["w"][0])), 400) for m in models]

    def measures(self, config: RunConfig, models: Sequence[Weights]) -> list[Figures]:
        return [Figures(float(m["w"][0]), 0.0, 0.0, np.zeros((0, 2))) for m in models]


def bases(
    hospitals: Sequence[Hospital], worth: Callable[[float], float] = lambda value: 0.9, **how: float
) -> tuple[list[Arrivals], list[Task]]:
    workers = NoTraining(worth)
    clock = Asynchronous(workers, CONFIG, hospitals, passes=1, publish_every=5, **how)  # type: ignore[arg-type]
    return list(clock.run({"w": np.zeros(1, dtype=np.float32)})), workers.tasks


@given(
    begun=st.floats(0, 100), work=st.floats(0, 50), slowness=st.floats(1, 10),
    away=st.sampled_from([0.0, 0.5, 3.0, 10.0]),
)  # fmt: skip
def test_a_hospital_works_while_it_is_on_and_never_else(
    begun: float, work: float, slowness: float, away: float
) -> None:
    end = Hospital(0, slowness, away).finish(begun, work)
    on = end - begun
    if away:  # time before t that it was on

        def up(t: float) -> float:
            return t // (2 * away) * away + max(0.0, t % (2 * away) - away)

        on = up(end) - up(begun)
    assert on == pytest.approx(work * slowness, abs=1e-6)


def test_a_slow_hospital_delays_no_base_and_its_vectors_come_late() -> None:
    even, _ = bases([Hospital(i) for i in range(HOSPITALS)], until=6.0)
    slow, tasks = bases([Hospital(0, 10.0), *(Hospital(i) for i in range(1, 10))], until=30.0)
    # The fifth of the others ends each version: one place further back, at the worst.
    assert slow[0].time <= sorted(n / np.mean(sizes(CONFIG)) for n in sizes(CONFIG)[1:])[4] + 1e-9
    assert len([a for a in slow if a.time <= 6.0]) >= len(even) - 2
    assert sum(task.hospital == 0 for task in tasks) in (2, 3)


def test_every_hospital_makes_as_many_vectors_as_it_may() -> None:
    found, tasks = bases([Hospital(i, 1 + i / 9) for i in range(HOSPITALS)], most_vectors=3)
    assert [sum(t.hospital == i for t in tasks) for i in range(HOSPITALS)] == [3] * HOSPITALS
    assert sum(a.vectors for a in found) == 3 * HOSPITALS
    assert [a.version for a in found] == list(range(1, len(found) + 1))
    assert [a.time for a in found] == sorted(a.time for a in found)


def test_a_base_that_validates_worse_waits_for_more_vectors_and_none_is_trained_twice() -> None:
    even = [Hospital(i, 1 + i / 9) for i in range(HOSPITALS)]
    found, tasks = bases(even, worth=lambda value: 0.9 - 0.2 * (value > 1.5), most_vectors=4)
    assert len(found) == 1  # each further vector would make it worse
    drawn = [t.draw for t in tasks]
    assert len(set(drawn)) == len(drawn)

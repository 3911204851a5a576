"""What a round does to the model: a mean update with momentum, or a step of the server's optimizer.

The state that this has (the moving average, the optimizer's memory) can be set back to an earlier
moment, so that a round which turns out to have harmed the model has never been.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from common.config import RunConfig
from common.model import Weights
from server_app.averaged import Averaged
from server_app.rounds import Outcome, add_update, with_momentum
from server_app.server_step import ServerStep


@dataclass(frozen=True)
class Moment:
    """Everything that a round changes, before it did."""

    weights: Weights
    average: Weights
    count: int
    """Weights in the average."""
    optimizer: Mapping[str, np.ndarray] = field(default_factory=dict)

    def memory(self, model: Weights) -> dict[str, np.ndarray]:
        """As arrays, of which those that are ``model``'s own are left out."""
        kept = {
            f"safe/{of}/{name}": array
            for of, weights in (("latest", self.weights), ("average", self.average))
            for name, array in weights.items()
            if not np.array_equal(array, model[name])
        }
        kept |= {f"safe/step/{name}": array for name, array in self.optimizer.items()}
        return kept | {"safe/count": np.array([float(self.count)])}

    @classmethod
    def recall(cls, memory: Mapping[str, np.ndarray], model: Weights) -> Moment | None:
        """:meth:`memory` undone; None where there was none."""
        if "safe/count" not in memory:
            return None
        latest, average = (
            {n: memory.get(f"safe/{of}/{n}", array) for n, array in model.items()}
            for of in ("latest", "average")
        )
        start = "safe/step/"
        optimizer = {k.removeprefix(start): a for k, a in memory.items() if k.startswith(start)}
        return cls(latest, average, int(memory["safe/count"][0]), optimizer)


@dataclass
class Mover:
    """The model's way: ``step`` where rounds are steps of the server's optimizer."""

    config: RunConfig
    step: ServerStep | None = None

    def __post_init__(self) -> None:
        self.averaged = Averaged(self.config.ema)

    def moved(self, number: int, outcome: Outcome, weights: Weights, previous: Weights) -> Weights:
        """The weights after a round that counts; ``previous``: a round before."""
        if self.step is not None:
            assert outcome.total is not None
            moved = self.step.moved(weights, outcome.total, outcome.sums["examples"], number)
            if self.step.is_statistic(number):
                self.averaged.begin(moved)  # earlier weights were for other features
            else:
                self.averaged.add(moved)
            return moved
        assert outcome.mean_update is not None
        step = with_momentum(outcome.mean_update, weights, previous, self.config.server_momentum)
        moved = add_update(weights, step)
        self.averaged.add(moved)
        return moved

    def moment(self, weights: Weights) -> Moment:
        """Now, with these ``weights``, to go back to."""
        optimizer = {} if self.step is None else dict(self.step.memory)
        return Moment(weights, self.averaged.weights, self.averaged.count, optimizer)

    def back_to(self, moment: Moment) -> None:
        """As if nothing had been since."""
        self.averaged.weights, self.averaged.count = moment.average, moment.count
        if self.step is not None:
            self.step.memory = dict(moment.optimizer)

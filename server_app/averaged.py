"""The model of a run: its latest weights, or their moving average over the rounds (``ema``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from common.averaging import moving_average
from common.model import Weights


@dataclass
class Averaged:
    """The average so far. Without a ``decay`` it is the latest weights, and nothing is kept."""

    decay: float
    count: int = 0
    """Weights that went in."""
    weights: Weights = field(default_factory=dict)

    def begin(self, weights: Weights) -> None:
        """Begin anew with ``weights``: before the first round, or what came before has no worth."""
        self.weights, self.count = weights, 0

    def add(self, weights: Weights) -> None:
        """The weights after one more round."""
        if self.decay:
            self.weights = moving_average(
                self.weights, weights, decay=self.decay, averaged=self.count
            )
            self.count += 1
        else:
            self.weights = weights

    def memory(self, latest: Weights, before: Weights) -> dict[str, np.ndarray]:
        """What a resumed run needs beside the average: nothing where the latest weights are it.

        Entries that are the average's own (those that rounds do not move) are not kept twice.
        """
        if not self.decay:
            return {}
        kept = {
            f"{of}/{name}": array
            for of, weights in (("latest", latest), ("before", before))
            for name, array in weights.items()
            if not np.array_equal(array, self.weights[name])
        }
        return kept | {"averaged": np.array([float(self.count)])}

    def recall(self, memory: Mapping[str, np.ndarray], average: Weights) -> tuple[Weights, Weights]:
        """:meth:`memory` undone: (latest, before); ``average``: the last round's model."""
        self.weights, self.count = average, int(memory["averaged"][0])
        latest, before = (
            {n: memory.get(f"{of}/{n}", array) for n, array in average.items()}
            for of in ("latest", "before")
        )
        return latest, before

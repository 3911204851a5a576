"""A cell's input: who takes part, with which update and weight, and who is lost on the way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from common.aggregation import flatten

PARAMETERS = 4_802_120
"""Of the published DPResNet at width 1."""
RANGE = 0.125
"""Largest absolute value in an update: our segment's bound, and the stock clipping range."""
MAX_WEIGHT = 1000
"""Of both; the stock default."""

SERVER = "server"
SEED = 20_260_101

Layers = dict[str, npt.NDArray[np.float32]]
Means = dict[str, npt.NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell: who takes part, with how much, and how many are lost on the way.

    The first ``dropouts`` hospitals share their secrets and then never send a masked input.
    """

    parameters: int
    hospitals: int
    dropouts: int
    num_shares: int = 5
    threshold: int = 4

    @property
    def names(self) -> list[str]:
        """The hospitals' names."""
        return [f"hospital-{index:02d}" for index in range(self.hospitals)]

    @property
    def lost(self) -> frozenset[str]:
        """Who drops after its share and before its masked input."""
        return frozenset(self.names[: self.dropouts])

    @property
    def survivors(self) -> list[str]:
        """Who is in the sum."""
        return self.names[self.dropouts :]

    def weight(self, name: str) -> int:
        """The number of examples of ``name``: 100 to MAX_WEIGHT."""
        return int(generator(name, "weight").integers(100, MAX_WEIGHT + 1))

    def update(self, name: str) -> Layers:
        """The update of ``name``: float32, uniform in ±RANGE; made anew at each call."""
        flat = generator(name, "update").random(self.parameters, dtype=np.float32)
        flat -= 0.5
        flat *= 2 * RANGE
        return {key: flat[part] for key, part in self._parts().items()}

    def exact(self) -> Means:
        """The weighted mean over the survivors in plain float64."""
        total = np.zeros(self.parameters)
        for name in self.survivors:
            total += self.weight(name) * flatten(self.update(name)).astype(np.float64)
        total /= sum(map(self.weight, self.survivors))
        return {key: total[part] for key, part in self._parts().items()}

    def _parts(self) -> dict[str, slice]:
        edges = np.cumsum([0, *layer_lengths(self.parameters)]).tolist()
        return {f"{i:02d}": slice(*pair) for i, pair in enumerate(pairwise(edges))}


def layer_lengths(parameters: int) -> list[int]:
    """DPResNet's layers in their order, cut after ``parameters`` values (or one more added)."""
    channels = [3, 64, 128, 128, 128, 256, 256, 512, 512]
    lengths: list[int] = []
    for before, after in pairwise(channels):
        lengths += [9 * before * after, after, after]  # convolution; norm's scale and shift
    lengths += [512 * 8, 8]
    cut: list[int] = []
    for length in [*lengths, parameters]:
        left = parameters - sum(cut)
        if left > 0:
            cut.append(min(length, left))
    return cut


def generator(*labels: str) -> np.random.Generator:
    """The same numbers for the same labels, in every run."""
    digest = hashlib.sha256("/".join((str(SEED), *labels)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))

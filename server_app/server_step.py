"""A round as one step over all hospitals' images: the optimizer is the server's (FedSGD).

Secure aggregation opens Σ of the hospitals' clipped, noisy sums; divided by what a batch holds
(sampling rate × the announced numbers of images) it is DP-SGD's gradient over the union
(Abadi et al. 2016). With ``whitening`` the first rounds' sums are statistics of a prior's
features, which become part of the model.

What the optimizer remembers follows from such gradients alone, so it costs no privacy; it is kept
with the run, and a resumed run goes on with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from common.config import RunConfig
from common.errors import ConfigError
from common.model import ModelSpec, Weights, build_for
from common.prior.model import LOCAL_RIDGE, RIDGE, PriorHead, with_mean, with_whitening
from common.privacy.distributed import NoiseShares
from common.privacy.plan import (
    MEAN,
    SECOND_MOMENT,
    Promise,
    shares_of,
    statistic_noise,
    step_noise,
)
from common.privacy.statistics import NORM, statistic_length

_MOMENTUM = 0.9
_BETAS, _TINY = (0.9, 0.999), 1e-8
"""Of Adam (Kingma and Ba 2015), as usual; its weight decay is Loshchilov and Hutter's (2019)."""


@dataclass
class ServerStep:
    """The optimizer of a run of server steps, and how a sum is read."""

    config: RunConfig
    shapes: Mapping[str, tuple[int, ...]]
    """Trainable parameters, in the order in which hospitals send their gradients."""
    features: int
    """Coordinates of the features that the first rounds' statistics are of; 0: there are none."""
    noise_multiplier: float
    """σ of a step's sum."""
    statistics: Mapping[str, float]
    """σ of each statistic."""
    memory: dict[str, np.ndarray] = field(default_factory=dict)
    """``momentum/NAME``, or Adam's ``first/NAME`` and ``second/NAME``, float64; ``steps``."""

    @classmethod
    def of(cls, config: RunConfig, spec: ModelSpec) -> ServerStep:
        """For a run that begins. Calibrates the noise as hospitals do: seconds."""
        model, promise = build_for(config, spec), Promise.of(config)
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        features = model.features.spec.dimension if isinstance(model, PriorHead) else 0
        statistics = {name: statistic_noise(promise, name) for name in promise.statistics}
        return cls(config, shapes, features, step_noise(promise), statistics)

    def is_statistic(self, round: int) -> bool:
        """Whether ``round`` releases a statistic of the features, and no gradient."""
        return Promise.of(self.config).statistic_of(round) is not None

    def recall(self, memory: Mapping[str, np.ndarray]) -> None:
        """Go on with what was remembered (of :attr:`memory`'s names; others are another's)."""
        own = ("momentum/", "first/", "second/", "steps")
        self.memory = {k: v for k, v in memory.items() if k.startswith(own)}

    def shares(self, round: int) -> NoiseShares:
        """The noise of what ``round`` sums, as hospitals make it."""
        promise = Promise.of(self.config)
        name = promise.statistic_of(round)
        if name is not None:
            length = statistic_length(name, self.features)
            return shares_of(promise, self.statistics[name], length, clipping_norm=NORM)
        dimension = sum(math.prod(shape) for shape in self.shapes.values())
        return shares_of(promise, self.noise_multiplier, dimension)

    def rate(self, round: int) -> float:
        """The rate at which ``round`` samples privacy units: 1 for a statistic."""
        return 1.0 if self.is_statistic(round) else self.config.sampling_rate

    def summed(self, round: int, total: np.ndarray, examples: float, hospitals: int) -> np.ndarray:
        """(d,) float64: what the opened integers ``total`` of ``round`` stand for.

        ConfigError if a sum over so many images (as announced) may have wrapped around the ring.
        """
        shares = self.shares(round)
        largest = shares.largest(math.ceil(max(examples, 1.0)), hospitals)
        if largest >= 2.0 ** (self.config.ring_bits - 1):
            bits = 8 * math.ceil((math.log2(largest) + 1) / 8)
            raise ConfigError(
                f"ring-bits {self.config.ring_bits} are too few for a sum over {examples:.0f} "
                f"images on a grid of {shares.step:g}: it may wrap around",
                f"start a new run with ring-bits={bits}",
            )
        return shares.values(total)

    def moved(
        self, weights: Mapping[str, np.ndarray], total: np.ndarray, examples: float, round: int
    ) -> Weights:
        """``weights`` after ``round``, whose noisy sum is ``total``; the rest stays as it is."""
        count = max(examples, 1.0)
        name = Promise.of(self.config).statistic_of(round)
        if name == MEAN:
            return with_mean(weights, total, count)
        if name == SECOND_MOMENT:
            ridge = RIDGE if self.config.privacy == "distributed" else LOCAL_RIDGE
            return with_whitening(weights, total, count, ridge=ridge)
        return self._stepped(weights, total / (self.config.sampling_rate * count), round)

    def _stepped(
        self, weights: Mapping[str, np.ndarray], gradient: np.ndarray, round: int
    ) -> Weights:
        rate, decay = self.config.learning_rate_of(round), self.config.weight_decay
        steps = int(self.memory.get("steps", np.zeros(1))[0]) + 1
        self.memory["steps"] = np.array([float(steps)])
        after = dict(weights)
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        for (name, shape), part in zip(
            self.shapes.items(), np.split(gradient, ends[:-1]), strict=True
        ):
            g, value = part.reshape(shape), weights[name].astype(np.float64)
            if self._is_adam:
                direction = self._adam(name, g, steps) + decay * value
            else:
                direction = self._sgd(name, g + decay * value)
            value -= rate * direction
            after[name] = value.astype(weights[name].dtype)
        return after

    @property
    def _is_adam(self) -> bool:
        return self.config.optimizer == "adam"

    def _sgd(self, name: str, g: np.ndarray) -> np.ndarray:
        return self._remember("momentum", name, _MOMENTUM, g)

    def _adam(self, name: str, g: np.ndarray, steps: int) -> np.ndarray:
        first = self._remember("first", name, _BETAS[0], (1 - _BETAS[0]) * g)
        second = self._remember("second", name, _BETAS[1], (1 - _BETAS[1]) * g * g)
        mean, square = first / (1 - _BETAS[0] ** steps), second / (1 - _BETAS[1] ** steps)
        return np.asarray(mean / (np.sqrt(square) + _TINY))

    def _remember(self, what: str, name: str, share: float, new: np.ndarray) -> np.ndarray:
        key = f"{what}/{name}"
        before = self.memory.get(key)
        self.memory[key] = new.copy() if before is None else share * before + new
        return self.memory[key]

"""A round as one step over all hospitals' images: the optimizer is the server's (FedSGD).

Secure aggregation opens Σ of the hospitals' clipped, noisy sums; divided by what a batch holds
(sampling rate × the announced numbers of images) it is DP-SGD's gradient over the union
(Abadi et al. 2016). What the optimizer remembers follows from such gradients alone, so it costs
no privacy; it is kept with the run, and a resumed run goes on with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from common.config import RunConfig
from common.errors import ConfigError
from common.model import ModelSpec, Weights, build
from common.privacy.distributed import NoiseShares
from common.privacy.plan import Promise, shares_of, step_noise

_MOMENTUM = 0.9
_BETAS, _TINY = (0.9, 0.999), 1e-8
"""Of Adam (Kingma and Ba 2015), as usual."""


@dataclass
class ServerStep:
    """The optimizer of a run of server steps, and how a sum is read."""

    config: RunConfig
    shapes: Mapping[str, tuple[int, ...]]
    """Trainable parameters, in the order in which hospitals send their gradients."""
    shares: NoiseShares
    memory: dict[str, np.ndarray] = field(default_factory=dict)
    """``NAME/of/PARAMETER`` → float64 array: momentum, or Adam's two moments; and ``steps``."""

    @classmethod
    def of(cls, config: RunConfig, spec: ModelSpec) -> ServerStep:
        """For a run that begins. Calibrates the noise as hospitals do: seconds."""
        model = build(spec)
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        promise = Promise.of(config)
        dimension = sum(math.prod(shape) for shape in shapes.values())
        return cls(config, shapes, shares_of(promise, step_noise(promise), dimension))

    def gradient(self, total: np.ndarray, examples: float, hospitals: int) -> Weights:
        """The noisy mean gradient (float64) of the opened sum ``total`` (d,) over ``hospitals``.

        ConfigError if a sum of so many images may have wrapped around the ring.
        """
        largest = self.shares.largest(round(examples), hospitals)
        if largest >= 2.0 ** (self.config.ring_bits - 1):
            bits = 8 * math.ceil((math.log2(largest) + 1) / 8)
            raise ConfigError(
                f"ring-bits {self.config.ring_bits} are too few for a sum over {examples:.0f} "
                f"images on a grid of {self.shares.step:g}: it may wrap around",
                f"start a new run with ring-bits={bits}",
            )
        values = self.shares.values(total) / (self.config.sampling_rate * max(examples, 1.0))
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])
        parts = np.split(values, ends[:-1])
        return {n: v.reshape(s) for (n, s), v in zip(self.shapes.items(), parts, strict=True)}

    def moved(self, weights: Mapping[str, np.ndarray], gradient: Weights, round: int) -> Weights:
        """``weights`` after one step of ``round``; what is not trained stays as it is."""
        rate = self.config.learning_rate_of(round)
        steps = int(self.memory.get("steps", np.zeros(1))[0]) + 1
        self.memory["steps"] = np.array([float(steps)])
        after = dict(weights)
        for name, g in gradient.items():
            direction = self._adam(name, g, steps) if self._is_adam else self._sgd(name, g)
            value = weights[name].astype(np.float64) - rate * direction
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

"""Merge rules: from the vectors of one base to one update of it; pure functions.

Sums are in float64 and in the order of the serials, so that a result depends, to the last bit,
on which vectors there are and not on the order in which they came. Measured on ten hospitals:
the size-weighted mean is the safe default; the plain sum needs λ of about s/n with s from 0.5 to
1.5, and λ = 1 destroys the model.

Sources: sum, arXiv 2408.13038 (θ + λ Σ τ); TIES, Yadav et al., NeurIPS 2023, arXiv 2306.01708;
DARE, Yu et al., ICML 2024, arXiv 2311.03099.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from common.errors import ConfigError
from common.secagg.binding import canonical
from common.vectors.errors import VectorError
from common.vectors.tensors import Arrays
from common.vectors.vector import check_shapes, norm_of

Update = dict[str, np.ndarray]
"""Entry → float64 array, sorted by name."""


@dataclass(frozen=True, eq=False)
class Contribution:
    """A vector as a rule sees it. ``weight``: its bucket of images, above 0.

    ``staleness``: how many bases were published between its own and the current one.
    """

    serial: str
    hospital: str
    values: Arrays
    weight: float
    staleness: int = 0


def in_order(contributions: Sequence[Contribution]) -> list[Contribution]:
    """Sorted by serial; VectorError if one comes twice, weighs nothing, or shapes differ."""
    found = sorted(contributions, key=lambda c: c.serial)
    serials = [c.serial for c in found]
    if len(set(serials)) != len(serials):
        raise VectorError(
            "merge-duplicate", "a vector is to be merged twice", "give each vector once"
        )
    for c in found:
        if not (math.isfinite(c.weight) and c.weight > 0 and c.staleness >= 0):
            raise VectorError(
                "merge-weight",
                f"vector {c.serial} has weight {c.weight} and staleness {c.staleness}",
                "give a weight above 0 and a staleness from 0",
            )
        first = {k: tuple(v.shape) for k, v in found[0].values.items()}
        check_shapes(first, {k: tuple(v.shape) for k, v in c.values.items()})
    return found


def server_step(staleness: int) -> float:
    """0.3 · (1 + staleness)^−½: how far a single vector of an older base moves the model.

    With a full step for each arrival the accuracy was measured to swing between 44 and 90 %.
    """
    return 0.3 / math.sqrt(1 + staleness)


def weighted_sum(contributions: Sequence[Contribution], factors: Sequence[float]) -> Update:
    """Σ factor · values in float64, in the order given."""
    made: Update = {}
    for name in sorted(contributions[0].values):
        total = np.zeros(contributions[0].values[name].shape, dtype=np.float64)
        for c, factor in zip(contributions, factors, strict=True):
            total += np.multiply(c.values[name], factor, dtype=np.float64)
        made[name] = total
    return made


def shares(contributions: Sequence[Contribution]) -> list[float]:
    """Each weight over the sum of the weights."""
    total = math.fsum(c.weight for c in contributions)
    return [c.weight / total for c in contributions]


Parameters = Mapping[str, float]


def _mean(given: Sequence[Contribution], _: Parameters) -> Update:
    return weighted_sum(given, shares(given))


def _sum(given: Sequence[Contribution], parameters: Parameters) -> Update:
    return weighted_sum(given, [parameters["lambda"]] * len(given))


def _norm_equalised(given: Sequence[Contribution], _: Parameters) -> Update:
    norms = [norm_of(c.values) for c in given]
    some = [n for n in norms if n > 0]
    target = float(np.median(some)) if some else 0.0
    factors = [
        share * (target / norm if norm else 0.0)
        for share, norm in zip(shares(given), norms, strict=True)
    ]
    return weighted_sum(given, factors)


def _ties(given: Sequence[Contribution], parameters: Parameters) -> Update:
    """Trim, elect the sign of the greater weighted mass, mean of those that agree with it."""
    thresholds = [_threshold(c.values, parameters["keep"]) for c in given]
    weights = shares(given)
    made: Update = {}
    for name in sorted(given[0].values):
        trimmed = []
        for c, threshold in zip(given, thresholds, strict=True):
            values = c.values[name].astype(np.float64)
            trimmed.append(np.where(np.abs(values) >= threshold, values, 0.0))
        mass = sum((w * t for w, t in zip(weights, trimmed, strict=True)), np.zeros(()))
        elected = np.sign(mass)
        total, weight = np.zeros_like(mass), np.zeros_like(mass)
        for w, t in zip(weights, trimmed, strict=True):
            agrees = (np.sign(t) == elected) & (elected != 0)
            total += np.where(agrees, w * t, 0.0)
            weight += np.where(agrees, w, 0.0)
        made[name] = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    return made


def _threshold(values: Arrays, keep: float) -> float:
    """The magnitude from which an entry is among the vector's greatest ``keep``; ties stay."""
    magnitudes = np.concatenate([np.abs(values[k]).ravel() for k in sorted(values)])
    dropped = magnitudes.size - max(1, math.ceil(keep * magnitudes.size))
    return float(np.partition(magnitudes, dropped)[dropped])


def _dare(given: Sequence[Contribution], parameters: Parameters) -> Update:
    """Each entry is dropped with probability p, the others are divided by 1 − p; then the mean."""
    drop = parameters["drop"]
    kept = []
    for c in given:
        masked = {
            name: np.where(_kept(c.serial, name, array.size, drop).reshape(array.shape), array, 0)
            for name, array in c.values.items()
        }
        kept.append(Contribution(c.serial, c.hospital, masked, c.weight))
    return weighted_sum(kept, [share / (1.0 - drop) for share in shares(given)])


def _kept(serial: str, name: str, size: int, drop: float) -> np.ndarray:
    """Which entries of a tensor stay: 32 ChaCha20 bits each, keyed by serial and name.

    So the mask is the same for every run and order, and independent between vectors.
    """
    key = hashlib.sha256(canonical("dare mask", serial, name)).digest()
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, dtype="<u4") >= np.uint32(int(drop * 2**32))


@dataclass(frozen=True)
class Parameter:
    """A rule's number: ``default`` (None: must be given), from ``low`` to ``high``."""

    default: float | None
    low: float
    high: float
    meaning: str


@dataclass(frozen=True)
class Kind:
    """A rule by name: its function (of sorted contributions), its parameters, its meaning."""

    merge: Callable[[Sequence[Contribution], Parameters], Update]
    parameters: Mapping[str, Parameter]
    meaning: str


_SCALE = Parameter(1.0, 0.0, 10.0, "factor s on the merged update")
_LAMBDA = Parameter(None, 1e-6, 10.0, "λ on the sum; about s/n for n hospitals, s from 0.5 to 1.5")
_KEEP = Parameter(0.2, 1e-3, 1.0, "fraction of each vector's entries that stay, the greatest")
_DROP = Parameter(0.5, 0.0, 0.99, "probability with which an entry is dropped")

RULES: Mapping[str, Kind] = {
    "mean": Kind(_mean, {}, "mean, weighted by the buckets of images"),
    "sum": Kind(_sum, {"lambda": _LAMBDA}, "unweighted sum times λ (the data-vectors paper)"),
    "norm-equalised": Kind(_norm_equalised, {}, "every vector brought to the median norm; mean"),
    "ties": Kind(_ties, {"keep": _KEEP}, "trim, elect sign, disjoint weighted mean"),
    "dare": Kind(_dare, {"drop": _DROP}, "random entries dropped, the rest rescaled; mean"),
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A merge rule with its parameters: ``scale`` and its own. Made by :meth:`parse`."""

    name: str = "mean"
    scale: float = 1.0
    parameters: Parameters = field(default_factory=dict)

    @classmethod
    def parse(cls, name: str, parameters: Mapping[str, object] | None = None) -> Rule:
        """Check and fill in defaults; ConfigError names the rule or the parameter at fault."""
        kind = RULES.get(name)
        if kind is None:
            raise ConfigError(f"unknown merge rule '{name}'", f"use one of: {', '.join(RULES)}")
        known = {"scale": _SCALE, **kind.parameters}
        given = dict(parameters or {})
        for key in given:
            if key not in known:
                raise ConfigError(
                    f"the merge rule '{name}' has no parameter '{key}'",
                    f"its parameters are: {', '.join(known)}",
                )
        values = {key: _number(name, key, p, given.get(key)) for key, p in known.items()}
        return cls(name=name, scale=values.pop("scale"), parameters=values)

    @classmethod
    def from_text(cls, text: str) -> Rule:
        """``NAME`` or ``NAME key=value …``, as in ``ties keep=0.2 scale=0.8``; ConfigError."""
        name, *pairs = text.split() or [""]
        found: dict[str, object] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            try:
                number = float(value)
            except ValueError:
                equals, number = "", 0.0
            if not equals or key in found:
                raise ConfigError(
                    f"'{pair}' in the merge rule '{text}' is not key=number, or stands twice",
                    "write it like: ties keep=0.2 scale=0.8",
                )
            found[key] = number
        return cls.parse(name, found)

    def to_dict(self) -> dict[str, object]:
        """As it is kept in a recipe; :meth:`from_dict` reads it."""
        return {"rule": self.name, "scale": self.scale, **self.parameters}

    @classmethod
    def from_dict(cls, told: Mapping[str, object]) -> Rule:
        """What :meth:`to_dict` wrote; ConfigError as :meth:`parse`."""
        return cls.parse(str(told.get("rule")), {k: v for k, v in told.items() if k != "rule"})

    def scaled(self, scale: float) -> Rule:
        """The same rule with another scale."""
        return Rule.from_dict(self.to_dict() | {"scale": scale})

    def merge(self, contributions: Sequence[Contribution]) -> Update:
        """The update of the base: scale · rule(vectors), float64, for every order the same.

        Staleness plays no part here: see :mod:`common.vectors.candidate`. VectorError
        (``merge-…``) for no vectors, a vector twice, a bad weight, or shapes that differ.
        """
        given = in_order(contributions)
        if not given:
            raise VectorError("merge-empty", "there is no vector to merge", "wait for vectors")
        update = RULES[self.name].merge(given, self.parameters)
        return {name: np.asarray(self.scale * array) for name, array in update.items()}

    def warning(self, count: int) -> str | None:
        """What is doubtful about merging ``count`` vectors so; None if nothing is known."""
        factor = self.scale * self.parameters.get("lambda", 0.0) * count
        if self.name != "sum" or factor <= 2:
            return None
        return (
            f"λ·n is {factor:.3g} for {count} vectors; above 2 the sum was measured to destroy "
            f"the model (20 % at λ = 1, n = 10). Use λ of about {1 / count:.2g}, or the mean."
        )


def _number(rule: str, key: str, parameter: Parameter, given: object) -> float:
    value = parameter.default if given is None else given
    if value is None:
        raise ConfigError(f"the merge rule '{rule}' needs '{key}'", f"give it: {parameter.meaning}")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not parameter.low <= float(value) <= parameter.high:  # type: ignore[arg-type]
        raise ConfigError(
            f"'{key}' of the merge rule '{rule}' is {value!r}",
            f"give a number from {parameter.low:g} to {parameter.high:g}: {parameter.meaning}",
        )
    return float(value)  # type: ignore[arg-type]

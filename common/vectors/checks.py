"""What a vector must satisfy before it is stored; the rules, without the store.

Every refusal is a :class:`~common.vectors.errors.VectorError` with a stable code:
``vector-format``, ``vector-finite`` and ``vector-signature`` (reading and verifying an
envelope); ``vector-hospital`` (nobody of the roster), ``vector-base`` (unknown or taken back),
``vector-stale`` (retired or too old a base), ``vector-shape``, ``vector-bucket``, ``vector-norm``
(here); ``vector-serial`` (another vector has it), ``vector-withdrawn``, ``vector-used`` (the
hospital's vector for that base is in a published one already), ``vector-many`` (the hospital has
sent its vector for that base anew too often).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from common.errors import ConfigError
from common.vectors.errors import VectorError
from common.vectors.tensors import LIMIT
from common.vectors.vector import TaskVector, check_shapes

ENOUGH_NORMS = 4
"""Accepted vectors from which on their median norm means something."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is accepted. ``max_norm``: absolute; ``norm_factor``: times the median norm.

    ``max_bucket``: a hospital that claims more images than this is refused, since the claim is
    its weight in the mean. ``max_staleness``: None for no bound. ``max_replacements``: how many
    vectors a hospital may send for one base, of which the newest counts. ``max_bytes``: of an
    envelope.
    ConfigError for what makes no sense.
    """

    max_norm: float = 1000.0
    norm_factor: float = 5.0
    max_bucket: int = 1 << 14
    max_staleness: int | None = None
    max_replacements: int = 8
    max_bytes: int = LIMIT

    def __post_init__(self) -> None:
        wrong = [
            name
            for name, fine in (
                ("max_norm", math.isfinite(self.max_norm) and self.max_norm > 0),
                ("norm_factor", math.isfinite(self.norm_factor) and self.norm_factor >= 1),
                ("max_bucket", self.max_bucket >= 1),
                ("max_staleness", self.max_staleness is None or self.max_staleness >= 0),
                ("max_replacements", self.max_replacements >= 1),
                ("max_bytes", self.max_bytes > 0),
            )
            if not fine
        ]
        if wrong:
            raise ConfigError(
                f"the limit {wrong[0]} is {getattr(self, wrong[0])!r}",
                "give positive, finite limits, and a norm factor of at least 1",
            )


def check_fit(
    vector: TaskVector,
    template: Mapping[str, tuple[int, ...]],
    accepted_norms: Sequence[float],
    limits: Limits,
) -> float:
    """The vector's norm, if it may be merged into a base of ``template``.

    ``accepted_norms``: of the vectors that count at present; from four on, a norm above
    ``norm_factor`` times their median is refused. VectorError: ``vector-shape``,
    ``vector-bucket``, ``vector-norm``.
    """
    check_shapes(template, vector.shapes())
    if vector.bucket > limits.max_bucket:
        raise VectorError(
            "vector-bucket",
            f"{vector.hospital} claims {vector.bucket} images or more; allowed is "
            f"{limits.max_bucket}",
            "ask the hospital; raise the limit if it is true",
        )
    norm, bound = vector.norm(), limits.max_norm
    if len(accepted_norms) >= ENOUGH_NORMS:
        bound = min(bound, limits.norm_factor * median(accepted_norms))
    if norm > bound:
        raise VectorError(
            "vector-norm",
            f"the vector of {vector.hospital} has norm {norm:.4g}; at most {bound:.4g} is accepted",
            "fine-tune with a lower learning rate or fewer epochs",
        )
    return norm


@dataclass(frozen=True)
class Place:
    """Where a vector stands among those of its hospital and base."""

    serial: str
    created: str


def newest(places: Iterable[Place]) -> str:
    """The serial that counts: of the latest ``created``, then of the greatest serial.

    By what the hospital signed, not by arrival: so the result does not depend on the order.
    """
    return max(places, key=lambda place: (place.created, place.serial)).serial

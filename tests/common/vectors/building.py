"""Small bases, vectors and a small problem: what the tests of vectors are made of."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.secagg.keys import Identity
from common.vectors import Base, Contribution, SignedVector, TaskVector

MODEL = hashlib.sha256(b"a small model").digest()
CREATED = "2026-01-01T00:00:00Z"


def identity(name: str) -> Identity:
    """A hospital's key, the same each time."""
    return Identity(hashlib.sha256(name.encode()).digest())


def serial(number: int) -> str:
    """A serial that looks random: the order of serials is not that of the numbers."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def weights(seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Four floating entries of two types, one of them a number, and a counter."""
    rng = np.random.default_rng(seed)
    return {
        "head.weight": (scale * rng.normal(size=(3, 4))).astype(np.float32),
        "body.bias": (scale * rng.normal(size=5)).astype(np.float32),
        "body.half": (scale * rng.normal(size=(2, 2))).astype(np.float16),
        "number": np.array(scale * rng.normal(), dtype=np.float32),
        "steps": np.array(seed, dtype=np.int64),
    }


def base(seed: int = 0, **changes: Any) -> Base:
    """Version 0, pre-trained."""
    told = {"version": 0, "parent": None, "model_digest": MODEL, "pretrained": True}
    return Base(weights=weights(seed), **(told | changes))


def values(seed: int, scale: float = 0.1) -> dict[str, np.ndarray]:
    """What a vector for :func:`base` holds."""
    rng = np.random.default_rng(1000 + seed)
    shapes = base().template()
    return {k: np.asarray(scale * rng.normal(size=s), np.float32) for k, s in shapes.items()}


def vector(number: int, **changes: Any) -> TaskVector:
    """The vector of hospital ``h<number>`` for :func:`base`."""
    told: dict[str, Any] = {
        "hospital": f"h{number}",
        "base": base().id,
        "serial": serial(number),
        "values": values(number),
        "bucket": 1 << (number % 5),
        "created": CREATED,
    }
    return TaskVector(**(told | changes))


def envelope(made: TaskVector) -> bytes:
    """Signed by its hospital."""
    return SignedVector.sign(made, identity(made.hospital)).to_bytes()


def contribution(number: int, staleness: int = 0, **changes: Any) -> Contribution:
    """:func:`vector`, as a rule sees it."""
    made = vector(number, **changes)
    return Contribution(made.serial, made.hospital, made.values, float(made.bucket), staleness)


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    """Equal to the last bit, types included."""
    return list(a) == list(b) and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


# Three clouds in the plane, told apart by a linear map: a problem that numpy trains in no time.

CENTRES = np.array([[0.0, 2.0], [-1.7, -1.0], [1.7, -1.0]])


def clouds(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Points (count, 2) and classes (count,)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, size=count)
    return CENTRES[labels] + rng.normal(scale=1.0, size=(count, 2)), labels


def fit(
    start: Mapping[str, np.ndarray], points: np.ndarray, labels: np.ndarray, steps: int = 30
) -> dict[str, np.ndarray]:
    """Softmax regression from ``start``, by gradient descent."""
    w, b = start["w"].astype(np.float64), start["b"].astype(np.float64)
    for _ in range(steps):
        logits = points @ w + b
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        gap = odds / odds.sum(axis=1, keepdims=True) - np.eye(3)[labels]
        w, b = w - 0.5 * points.T @ gap / len(points), b - 0.5 * gap.mean(axis=0)
    return {"w": w.astype(np.float32), "b": b.astype(np.float32)}


def accuracy(model: Mapping[str, np.ndarray], seed: int = 99, count: int = 2000) -> float:
    """On points that no hospital has."""
    points, labels = clouds(seed, count)
    found = np.argmax(points @ model["w"] + model["b"], axis=1)
    return float((found == labels).mean())


def weak_base() -> Base:
    """Somewhat trained, on five points."""
    start = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    made = fit(start, *clouds(7, 5), steps=2)
    return Base(version=0, parent=None, model_digest=MODEL, weights=made, pretrained=True)

"""Registries with small bases, and what the tests ask of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.vectors import Base, Limits, Rule, TaskVector, VectorError, Withdrawal
from server_app.registry import Accepted, Registry
from tests.common.vectors.building import base, envelope, identity, serial, values, vector

MEAN = Rule()
SMALL = base()
KEYS = {f"h{n}": identity(f"h{n}").public for n in range(60)}


@contextmanager
def fresh(limits: Limits | None = None, first: Base | None = SMALL) -> Iterator[Registry]:
    """A registry with the small base (or ``first``), in a folder that goes with it."""
    with tempfile.TemporaryDirectory() as folder, Registry(Path(folder), limits) as made:
        if first is not None:
            made.add_base(first)
        yield made


def send(registry: Registry, number: int, **changes: Any) -> Accepted:
    """Vector ``number`` arrives."""
    return registry.accept(envelope(vector(number, **changes)), KEYS)


def arrives(registry: Registry, made: TaskVector) -> Accepted:
    """``made`` arrives."""
    return registry.accept(envelope(made), KEYS)


def withdrawal(number: int, hospital: str = "") -> bytes:
    """The hospital takes vector ``number`` back."""
    name = hospital or f"h{number}"
    return Withdrawal.sign(name, serial(number), identity(name)).to_bytes()


def states(registry: Registry) -> dict[str, str]:
    """Serial → state."""
    return {entry.row.serial: entry.state for entry in registry.vectors()}


def ids(registry: Registry) -> list[tuple[int, str]]:
    """Version and id of every base of the line."""
    return [(row.version, row.id) for row in registry.log().line]


def content(registry: Registry) -> dict[str, object]:
    """All that matters of a registry, whenever it was written and in whatever order."""
    log = registry.log()
    proposal = registry.candidate(MEAN)
    return {
        "line": ids(registry),
        "recipes": {p.version: p.serials() for p in log.points},
        "vectors": {
            v.serial: (v.hospital, v.base, v.bucket, v.norm, v.digest, log.states[v.serial])
            for v in log.vectors
        },
        "candidate": {k: v.tobytes() for k, v in proposal.weights.items()},
        "files": sorted(
            str(p.relative_to(registry.folder)) for p in registry.folder.rglob("*.safetensors*")
        ),
    }


def refused(code: str, do: Callable[..., object], *args: Any, **kwargs: Any) -> VectorError:
    """The error of ``do``, with ``code``."""
    with pytest.raises(VectorError) as caught:
        do(*args, **kwargs)
    assert caught.value.code == code, caught.value
    assert caught.value.what and caught.value.remedy
    return caught.value


def refuses(registry: Registry, code: str, do: Callable[..., object], *args: Any) -> VectorError:
    """As :func:`refused`, and the registry is as it was."""
    before = content(registry)
    error = refused(code, do, *args)
    assert content(registry) == before
    return error


def near(number: int, **changes: Any) -> TaskVector:
    """A vector of an ordinary norm."""
    return vector(number, values=values(number), **changes)


def bits(weights: Any) -> dict[str, bytes]:
    """For comparing to the last bit."""
    return {k: np.asarray(v).tobytes() for k, v in weights.items()}

"""Keys, times and entropy that are the same each time: what golden files are made from.

The keys are test keys, made from names; they open nothing, and nothing that matters is under them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    derive_private_key,
)

from common.secagg import Identity

FOLDER = Path(__file__).resolve().parent
MOMENT = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def identity(name: str) -> Identity:
    """A test key (Ed25519)."""
    return Identity(hashlib.sha256(f"golden {name}".encode()).digest())


def node_key(name: str) -> EllipticCurvePrivateKey:
    """A test key (ECDSA P-384)."""
    digest = hashlib.sha384(f"golden node {name}".encode()).digest()
    return derive_private_key(int.from_bytes(digest[:40], "big"), SECP384R1())


def stream(label: str) -> Callable[[int], bytes]:
    """Bytes that look random and are the same each time, in place of the system's entropy."""
    number = count()
    return lambda size: hashlib.shake_256(f"golden {label} {next(number)}".encode()).digest(size)


@contextmanager
def frozen(*modules: str) -> Iterator[None]:
    """``datetime.now`` of these modules starts at :data:`MOMENT` and goes on by a second a call."""
    number = count()

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return MOMENT + timedelta(seconds=next(number))

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch(f"{module}.datetime", Frozen))
        yield

"""Runs whose hospitals judge: their settings, and hospitals that count as a test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from client_app import tuning
from common.messages import Comparison
from server_app.vectors import federated
from tests.server_app.vectors.running import TINY, registry

JUDGED: dict[str, Any] = {
    **TINY, "judged-by": "hospitals", "publish-every": 3, "stage-timeout": 4.0,
}  # fmt: skip
Counts = Callable[[Comparison, str], tuple[int, int]]
"""(what is asked, hospital) → (gained, lost)."""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hospitals that owe an answer are waited for no longer than a moment."""
    for name in ("LOOK", "FIRST_PAUSE"):
        monkeypatch.setattr(federated, name, 0.05)


def counted(monkeypatch: pytest.MonkeyPatch, say: Counts) -> list[tuple[bytes, str, int, int]]:
    """Hospitals count as ``say`` says, and it is written down."""
    found: list[tuple[bytes, str, int, int]] = []

    def watched(asked: Comparison, hospital: Any) -> tuple[int, int]:
        counts = say(asked, hospital.name)
        found.append((asked.models, hospital.name, *counts))
        return counts

    monkeypatch.setattr(tuning, "compare", watched)
    return found


def gate(version: int) -> dict[str, Any]:
    """What the registry keeps of a publication's judgement."""
    with registry() as opened:
        (row,) = [p for p in opened.log().points if p.version == version]
        return dict(json.loads(row.gate))

"""What the server keeps of vectors: nothing is lost by its own faults, nothing counts twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.vectors import VectorError
from deploy.inprocess import run_in_process
from server_app.registry import Registry
from server_app.vectors.record import hospitals_validation
from tests.common.vectors.building import base as small_base
from tests.common.vectors.building import serial
from tests.server_app.registry.building import arrives, fresh, near
from tests.server_app.vectors.test_resumed import states, withdrawn
from tests.server_app.vectors.test_strategy import (
    TINY,
    base,
    lines,
    outbox,
    quick,
    the_run,
    trained,
)

__all__ = ["base", "quick", "trained"]  # fixtures


def failing(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The registry cannot do this once, as where the disk is full; the codes of its errors."""
    failed: list[str] = []
    method = getattr(Registry, name)

    def cannot(self: Registry, *given: Any) -> Any:
        if not failed:
            failed.append("registry-unusable")
            raise VectorError(failed[0], "the registry cannot be used", "make room on the disk")
        return method(self, *given)

    monkeypatch.setattr(Registry, name, cannot)
    return failed


def test_a_vector_that_the_registry_could_not_keep_is_asked_for_again_and_not_refused(
    base: str, trained: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    failed = failing("accept", monkeypatch)
    run_in_process({**TINY, "base": base, "publish-every": 3}, num_hospitals=3)
    assert failed and set(trained.values()) == {1}
    assert lines("base")[1]["vectors"] == 3
    assert not lines("refused")
    assert {item.state for i in range(3) for item in outbox(i).items()} == {"sent"}
    assert "what it sent could not be kept" in capsys.readouterr().out


def test_a_withdrawal_that_the_registry_could_not_note_is_asked_for_again(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**TINY, "base": base, "publish-every": 3}
    run_in_process(settings, num_hospitals=3)
    taken = withdrawn(1)
    failed = failing("withdraw", monkeypatch)
    run_in_process({**settings, "resume": the_run().name}, num_hospitals=3)
    assert failed and states()[taken] == "withdrawn"
    assert not lines("refused")


def test_what_hospitals_say_of_a_base_counts_once_for_each_and_not_of_what_is_excluded(
    tmp_path: Path,
) -> None:
    def told(correct: float) -> dict[str, float]:
        return {"val-correct": correct, "val-examples": 100.0}

    with fresh() as registry:
        arrives(registry, near(1, metrics=told(60.0)))
        arrives(registry, near(2, metrics=told(90.0)))
        first = small_base().id
        assert hospitals_validation(registry) == {first: pytest.approx(0.75)}
        for n in (3, 4):  # made anew, twice
            arrives(registry, near(n, hospital="h2", created="2030-01-01T00:00:00Z",
                                   metrics=told(90.0)))  # fmt: skip
        assert hospitals_validation(registry) == {first: pytest.approx(0.75)}
        arrives(registry, near(5, metrics=told(100.0)))
        registry.exclude(serial(5), "harms")
        assert hospitals_validation(registry) == {first: pytest.approx(0.75)}

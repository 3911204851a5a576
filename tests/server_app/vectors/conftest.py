"""What all runs of vectors share: short waits, a base, and who trained how often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from client_app import work
from common.model import ModelSpec, build, get_weights
from server_app.vectors import strategy


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for longer than a moment."""
    monkeypatch.setattr(strategy, "LOOK", 0.05)
    monkeypatch.setattr("server_app.vectors.post.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("server_app.vectors.post.LONGEST_WAIT", 0.05)
    monkeypatch.setattr("server_app.vectors.run.usable_cores", lambda: 1)


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A file with the first weights of the tiny model: to a run, pre-trained."""
    path = tmp_path / "base.safetensors"
    save_file(get_weights(build(ModelSpec(width=0.03125), seed=0)), path)
    return str(path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each hospital trained for each version."""
    count: Counter[tuple[str, int]] = Counter()
    train = work.Work.train

    def counted(job: Any, run: Any) -> Any:
        count[(job.hospital.name, job.draw)] += 1
        return train(job, run)

    monkeypatch.setattr(work.Work, "train", counted)
    return count

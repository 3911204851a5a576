"""What all tests share: a home of their own, and the real images where they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is slow to draw inputs: no property says how fast.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"

LONG = ("deploy/test_simulate.py", "benchmarks/test_audit.py")
"""Files that take longest: begun first, so that no process ends up alone with one."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.as_posix().endswith(LONG))  # stable otherwise


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own runs."""
    monkeypatch.setenv("CONSILIUM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CONSILIUM_RUN", raising=False)


@pytest.fixture
def small_prior(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Priors of one small network that looks once, for tests of what is done with any prior."""
    from common import model
    from common.prior.features import PriorSpec

    def forget() -> None:
        for known in (model._template, model.state_names, model.state_dtypes, model.state_shapes):
            known.cache_clear()
        model._moving.cache_clear()

    forget()
    monkeypatch.setattr(PriorSpec.__init__, "__defaults__", ((8,), 64, 28, (1.0,)))
    yield
    forget()


@pytest.fixture
def blood() -> Path:
    """The real blood-cell images, rebuilt from PBC; skips where they are missing."""
    path = DATA / "bloodmnist_rebuilt.npz"
    if not path.exists():
        pytest.skip("the real images (bloodmnist_rebuilt.npz) are not on this machine")
    return path

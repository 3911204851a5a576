"""Where the ledger of these tests lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.deploy.ledger.building import home


@pytest.fixture
def path() -> Path:
    """Where consilium's own home has its ledger; nothing is there yet."""
    return home() / "ledger.sqlite"

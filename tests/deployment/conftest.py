"""Everything here runs real processes for minutes: `make test-deployment`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deployment.house import House


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.deployment)
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.timeout(1500))


@pytest.fixture
def new_house(tmp_path: Path) -> Iterator[Callable[..., House]]:
    """Makes houses, and ends their processes afterwards."""
    made: list[House] = []

    def make(name: str = "f", **options: object) -> House:
        house = House(tmp_path / name)
        made.append(house)
        return house.make(**options)  # type: ignore[arg-type]

    yield make
    for house in made:
        house.close()

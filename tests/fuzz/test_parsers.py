"""Every parser returns, or raises a two-part error: for its seeds, for what broke it, for more.

A short pass in every run of the tests; ``make fuzz`` for a minute each.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.mutation import JUNK
from tests.fuzz.running import CRASHES, attempt, fuzz, quiet
from tests.fuzz.targets import Target, targets

INPUTS = 60
"""Of each target in a run of the tests."""


@pytest.fixture(params=sorted(targets()))
def target(request: pytest.FixtureRequest) -> Target:
    return targets()[request.param]


def test_a_seed_is_read(target: Target) -> None:
    """Or mutations of it would only show that nonsense is refused."""
    for seed in target.seeds if target.reads else ():
        target.parse(seed)


def test_what_is_nearly_right_ends_in_a_two_part_error_or_is_read(target: Target) -> None:
    seed = 20  # the same each time: `make fuzz` draws another, and for longer
    found = fuzz(target, random.Random(seed), inputs=INPUTS)
    assert not found.crashes, f"seed {seed}: {found.crashes}"


@pytest.mark.parametrize(
    "path", sorted(CRASHES.glob("*/*.bin")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_what_once_broke_a_parser_breaks_it_no_more(path: Path) -> None:
    with quiet():
        assert attempt(targets()[path.parent.name], path.read_bytes()) is None


def test_what_is_junk_altogether_ends_in_a_two_part_error(target: Target) -> None:
    with quiet():
        for data in (b"", *JUNK, *(seed[: len(seed) // 2] for seed in target.seeds)):
            error = attempt(target, data)
            assert error is None, f"{data[:40]!r}: {error!r}"


TEXTS = ("policy", "hospital.toml", "run config", "request", "roster", "federation file",
         "kit answer", "manifest", "withdrawal", "record greeting", "control.json")  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(TEXTS), st.one_of(st.binary(max_size=200), st.text().map(str.encode)))
def test_whatever_bytes_come_they_end_in_a_two_part_error(name: str, data: bytes) -> None:
    with quiet():
        error = attempt(targets()[name], data)
    assert error is None, repr(error)

"""Halves name who harms, and nobody else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server_app.defence.suspects import FEWEST_SEEN, Seen, Suspects

TEN = [f"hospital-{i:02d}" for i in range(10)]


def searched(
    seed: int, liars: set[str], names: list[str], *, shift: float, scatter: float, rounds: int = 12
) -> tuple[list[str], int]:
    """(who is named first, after how many rounds) of a run in halves."""
    rng, suspects = np.random.default_rng(seed), Suspects()
    for number in range(1, rounds + 1):
        halves = suspects.split(names, 4, rng)
        assert halves is not None
        one, other = halves
        x = shift * (len(liars & set(one)) - len(liars & set(other)))
        suspects.observe(Seen(tuple(one), tuple(other), float(rng.normal(x, scatter))))
        if suspects.named():
            return sorted(suspects.named()), number
    return [], rounds


@pytest.mark.parametrize("count", [8, 10, 16])
def test_one_liar_is_named_within_a_few_rounds_and_nobody_else(count: int) -> None:
    names = [f"hospital-{i:02d}" for i in range(count)]
    for seed in range(6):
        liar = names[seed]
        named, rounds = searched(seed, {liar}, names, shift=0.8, scatter=0.15)
        assert named == [liar]
        assert rounds <= 7


def test_honest_halves_name_nobody_though_they_are_uneven() -> None:
    """With more scatter than label skew was measured to have."""
    for seed in range(8):
        assert searched(seed, set(), TEN, shift=0.0, scatter=0.3)[0] == []


def test_one_uneven_round_names_nobody() -> None:
    suspects = Suspects([Seen(tuple(TEN[:5]), tuple(TEN[5:]), 50.0, True, False)])
    assert suspects.named() == {}
    assert suspects.any_suspect({}) is False or max(suspects.probabilities(TEN).values()) < 0.95


def test_a_liar_that_pauses_is_not_cleared() -> None:
    rng, suspects, liar = np.random.default_rng(3), Suspects(), TEN[4]
    for number in range(1, 13):
        halves = suspects.split(TEN, 4, rng)
        assert halves is not None
        lies = number % 3 != 0
        x = 0.0 if not lies else (0.9 if liar in halves[0] else -0.9)
        suspects.observe(Seen(*map(tuple, halves), float(rng.normal(x, 0.15))))  # type: ignore[arg-type]
    assert list(suspects.named()) == [liar]


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 20), least=st.integers(3, 6), seed=st.integers(0, 1000))
def test_halves_are_disjoint_whole_and_large_enough_or_there_are_none(
    count: int, least: int, seed: int
) -> None:
    names = [f"h{i}" for i in range(count)]
    halves = Suspects().split(names, least, np.random.default_rng(seed))
    if count < 2 * least:
        assert halves is None
        return
    assert halves is not None
    assert sorted([*halves[0], *halves[1]]) == sorted(names)
    assert min(map(len, halves)) >= least


def test_what_was_seen_survives_json() -> None:
    suspects = Suspects([Seen(("a", "b"), ("c", "d"), 0.7, True, False)] * FEWEST_SEEN)
    again = Suspects.from_list(suspects.as_list())
    assert again.probabilities(()) == suspects.probabilities(())

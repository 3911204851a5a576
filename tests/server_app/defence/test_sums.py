"""What an opened sum shows of a lie, and that honest noise is none."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_app.defence.sums import (
    HALF_FACTOR,
    Measured,
    log_ratio,
    outsized,
    overclaimed,
    uneven,
    weight_bound,
)

NAMES = ("a", "b", "c", "d")


def sum_of(norm: float, *, weight: float = 400.0, largest: float = 0.01, **more: float) -> Measured:
    return Measured(members=NAMES, weight=weight, norm=norm, largest=largest, **more)  # type: ignore[arg-type]


@given(counts=st.lists(st.integers(1, 1000), min_size=4, max_size=4), claim=st.integers(1, 10**9))
def test_a_claim_shows_as_soon_as_the_total_exceeds_what_was_agreed_on(
    counts: list[int], claim: int
) -> None:
    agreed = dict(zip(NAMES, counts, strict=True))
    bound = weight_bound(NAMES, agreed, 16_384, private=False)
    assert overclaimed(sum_of(1.0, weight=sum(counts)), bound) is None
    assert overclaimed(sum_of(1.0, weight=sum(counts) + claim), bound) is not None


def test_without_agreed_numbers_only_an_impossible_claim_shows() -> None:
    assert weight_bound(NAMES, {}, 16_384, private=False) is None
    assert overclaimed(sum_of(1.0, weight=10**9), None) is None
    assert overclaimed(sum_of(1.0, weight=-3.0), None) is not None
    assert overclaimed(sum_of(1.0, weight=math.nan), None) is not None


def test_whoever_has_no_agreed_number_may_claim_the_most_that_a_run_allows() -> None:
    assert weight_bound(NAMES, {"a": 10, "b": 10, "c": 10}, 500, private=False) == 530


def test_noise_on_honest_numbers_is_no_lie() -> None:
    rng = np.random.default_rng(0)
    agreed = dict.fromkeys(NAMES, 100)
    bound = weight_bound(NAMES, agreed, 500, private=True)
    for _ in range(2000):
        noise = (rng.geometric(1 - math.exp(-0.1), 4) - rng.geometric(1 - math.exp(-0.1), 4)).sum()
        assert overclaimed(sum_of(1.0, weight=400.0 + noise), bound) is None


def test_a_norm_is_judged_by_the_rounds_before_and_not_without_them() -> None:
    assert outsized(sum_of(1e9), [1.0], [0.01], 2.5) is None
    assert outsized(sum_of(2.4), [1.0, 0.9, 1.1], [0.01] * 3, 2.5) is None
    assert outsized(sum_of(2.6), [1.0, 0.9, 1.1], [0.01] * 3, 2.5) is not None
    assert outsized(sum_of(1.0, largest=0.5), [1.0] * 3, [0.01] * 3, 2.5) is not None


@pytest.mark.parametrize("seed", range(20))
def test_honest_noise_of_known_size_is_neither_long_nor_uneven(seed: int) -> None:
    """Under distributed noise a sum is mostly noise: its energy is no lie."""
    rng, d, s = np.random.default_rng(seed), 4000, 0.05
    signal = np.zeros(d)
    signal[0] = 1.0

    def drawn(noise: float, extra: float = 0.0) -> Measured:
        mean = signal * (1 + extra) + rng.normal(0, noise, d)
        return sum_of(
            float(np.linalg.norm(mean)), largest=float(abs(mean).max()), noise=noise, length=d
        )

    one, other = drawn(s), drawn(s)
    assert uneven(one, other) is None
    assert uneven(other, one) is None
    assert outsized(one, [1.0] * 3, [1.0] * 3, 2.5) is None
    lie = drawn(s, extra=20.0)
    assert uneven(lie, other) is not None
    assert uneven(other, lie) is None
    assert log_ratio(lie, other) > 0.8


def test_a_half_stands_out_only_beside_a_shorter_one() -> None:
    assert uneven(sum_of(0.99 * HALF_FACTOR), sum_of(1.0)) is None
    assert uneven(sum_of(1.01 * HALF_FACTOR), sum_of(1.0)) is not None
    assert uneven(sum_of(1.0), sum_of(5.0)) is None

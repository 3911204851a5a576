"""Norms and sums of gradients that are never multiplied out are those of the gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy.bookkeeping import factors as module
from common.privacy.bookkeeping.factors import Factors
from common.privacy.clipping import AUTOMATIC, FLAT, add_clipped

SHAPES = [(3, 5), (4, 2, 3, 3), (1, 1), (6, 4, 1, 2)]


def random_factors(
    n: int, positions: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> Factors:
    rng = torch.Generator().manual_seed(seed)
    into = torch.Size(shape[1:]).numel()
    left = torch.randn(n, positions, shape[0], generator=rng).to(dtype)
    return Factors(left, torch.randn(n, positions, into, generator=rng).to(dtype), shape)


def exact(factors: Factors) -> torch.Tensor:
    return Factors(factors.left.double(), factors.right.double(), factors.shape).dense()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 6), st.integers(1, 8), st.sampled_from(SHAPES), st.integers(0, 2**32),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1 << 22, 20]),
)  # fmt: skip
def test_norms_and_weighted_sums_are_those_of_the_gradients(
    n: int, positions: int, shape: tuple[int, ...], seed: int, dtype: torch.dtype, numbers: int
) -> None:
    factors = random_factors(n, positions, shape, dtype, seed)
    rows = exact(factors)
    before, module._NUMBERS = module._NUMBERS, numbers
    try:
        squares = factors.square_norms()
        weights = torch.rand(n, dtype=torch.float64)
        total = torch.ones(shape, dtype=torch.float64)
        factors.add_weighted(total, weights)
    finally:
        module._NUMBERS = before
    # With positive margin only where terms cancel to a thousandth.
    assert bool((squares >= (1 - 1e-9) * rows.flatten(1).square().sum(1)).all())
    torch.testing.assert_close(squares, rows.flatten(1).square().sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, 1 + torch.einsum("n,n...->...", weights, rows))
    torch.testing.assert_close(factors.dense(), rows.float(), rtol=1e-4, atol=1e-4)


def test_terms_that_cancel_do_not_let_a_unit_add_more() -> None:
    """Where rounding would be all that is left of the norm, the terms' size stands in for it."""
    rng = torch.Generator().manual_seed(0)
    left = torch.randn(1, 1, 40, generator=rng).repeat(1, 2, 1)
    right = torch.randn(1, 1, 30, generator=rng).repeat(1, 2, 1)
    right[:, 1] *= -1.0
    right[:, 1, 0] *= 1 + 1e-6
    factors = Factors(left, right, (40, 30))
    size = float(2 * left[0, 0].double().norm() * right[0, 0].double().norm())
    true = float(exact(factors).norm())
    assert true < 1e-6 * size
    assert float(factors.square_norms().sqrt()) == pytest.approx(size / 1024, rel=1e-6)
    total = torch.zeros(40, 30, dtype=torch.float64)
    add_clipped([total], [factors], 1e-9)
    assert 0 < float(total.norm()) <= 1e-9


@pytest.mark.parametrize("rule", [FLAT, AUTOMATIC])
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 6), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_no_unit_adds_more_than_the_clipping_norm_beside_rows(
    rule: str, seed: int, n: int, scale: float, clip: float, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(seed)
    factors = random_factors(n, 3, (4, 2, 3, 3), dtype, seed)
    factors.left *= scale
    rows = (scale * torch.randn(n, 7, generator=rng)).to(dtype)

    def clipped(chosen: torch.Tensor) -> torch.Tensor:
        sums = [torch.zeros(4, 2, 3, 3, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)]
        some = Factors(factors.left[chosen], factors.right[chosen], factors.shape)
        add_clipped(sums, [some, rows[chosen]], clip, rule)
        return torch.cat([s.flatten() for s in sums])

    everyone = torch.arange(n)
    norms = torch.cat([exact(factors).flatten(1), rows.double()], 1).norm(dim=1)
    for i in range(n):
        moved = clipped(everyone) - clipped(everyone[everyone != i])
        assert float(moved.norm()) <= clip
        if rule == FLAT:
            assert float(moved.norm()) == pytest.approx(min(clip, float(norms[i])), rel=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_unit_that_is_not_finite_adds_nothing_and_disturbs_no_other(bad: float) -> None:
    factors = random_factors(3, 2, (4, 5), torch.float32, 0)
    sums = [torch.zeros(4, 5, dtype=torch.float64) for _ in range(2)]
    kept = Factors(factors.left[[0, 2]], factors.right[[0, 2]], factors.shape)
    add_clipped(sums[:1], [kept], 1.0)
    factors.right[1, 0, 0] = bad
    add_clipped(sums[1:], [factors], 1.0)
    torch.testing.assert_close(sums[0], sums[1])
    assert sums[0].any()

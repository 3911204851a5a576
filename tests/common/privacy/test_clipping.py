"""No unit adds more than C to the sum, and those within C add what they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.privacy.clipping import AUTOMATIC, FLAT, STABILITY, add_clipped, unit_sums


def clipped_sum(gradients: list[torch.Tensor], clip: float, rule: str = FLAT) -> torch.Tensor:
    sums = [torch.zeros(g.shape[1:], dtype=torch.float64) for g in gradients]
    add_clipped(sums, gradients, clip, rule)
    return torch.cat([s.flatten() for s in sums])


@pytest.mark.parametrize("rule", [FLAT, AUTOMATIC])
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.integers(1, 40), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3),
    st.sampled_from([1, 5, 255, 256, 700]),
)  # fmt: skip
def test_each_unit_adds_its_gradient_scaled_by_the_rule_to_at_most_the_clipping_norm(
    rule: str, seed: int, units: int, scale: float, clip: float, width: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    gradients = [
        scale
        * torch.randn(units, width, 3, generator=rng)
        * torch.rand(units, 1, 1, generator=rng),
        scale * torch.randn(units, 2, generator=rng),
    ]
    whole = clipped_sum(gradients, clip, rule)
    expected = torch.zeros_like(whole)
    for i in range(units):
        g = torch.cat([g[i].flatten() for g in gradients]).double()
        norm = float(g.norm())
        expected += g * (clip / (norm + STABILITY) if rule == AUTOMATIC else min(1.0, clip / norm))
        alone = clipped_sum([g[i : i + 1] for g in gradients], clip, rule)
        assert float(alone.norm()) <= clip
        assert float(alone.norm()) < clip or norm <= clip
        without = clipped_sum([torch.cat([g[:i], g[i + 1 :]]) for g in gradients], clip, rule)
        assert float((whole - without).norm()) <= clip
    # Clipped to C(1 − 2^−16): 1.5e-5 below.
    torch.testing.assert_close(whole, expected, rtol=3e-5, atol=3e-5 * clip * units)


@pytest.mark.parametrize("rule", [FLAT, AUTOMATIC])
@pytest.mark.parametrize("width", [1, 256, 5_000_000])
def test_the_norm_stays_strictly_below_the_clipping_norm_for_the_largest_gradients(
    rule: str, width: int
) -> None:
    """There γ is nothing beside the norm, and what is left is the margin for rounding."""
    for size in (1e3, 1e12, 1e17):  # beyond, squares overflow float32, and it adds nothing
        gradient = size * (1 + torch.rand(1, width, generator=torch.Generator().manual_seed(0)))
        found = float(clipped_sum([gradient], 2.0, rule).norm())
        assert 2.0 * (1 - 1e-4) < found < 2.0
    assert not clipped_sum([1e30 * torch.ones(1, width)], 2.0, rule).isnan().any()


def test_automatic_clipping_lifts_small_gradients_and_leaves_none_at_none() -> None:
    gradients = [torch.tensor([[3e-2, 4e-2], [0.0, 0.0], [1e-6, 0.0]])]
    alone = [clipped_sum([gradients[0][i : i + 1]], 6.0, AUTOMATIC) for i in range(3)]
    assert float(alone[0].norm()) == pytest.approx(6.0 * 0.05 / 0.06, rel=2e-5)
    assert not alone[1].any()
    assert float(alone[2].norm()) == pytest.approx(6.0 * 1e-6 / 0.010001, rel=2e-5)
    assert clipped_sum([torch.zeros(0, 2)], 1.0, AUTOMATIC).tolist() == [0.0, 0.0]


def test_a_rule_that_is_not_accounted_for_is_refused() -> None:
    with pytest.raises(PrivacyError, match="'adaptive'"):
        clipped_sum([torch.ones(1, 2)], 1.0, "adaptive")


def test_a_norm_over_millions_of_coordinates_is_not_underestimated() -> None:
    """Plain float32 makes it 1e-4 too small here, and the clipped gradient as much too large."""
    gradient = torch.randn(1, 5_000_000, generator=torch.Generator().manual_seed(0))
    assert 1 - 2.0**-15 < float(clipped_sum([gradient], 1.0).norm()) <= 1.0


def test_gradients_within_the_norm_are_summed_exactly_and_none_is_no_change() -> None:
    gradients = [torch.tensor([[0.25, 0.0], [0.5, -0.125]])]
    assert clipped_sum(gradients, 1.0).tolist() == [0.75, -0.125]
    assert clipped_sum([torch.zeros(0, 2)], 1.0).tolist() == [0.0, 0.0]
    assert clipped_sum([torch.zeros(3, 2)], 1.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rule", [FLAT, AUTOMATIC])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_unit_whose_gradient_is_not_finite_adds_nothing_and_disturbs_no_other(
    bad: float, rule: str
) -> None:
    """Nor is it an error: that would tell of a single image, without noise."""
    others = torch.tensor([[0.3, 0.4], [0.0, 0.1]])
    with_it = torch.cat([others[:1], torch.tensor([[1.0, bad]]), others[1:]])
    assert clipped_sum([with_it], 1.0, rule).tolist() == clipped_sum([others], 1.0, rule).tolist()


@given(st.lists(st.integers(1, 5), max_size=8))
def test_unit_sums_add_the_rows_of_each_unit(sizes: list[int]) -> None:
    units = torch.repeat_interleave(
        torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.int64)
    )
    rows = torch.randn(len(units), 3, 2)
    sums = unit_sums(rows, units)
    assert sums.shape == (len(sizes), 3, 2)
    for unit in range(len(sizes)):
        torch.testing.assert_close(sums[unit], rows[units == unit].sum(0))


def test_unit_sums_of_units_of_one_row_are_the_rows() -> None:
    rows = torch.randn(4, 3)
    assert torch.equal(unit_sums(rows, torch.arange(4)), rows)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(unit_sums(rows[order], order), rows)

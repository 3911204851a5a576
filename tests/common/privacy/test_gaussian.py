"""The Gaussian mechanism on a grid: the noise it claims, and low-order bits that tell nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import PrivacyError
from common.privacy.gaussian import GaussianSum
from common.privacy.randomness import SecureRandom

sigmas = st.floats(1e-3, 100.0)
norms = st.floats(1e-3, 1e3)
dimensions = st.integers(1, 10_000_000)


def rounded(mechanism: GaussianSum, values: torch.Tensor) -> torch.Tensor:
    """The sum on the grid: a release without the same release's noise."""
    key = bytes(32)
    with_it = mechanism.release(values, SecureRandom(key_for_tests=key))
    noise = mechanism.release(torch.zeros_like(values), SecureRandom(key_for_tests=key))
    return with_it.double() - noise.double()


@given(sigmas, norms, dimensions)
def test_the_noise_is_sigma_times_the_sensitivity_on_the_grid(
    sigma: float, norm: float, dimension: int
) -> None:
    m = GaussianSum(sigma, norm, dimension)
    assert math.frexp(m.step)[0] == 0.5  # a power of two
    assert m.std == pytest.approx(sigma * (norm + m.step * math.sqrt(dimension)), rel=1e-12)
    assert sigma * norm < m.std <= sigma * norm * (1 + 2.0**-10)
    assert m.step <= 2.0**-10 * sigma * norm


@settings(deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 1.0), st.integers(1, 300))
def test_the_rounded_sums_differ_by_at_most_the_sensitivity_accounted_for(
    seed: int, scale: float, dimension: int
) -> None:
    rng = np.random.default_rng(seed)
    m = GaussianSum(0.05, 1.0, dimension)  # little noise: float32 then holds every grid point
    a = torch.from_numpy(rng.normal(size=dimension))
    step = torch.from_numpy(rng.normal(size=dimension))
    b = a + step / step.norm() * m.clipping_norm * scale
    moved = (rounded(m, a) - rounded(m, b)).norm()
    assert float(moved) <= m.clipping_norm + m.step * math.sqrt(dimension)
    # And rounding is what the release does: no coordinate is off by more than half a step.
    assert float((rounded(m, a) - a).abs().max()) <= 0.5000001 * m.step


def test_what_is_released_depends_on_the_sum_through_its_grid_point_alone() -> None:
    """Two sums that round alike are released alike, bit for bit; shifted ones by the shift."""
    m = GaussianSum(0.05, 1.0, 1000)
    grid = torch.randint(-1000, 1000, (1000,), dtype=torch.float64) * m.step
    one, two = (
        m.release(grid + shift * m.step, SecureRandom(key_for_tests=bytes(32)))
        for shift in (-0.4, 0.4)
    )
    assert torch.equal(one, two)
    moved = m.release(grid + 3 * m.step, SecureRandom(key_for_tests=bytes(32)))
    assert torch.equal(moved.double() - one.double(), torch.full_like(grid, 3 * m.step))


@pytest.mark.parametrize("value", [0.0, 0.1, 0.123456789])
def test_low_order_bits_are_uniform_whatever_the_sum(value: float) -> None:
    """Mironov 2012: in plain floating point the last bits give the sum away."""
    n = 40_000
    m = GaussianSum(0.5, 1.0, n)
    out = m.release(torch.full((n,), value, dtype=torch.float64), SecureRandom()).double()
    points = (out / m.step).numpy()
    assert (points == np.round(points)).all()  # on the grid, all of them
    counts = np.bincount(points.astype(np.int64) % 16, minlength=16)
    assert stats.chisquare(counts).pvalue > 1e-6


@pytest.mark.parametrize(("sigma", "norm"), [(0.3, 2.0), (1.0, 7.0), (40.0, 0.01)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_release_is_the_sum_plus_gaussian_noise(
    sigma: float, norm: float, dtype: torch.dtype
) -> None:
    values = torch.linspace(-norm, norm, 100_000, dtype=dtype).reshape(100, 10, 100)
    m = GaussianSum(sigma, norm, values.numel())
    out = m.release(values, SecureRandom())
    assert out.shape == values.shape and out.dtype == torch.float32
    noise = (out.double() - values.double()).flatten().numpy() / m.std
    assert stats.kstest(noise, "norm").pvalue > 1e-6
    assert noise.var() == pytest.approx(1.0, abs=6 * math.sqrt(2 / len(noise)))


def test_parts_of_a_sum_get_the_noise_of_the_whole() -> None:
    m = GaussianSum(1.0, 1.0, 50_000)
    part = m.release(torch.zeros(20_000), SecureRandom())
    assert float(part.std()) == pytest.approx(m.std, rel=0.03)
    assert m.release(torch.zeros(0), SecureRandom()).numel() == 0
    assert m.release(torch.tensor(0.5), SecureRandom()).shape == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_that_noise_would_not_hide_is_refused(bad: float, dtype: torch.dtype) -> None:
    values = torch.zeros(10_000, dtype=dtype)
    values[7777] = bad
    with pytest.raises(PrivacyError, match="NaN, infinity"):
        GaussianSum(1.0, 1.0, 10_000).release(values, SecureRandom())


def test_more_coordinates_than_accounted_for_are_refused() -> None:
    with pytest.raises(PrivacyError, match="11 values in a sum of 10"):
        GaussianSum(1.0, 1.0, 10).release(torch.zeros(11), SecureRandom())


@pytest.mark.parametrize(
    ("sigma", "norm", "dimension"),
    [
        (0.0, 1.0, 1), (1.0, 0.0, 1), (1.0, 1.0, 0), (float("nan"), 1.0, 1),
        (float("inf"), 1.0, 1), (1.0, float("inf"), 1), (1e30, 1.0, 1), (1.0, 1e-308, 1),
    ],
)  # fmt: skip
def test_what_is_no_mechanism_is_refused(sigma: float, norm: float, dimension: int) -> None:
    with pytest.raises(PrivacyError):
        GaussianSum(sigma, norm, dimension)

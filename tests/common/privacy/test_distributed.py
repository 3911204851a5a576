"""Shares of noise: a sum that is opened holds the noise that is claimed, whoever dropped out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from common.errors import PrivacyError, RoundError
from common.privacy.distributed import NoiseShares
from common.privacy.randomness import SecureRandom
from common.secagg import SecAggParams, Segment, VectorLayout, encode
from tests.common.secagg.driver import IDENTITIES, Drive, binding_for

D, HOSPITALS, FEWEST = 50_000, 7, 5
SHARES = NoiseShares(
    noise_multiplier=1.3, clipping_norm=0.5, dimension=D, fewest=FEWEST, known=1
)  # fmt: skip
PARAMS = SecAggParams(
    max_cohort=HOSPITALS, min_cohort=FEWEST, num_shares=HOSPITALS, reconstruction_threshold=5
)


def round_of(sums: list[torch.Tensor], absent: int) -> np.ndarray:
    """One whole round of the protocol: the noisy sum of who stayed, (d,) float64."""
    layout = VectorLayout(
        (Segment(name="step", length=D, bound=SHARES.largest(64), kind="integer"),)
    )
    names = list(IDENTITIES)[: len(sums)]
    vectors = {
        name: encode(layout, PARAMS, {"step": SHARES.release(s, SecureRandom())}, weight=1).vector
        for name, s in zip(names, sums, strict=True)
    }
    drive = Drive(names, binding_for(PARAMS, layout), vectors)
    return SHARES.values(drive.sums({"masked": names[len(names) - absent :]})["step"])


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_the_noise_of_an_opened_sum_is_the_shares_of_who_stayed_and_at_least_the_claim(
    absent: int,
) -> None:
    rng = np.random.default_rng(0)  # the gradients' sums; never noise
    stayed, noise = HOSPITALS - absent, []
    for _ in range(8):
        sums = [torch.from_numpy(rng.normal(size=D) * 0.01) for _ in range(HOSPITALS)]
        plain = sum(s.numpy() for s in sums[:stayed])
        noise.append(round_of(sums, absent) - plain)
    found = np.concatenate(noise)
    claimed = SHARES.noise_multiplier * SHARES.clipping_norm
    per_share = SHARES.std**2
    # 400,000 values: the variance's own standard error is 0.22 %.
    assert found.var() == pytest.approx(stayed * per_share, rel=0.01)
    assert found.var() > (1 + 1 / FEWEST) * claimed**2 * 0.99  # one share more than is needed
    assert abs(found.mean()) < 5 * found.std() / math.sqrt(len(found))
    assert stats.kstest(found / math.sqrt(stayed * per_share), "norm").pvalue > 1e-6


def test_no_sum_is_opened_with_fewer_shares_than_the_noise_needs() -> None:
    with pytest.raises(RoundError):
        round_of([torch.zeros(D, dtype=torch.float64)] * HOSPITALS, HOSPITALS - FEWEST + 1)


@given(
    sigma=st.floats(0.1, 50), clip=st.floats(0.01, 100), fewest=st.integers(2, 100),
    known=st.integers(0, 99), more=st.integers(0, 50),
)  # fmt: skip
def test_the_claim_holds_whoever_colludes_up_to_the_bound_and_shrinks_to_one_share(
    sigma: float, clip: float, fewest: int, known: int, more: int
) -> None:
    if known >= fewest:
        with pytest.raises(PrivacyError, match="known shares"):
            NoiseShares(noise_multiplier=sigma, clipping_norm=clip, dimension=100,
                        fewest=fewest, known=known)  # fmt: skip
        return
    shares = NoiseShares(noise_multiplier=sigma, clipping_norm=clip, dimension=100,
                         fewest=fewest, known=known)  # fmt: skip
    assert shares.in_sum(fewest, known) == pytest.approx(sigma)
    assert shares.in_sum(fewest + more, known) >= sigma * (1 - 1e-12)
    assert shares.in_sum(fewest, fewest) == 0.0
    assert shares.against_a_break() == pytest.approx(sigma / math.sqrt(fewest - known))
    # What the accountants are told covers the rounding: noise / (C + γ√d).
    unknown = math.sqrt(fewest - known) * shares.std
    assert unknown / (clip + shares.step * math.sqrt(100)) >= sigma * (1 - 1e-12)


def test_the_integers_are_the_rounded_sum_and_noise_on_the_grid() -> None:
    shares = NoiseShares(noise_multiplier=1e-6, clipping_norm=1.0, dimension=1000, fewest=2)
    values = torch.linspace(-1, 1, 1000, dtype=torch.float64)
    told = shares.release(values, SecureRandom())
    assert told.dtype == np.int64
    assert np.abs(shares.values(told) - values.numpy()).max() < 13 * shares.std + shares.step
    assert np.abs(told).max() <= shares.largest(1)
    with pytest.raises(PrivacyError, match="every trainable"):
        shares.release(values[:-1], SecureRandom())
    with pytest.raises(PrivacyError, match="NaN"):
        shares.release(torch.full((1000,), torch.nan), SecureRandom())

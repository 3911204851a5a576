"""Noise and sampling come from OS entropy, are what they claim, and are never shared."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import PrivacyError
from common.privacy import randomness
from common.privacy.randomness import SecureRandom


def test_two_streams_in_one_process_share_nothing() -> None:
    one, two = SecureRandom(), SecureRandom()
    a, b = one.uniform(10_000), two.uniform(10_000)
    assert not np.isin(a, b).any()
    assert not torch.isin(one.normal((1000,), 1.0), two.normal((1000,), 1.0)).any()


def test_no_seed_of_the_process_reaches_the_noise() -> None:
    def drawn() -> torch.Tensor:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return SecureRandom().normal((64,), 1.0)

    assert not torch.equal(drawn(), drawn())


def test_another_process_with_the_same_seeds_draws_another_stream() -> None:
    code = (
        "import torch; torch.manual_seed(0)\n"
        "from common.privacy.randomness import SecureRandom\n"
        "print(SecureRandom().uniform(4).tolist())"
    )
    runs = {subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)}
    assert len(runs) == 2


def test_a_stream_is_never_copied() -> None:
    with pytest.raises(TypeError, match="never copied"):
        copy.deepcopy(SecureRandom())


@pytest.mark.parametrize("std", [0.5, 7.0])
def test_noise_is_gaussian_with_the_claimed_deviation(std: float) -> None:
    z = SecureRandom().normal((200_001,), std).double().numpy() / std
    assert stats.kstest(z, "norm").pvalue > 1e-6
    assert abs(z.std() - 1) < 0.01
    assert abs(z.mean()) < 0.015


def test_the_two_normals_of_a_pair_are_independent() -> None:
    """Sine and cosine of one pair of uniforms lie half a piece apart."""
    for _, piece in SecureRandom().normal_chunks(2 * randomness._PAIRS):
        one, two = piece.numpy().copy().reshape(2, -1)
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.05
    assert abs(np.corrcoef(one**2, two**2)[0, 1]) < 0.05


@pytest.mark.parametrize("n", [1, 2, 32767, 32768, 32769, 65537, 100_001])
def test_no_normal_is_missing_or_drawn_twice_where_pieces_meet(n: int) -> None:
    sizes = [(start, len(z)) for start, z in SecureRandom().normal_chunks(n)]
    assert [start for start, _ in sizes] == list(np.cumsum([0, *(k for _, k in sizes[:-1])]))
    assert sum(k for _, k in sizes) == n
    drawn = torch.cat([z.clone() for _, z in SecureRandom().normal_chunks(n)])
    assert len(drawn.unique()) == n
    assert not (drawn == 0).any()


class _Scripted(SecureRandom):
    """Gives ``first`` for the first words asked for, then its stream."""

    def __init__(self, first: bytes) -> None:
        super().__init__()
        self.first = first

    def _fill(self, buffer: bytearray, size: int) -> None:
        super()._fill(buffer, size)
        given, self.first = self.first[:size], self.first[size:]
        buffer[: len(given)] = given


def test_the_tail_beyond_53_bits_is_that_of_the_gaussian() -> None:
    """Where the radius's 53 bits are all zero, r²/2 must be 53·ln 2 + an exponential variable."""
    n = 10_000
    first = bytes(8 * n) + SecureRandom()._bits(n).tobytes()  # radius words, then angle words
    ((_, z),) = list(_Scripted(first).normal_chunks(2 * n))
    half_square = (z[:n] ** 2 + z[n:] ** 2).numpy() / 2
    assert stats.kstest(half_square - 53 * np.log(2), "expon").pvalue > 1e-6
    assert float(z.abs().max()) > 8.6


def test_the_refinement_leaves_no_gap_and_no_overlap() -> None:
    """Just below the bound uniforms spread over (k, k + 1]; above it they are k + 1."""
    k = np.array([0.0, 1.0, 2.0**32 - 1, 2.0**32, 2.0**53 - 1])
    drawn = np.stack([_refined(k) for _ in range(2000)])
    assert (drawn[:, 3:] == k[3:] + 1).all()
    assert ((drawn > k) & (drawn <= k + 1)).all()
    for column in range(3):
        assert stats.kstest(drawn[:, column] - k[column], "uniform").pvalue > 1e-6


def _refined(k: np.ndarray) -> np.ndarray:
    units = k.copy()
    SecureRandom()._refine(units)
    return units


def test_every_normal_is_finite_and_at_most_12_2() -> None:
    lowest = bytes(8) + bytes(8) + bytes(8)  # radius, angle; a refinement of zero: the value 1
    ((_, z),) = list(_Scripted(lowest).normal_chunks(2))
    assert float(z[0]) == pytest.approx(np.sqrt(2 * 53 * np.log(2)))
    lowest = bytes(16) + b"\xff" * 8  # a refinement of 1 − 2^−53: the smallest radius uniform
    ((_, z),) = list(_Scripted(lowest).normal_chunks(2))
    assert float(z[0]) == pytest.approx(np.sqrt(2 * 106 * np.log(2))) and float(z[0]) < 12.2
    ((_, z),) = list(_Scripted(b"\xff" * 16).normal_chunks(2))  # the largest: log 1
    assert z.tolist() == [0.0, 0.0]


@pytest.mark.slow  # a figure of a quiet machine
def test_five_million_normals_take_at_most_three_times_as_long_as_torchs() -> None:
    """Least of several interleaved repeats each, so that a busy machine slows both alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        stream, ours, torchs = SecureRandom(), [], []
        for _ in range(7):
            start = time.perf_counter()
            torch.randn(5_000_000)
            middle = time.perf_counter()
            stream.normal((5_000_000,), 1.0)
            torchs.append(middle - start)
            ours.append(time.perf_counter() - middle)
    finally:
        torch.set_num_threads(threads)
    assert min(ours) <= 3 * min(torchs)


@pytest.mark.parametrize("epsilon", [0.25, 0.7, 3.0])
def test_discrete_laplace_has_the_claimed_probabilities(epsilon: float) -> None:
    n, r = 20_000, SecureRandom()
    drawn = np.array([r.discrete_laplace(epsilon) for _ in range(n)])
    a = np.exp(-epsilon)
    reach = max(1, int(3 / epsilon))
    k = np.arange(-reach, reach + 1)
    expected = n * (1 - a) / (1 + a) * a ** np.abs(k)
    observed = np.array([(drawn == i).sum() for i in k])
    rest = n - expected.sum()
    test = stats.chisquare([*observed, n - observed.sum()], [*expected, rest])
    assert test.pvalue > 1e-6


def test_discrete_laplace_reaches_far_for_a_small_epsilon_and_is_zero_for_a_large_one() -> None:
    r = SecureRandom()
    wide = np.array([r.discrete_laplace(1e-6) for _ in range(2000)], dtype=float)
    assert np.abs(wide).mean() == pytest.approx(1e6, rel=0.15)
    assert abs((wide > 0).mean() - 0.5) < 0.06
    assert {r.discrete_laplace(200.0) for _ in range(200)} == {0}


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan"), float("inf")])
def test_discrete_laplace_refuses_what_is_no_epsilon(epsilon: float) -> None:
    with pytest.raises(PrivacyError, match="no noise"):
        SecureRandom().discrete_laplace(epsilon)


@pytest.mark.parametrize("x", [Fraction(0), Fraction(1, 3), Fraction(1)])
def test_the_coin_of_discrete_laplace_falls_with_probability_exp_minus_x(x: Fraction) -> None:
    r, n = SecureRandom(), 20_000
    heads = sum(r._bernoulli_exp(x) for _ in range(n))
    assert stats.binomtest(heads, n, float(np.exp(-float(x)))).pvalue > 1e-6


@pytest.mark.parametrize("n", [1, 2, 3, 7, 256, 257])
def test_integers_below_a_bound_are_uniform(n: int) -> None:
    r = SecureRandom()
    counts = np.bincount([r._below(n) for _ in range(40 * n + 400)], minlength=n)
    assert len(counts) == n
    assert n == 1 or stats.chisquare(counts).pvalue > 1e-6


def test_shapes_and_types() -> None:
    r = SecureRandom()
    assert r.normal((2, 3, 5), 1.0).shape == (2, 3, 5)
    assert r.normal((), 1.0).dtype == torch.float32
    assert r.normal((0,), 1.0).numel() == 0
    u = r.uniform(100_000)
    assert u.dtype == np.float64
    assert 0 <= u.min() < u.max() < 1
    assert abs(r.bernoulli(100_000, 0.2).mean() - 0.2) < 0.01
    assert r.bernoulli(1000, 1.0).all()


def test_the_stream_is_aes_256_in_counter_mode_under_the_whole_key() -> None:
    """NIST SP 800-38A F.5.5 uses another counter; here AES-256 of the zero block, FIPS 197 key."""
    key = bytes(range(32))
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(bytes(16))
    drawn = SecureRandom(key_for_tests=key)._bits(2).tobytes()
    assert drawn == block
    for bit in (0, 100, 255):
        other = bytearray(key)
        other[bit // 8] ^= 1 << (bit % 8)
        assert SecureRandom(key_for_tests=bytes(other))._bits(2).tobytes() != block


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 80_000), min_size=1, max_size=4))
def test_no_word_of_the_stream_is_given_twice_or_left_out(sizes: list[int]) -> None:
    key = bytes(range(32))
    stream = SecureRandom(key_for_tests=key)
    drawn = b"".join(stream._bits(n).tobytes() for n in sizes)
    whole = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    assert drawn == whole.update(bytes(8 * sum(sizes)))

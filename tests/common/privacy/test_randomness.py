"""Noise and sampling come from OS entropy, are what they claim, and are never shared."""

from __future__ import annotations

import copy
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

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
    halves = len(z) // 2  # the two halves come from one pair of uniforms each
    assert abs(np.corrcoef(z[:halves], z[halves : 2 * halves])[0, 1]) < 0.015
    assert abs(np.corrcoef(z[:halves] ** 2, z[halves : 2 * halves] ** 2)[0, 1]) < 0.02


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
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(bytes(16))
    drawn = SecureRandom(key_for_tests=key)._bits(2).tobytes()
    assert drawn == block
    for bit in (0, 100, 255):
        other = bytearray(key)
        other[bit // 8] ^= 1 << (bit % 8)
        assert SecureRandom(key_for_tests=bytes(other))._bits(2).tobytes() != block

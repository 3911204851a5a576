"""Noise that a device makes itself is ChaCha20, word for word, and Gaussian."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.privacy import chacha, device_noise
from common.privacy.chacha import MOST_BLOCKS, key_tensor, keystream
from common.privacy.device_noise import normals
from common.privacy.randomness import SecureRandom

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def reference(key: bytes, start: int, blocks: int) -> np.ndarray:
    """(blocks, 8) int64 by the library ``cryptography``."""
    nonce = struct.pack("<I", start) + bytes(12)
    stream = Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(64 * blocks)), dtype="<i8").reshape(blocks, 8)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@settings(deadline=None)  # the first call on a GPU compiles
@given(key=st.binary(min_size=32, max_size=32), start=st.integers(0, MOST_BLOCKS - 8),
       blocks=st.integers(0, 7))  # fmt: skip
def test_every_word_is_that_of_the_standard(
    device: torch.device, key: bytes, start: int, blocks: int
) -> None:
    found = keystream(key_tensor(key, device), start, blocks).T.cpu().numpy()
    assert np.array_equal(found, reference(key, start, blocks))


def test_the_test_vector_of_the_rfc() -> None:
    # RFC 8439, appendix A.1, test vector 1: key and nonce 0, counter 0.
    words = keystream(key_tensor(bytes(32), CPU), 0, 1)[:, 0].numpy().view(np.uint32)
    assert [hex(w) for w in words[:4]] == ["0xade0b876", "0x903df1a0", "0xe56a5d40", "0x28bd8653"]


def test_a_counter_never_begins_anew() -> None:
    with pytest.raises(ValueError, match="twice"):
        keystream(key_tensor(bytes(32), CPU), MOST_BLOCKS - 1, 2)
    with pytest.raises(ValueError, match="32 bytes"):
        key_tensor(bytes(16), CPU)


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_normals_are_gaussian_and_independent(device: torch.device) -> None:
    z = normals(key_tensor(SecureRandom().stream_key(), device), 1_000_000).cpu()
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-6
    assert len(z.unique()) == len(z)
    one, other = z.view(2, -1)  # the two of a pair
    for a, b in ((one, other), (one**2, other**2), (z[:-1], z[1:])):
        assert abs(float(np.corrcoef(a, b)[0, 1])) < 0.01


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 8 * 64, 8 * 64 + 1, 1000])
def test_none_is_missing_or_drawn_twice_where_pieces_meet(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_noise, "_BLOCKS", 32)
    z = normals(key_tensor(SecureRandom().stream_key(), CPU), n)
    assert len(z) == len(z.unique()) == n


def test_the_tail_is_refined_and_ends_beyond_ten_deviations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of(radius: int, spread: int) -> float:
        words = torch.zeros(8, 1, dtype=torch.int64)
        first = radius << 11 | spread >> 11
        words[0], words[1] = first - ((first >> 63) << 64), spread & 2047
        monkeypatch.setattr(device_noise, "keystream", lambda *_: words)
        return float(normals(key_tensor(bytes(32), CPU), 8)[0])

    def expected(u: float) -> float:
        return float((-2.0 * np.log(u)) ** 0.5)

    assert of(0, 0) == pytest.approx(expected(2.0**-53))
    assert of(0, (1 << 22) - 1) == pytest.approx(expected(2.0**-75))
    assert of(5, 1 << 21) == pytest.approx(expected(5.5 * 2.0**-53))
    assert of((1 << 53) - 1, 0) == 0.0


def test_keys_of_a_stream_are_used_once() -> None:
    stream = SecureRandom()
    keys = {stream.stream_key() for _ in range(100)}
    assert len(keys) == 100 and all(len(key) == chacha.KEY_BYTES for key in keys)

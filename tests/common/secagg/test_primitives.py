"""Masks, keys, shares and graph: full entropy, bound to their round, right where fixed."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.secagg import Refusal, SecAggParams, masks, shamir
from common.secagg.graph import CohortGraph
from common.secagg.keys import (
    new_secret,
    open_sealed,
    pair_mask_key,
    public_key,
    seal,
    self_mask_key,
)
from common.secagg.masks import CHUNK_BYTES, KeyStream, add_mask

CONTEXT = bytes(range(32))
SEED = bytes(range(100, 132))


def stream(key: bytes, count: int = 32) -> bytes:
    buffer = bytearray(count)
    KeyStream(key).fill(memoryview(buffer))
    return bytes(buffer)


def flipped(secret: bytes, bit: int) -> bytes:
    return (int.from_bytes(secret, "big") ^ 1 << bit).to_bytes(len(secret), "big")


def test_every_one_of_256_seed_bits_changes_the_self_mask() -> None:
    streams = {stream(self_mask_key(flipped(SEED, bit), "h", CONTEXT)) for bit in range(256)}
    assert len(streams | {stream(self_mask_key(SEED, "h", CONTEXT))}) == 257


def test_every_one_of_256_cipher_key_bits_changes_the_stream() -> None:
    assert len({stream(flipped(SEED, bit)) for bit in range(256)} | {stream(SEED)}) == 257


def test_cipher_is_given_the_whole_32_byte_key(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(key: bytes) -> algorithms.AES256:
        seen.append(key)
        return cipher(key)

    cipher = algorithms.AES256
    monkeypatch.setattr(masks.algorithms, "AES256", spy)
    key = self_mask_key(SEED, "h", CONTEXT)
    add_mask(np.zeros(4, dtype=np.uint32), key, 1)
    assert seen == [key]
    assert len(key) == 32


@pytest.mark.parametrize("size", [0, 16, 24, 31, 33])
def test_shorter_or_longer_keys_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        KeyStream(bytes(size))


def test_stream_is_aes_256_ctr_from_zero() -> None:
    plain = Cipher(algorithms.AES(SEED), modes.CTR(bytes(16))).encryptor().update(bytes(32))
    assert stream(SEED) == plain


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("bytes_long", [8, CHUNK_BYTES - 8, CHUNK_BYTES, 2 * CHUNK_BYTES + 24])
def test_mask_is_one_stream_over_all_chunks_and_cancels(dtype: type, bytes_long: int) -> None:
    vector = np.arange(bytes_long // np.dtype(dtype).itemsize, dtype=dtype)
    before = vector.copy()
    add_mask(vector, SEED, 1)
    whole = Cipher(algorithms.AES(SEED), modes.CTR(bytes(16))).encryptor().update(bytes(bytes_long))
    assert np.array_equal(vector - before, np.frombuffer(whole, dtype=dtype))
    add_mask(vector, SEED, -1)
    assert np.array_equal(vector, before)


def test_mask_refuses_what_it_cannot_add_in_place() -> None:
    strided = np.zeros(8, np.uint32)[::2]
    for vector in (np.zeros(4, np.float32), np.zeros((2, 2), np.uint32), strided):
        with pytest.raises(ValueError, match="mask needs"):
            add_mask(vector, SEED, 1)
    with pytest.raises(ValueError, match="sign"):
        add_mask(np.zeros(4, np.uint32), SEED, 0)


def test_pair_key_is_the_same_from_both_sides_and_differs_by_round_and_pair() -> None:
    a, b, c = (bytes([n]) * 32 for n in (1, 2, 3))
    key = pair_mask_key(a, "a", public_key(b), "b", CONTEXT)
    assert key == pair_mask_key(b, "b", public_key(a), "a", CONTEXT)
    others = {
        pair_mask_key(a, "a", public_key(b), "b", bytes(32)),
        pair_mask_key(a, "a", public_key(b), "c", CONTEXT),
        pair_mask_key(a, "a", public_key(c), "b", CONTEXT),
    }
    assert len(others | {key}) == 4


def test_sealed_box_opens_only_unaltered_and_in_its_context() -> None:
    box = seal(SEED, b"share", b"context")
    assert open_sealed(SEED, box, b"context") == b"share"
    assert open_sealed(SEED, box, b"another") is None
    assert open_sealed(SEED, box[:-1] + b"\0", b"context") is None
    assert open_sealed(bytes(32), box, b"context") is None


def test_too_little_entropy_is_refused() -> None:
    with pytest.raises(Refusal):
        new_secret(lambda _: b"short")


# Shamir --------------------------------------------------------------------------------------


def test_any_threshold_of_shares_reconstruct_and_fewer_are_refused() -> None:
    shares = dict(enumerate(shamir.split(SEED, 4, 5), 1))
    for chosen in combinations(shares, 4):
        assert shamir.reconstruct({index: shares[index] for index in chosen}, 4) == SEED
    assert shamir.reconstruct(shares, 4) == SEED
    with pytest.raises(Refusal):
        shamir.reconstruct({1: shares[1], 2: shares[2], 3: shares[3]}, 4)


def test_shares_below_the_threshold_fit_every_secret() -> None:
    """With t - 1 shares fixed, another t-th share gives another secret: nothing is known."""
    shares = dict(enumerate(shamir.split(SEED, 4, 5), 1))
    secrets = {
        shamir.reconstruct({1: shares[1], 2: shares[2], 3: shares[3], 4: bytes([n]) * 32}, 4)
        for n in range(8)
    }
    assert len(secrets) == 8


@pytest.mark.parametrize(
    "shares",
    [
        {0: bytes(32), 1: bytes(32), 2: bytes(32)},
        {1: bytes(32), 2: bytes(32), 256: bytes(32)},
        {1: bytes(32), 2: bytes(31), 3: bytes(32)},
    ],
)
def test_wrong_indices_or_lengths_of_shares_are_refused(shares: dict[int, bytes]) -> None:
    with pytest.raises(Refusal):
        shamir.reconstruct(shares, 3)


@pytest.mark.parametrize(("size", "t", "n"), [(16, 3, 5), (32, 1, 5), (32, 6, 5), (32, 3, 256)])
def test_splits_that_protect_nothing_are_refused(size: int, t: int, n: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        shamir.split(bytes(size), t, n)


# The graph -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 5, 6, 7, 14, 50])
def test_neighbourhoods_are_symmetric_regular_and_depend_on_the_round(count: int) -> None:
    names = [f"h{index}" for index in range(count)]
    params = SecAggParams()
    graph = CohortGraph.build(names, CONTEXT, params)
    assert graph == CohortGraph.build(names[::-1], CONTEXT, params)
    for name in names:
        near = graph.of(name)
        assert name in near
        assert len(near) == len(set(near)) == min(count, params.num_shares)
        assert all(name in graph.of(other) for other in near)
        assert [graph.index(name, holder) for holder in near] == list(range(1, len(near) + 1))
    assert graph.connected(names)
    if count > 7:
        assert graph != CohortGraph.build(names, bytes(32), params)


def openable(
    near: list[set[int]], colluders: set[int], dropped: dict[int, set[int]], t: int
) -> bool:
    """Whether hospital 0 is opened: ``dropped[m]`` is what honest ``m`` was told has dropped.

    More than the server can reach: it ignores that t neighbours must have signed one set.
    """

    def shares(owner: int, lost: bool) -> int:
        return sum(m in colluders or (owner in dropped[m]) == lost for m in near[owner])

    if shares(0, lost=False) < t:
        return False
    if shares(0, lost=True) >= t:
        return True
    return all(shares(j, lost=True) >= t for j in near[0] - {0} - colluders)


def views(near: set[int], me: int, spare: int) -> list[set[int]]:
    others = sorted(near - {me})
    return [set(gone) for size in range(spare + 1) for gone in combinations(others, size)]


@pytest.mark.parametrize(("count", "most"), [(5, 2), (7, 2)])
def test_no_colluders_within_the_bound_open_a_hospital_whatever_each_is_told(
    count: int, most: int
) -> None:
    """4 of 5, complete and ring: every choice of two colluders and of everybody's view."""
    near = [{(place + d) % count for d in range(-2, 3)} for place in range(count)]
    for colluders in map(set, combinations(range(1, count), most)):
        honest = [m for m in range(count) if m not in colluders]
        for told in product(*(views(near[m], m, 1) for m in honest)):
            dropped = dict(zip(honest, told, strict=True))
            assert not openable(near, colluders, dropped, 4)


def test_bound_on_colluders_is_tight() -> None:
    near = [set(range(5))] * 5
    dropped = {0: set(), 1: {0}}
    assert openable(near, {2, 3, 4}, dropped, 4)

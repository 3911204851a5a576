"""Randomness that privacy rests on: Poisson sampling, Gaussian and discrete Laplace noise.

Every stream is AES-256 in counter mode under a key drawn from the operating system for that
stream alone, so neither a run's seed nor another hospital's stream in the same process tells
anything about it. A fixed key is for tests only and nothing in the configuration reaches it.
Normals for a sum that lies on a GPU are made there, from ChaCha20 under keys of that stream
(:mod:`common.privacy.device_noise`).

Floating-point normals added to floating-point sums are not the Gaussian mechanism (Mironov
2012): what is released goes through :class:`common.privacy.gaussian.GaussianSum`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from common.errors import PrivacyError
from common.privacy.chacha import KEY_BYTES
from common.privacy.threads import one_thread

_PAIRS = 1 << 14
"""Box–Muller pairs made at once: the work space (½ MB) stays in a core's cache."""

LARGEST_CHUNK = 2 * _PAIRS
"""No piece of :meth:`SecureRandom.normal_chunks` is longer."""

_ZEROS = memoryview(bytes(16 * _PAIRS))
_BLOCK = 16

_RARE = 2.0**32
"""Radius uniforms below this many units of 2^−53 (one in 2^21) get 53 further bits."""


class SecureRandom:
    """A cryptographic stream of uniforms and normals, keyed from OS entropy when created.

    One object belongs to one thread at a time.
    """

    def __init__(self, *, key_for_tests: bytes | None = None) -> None:
        # One key serves one object for its life; the counter never repeats under it.
        key = os.urandom(32) if key_for_tests is None else key_for_tests
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        return "SecureRandom()"

    def __reduce__(self) -> str:
        raise TypeError("a SecureRandom is never copied to another process: two would share it")

    def _fill(self, buffer: bytearray, size: int) -> None:
        """Write the stream's next ``size`` bytes to ``buffer``, 15 bytes longer at least."""
        if size <= len(_ZEROS):
            self._stream.update_into(_ZEROS[:size], buffer)
            return
        view = memoryview(buffer)
        for at in range(0, size, len(_ZEROS)):
            block = _ZEROS[: min(size - at, len(_ZEROS))]
            self._stream.update_into(block, view[at : at + len(block) + _BLOCK - 1])

    def _bits(self, n: int) -> np.ndarray:
        """``n`` uniform 64-bit words."""
        buffer = bytearray(8 * n + _BLOCK - 1)
        self._fill(buffer, 8 * n)
        return np.frombuffer(buffer, dtype=np.uint64, count=n)

    def uniform(self, n: int) -> np.ndarray:
        """``n`` float64 uniform on [0, 1), with all 53 bits."""
        return (self._bits(n) >> np.uint64(11)) * 2.0**-53

    def bernoulli(self, n: int, probability: float) -> np.ndarray:
        """``n`` independent booleans, each true with ``probability``."""
        return self.uniform(n) < probability

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> torch.Tensor:
        """Float32 tensor of independent normals, mean 0 and standard deviation ``std``."""
        out = torch.empty(math.prod(shape), dtype=torch.float32)
        with one_thread():
            for start, z in self.normal_chunks(out.numel()):
                out[start : start + len(z)] = z.mul_(std)
        return out.reshape(shape)

    def normal_chunks(self, n: int) -> Iterator[tuple[int, torch.Tensor]]:
        """``n`` independent standard normals in pieces: (index of the first, float64 tensor).

        A piece is the caller's to change, and valid until the next one is asked for: all share
        one work space, so that five million take little longer than the logarithms and cosines.

        Box–Muller in float64. The radius's uniform has 53 bits, and 53 more where it is below
        2^−21, so the largest |z| is 12.1 and the tails are filled as finely as the middle (a cut
        at 8.57, where 53 bits end, would be met once in 10^17 draws). The angle has 53 bits.
        """
        pairs = max(1, min(_PAIRS, (n + 1) // 2))
        buffer = bytearray(16 * pairs + _BLOCK - 1)
        words = np.frombuffer(buffer, dtype=np.int64, count=2 * pairs)
        u = torch.empty(2 * pairs, dtype=torch.float64)
        cosine = torch.empty(pairs, dtype=torch.float64)
        radius, angle = u[:pairs], u[pairs:]
        for start in range(0, n, 2 * pairs):
            with one_thread():
                self._fill(buffer, 16 * pairs)
                np.right_shift(words.view(np.uint64), np.uint64(11), out=words.view(np.uint64))
                u.copy_(torch.from_numpy(words))
                self._refine(radius.numpy())
                # u in (0, 1], never 0, so that the logarithm is finite.
                radius.mul_(2.0**-53).log_().mul_(-2.0).sqrt_()
                angle.mul_(2.0 * math.pi * 2.0**-53)
                torch.cos(angle, out=cosine)
                torch.sin(angle, out=angle).mul_(radius)
                radius.mul_(cosine)
            yield start, u[: n - start]

    def stream_key(self) -> bytes:
        """32 bytes of this stream, as the key of another: of one that a GPU makes."""
        return self._stream.update(bytes(KEY_BYTES))

    def _refine(self, units: np.ndarray) -> None:
        """Integers k, uniform below 2^53, become uniforms of (k, k + 1], in place.

        The interval's upper end serves where k is large: k + 1 is then as near as a float64 of
        the result's size comes. Small ones are spread over the interval by 53 further bits.
        """
        rare = np.flatnonzero(units < _RARE)
        units += 1.0
        if len(rare):
            units[rare] -= self.uniform(len(rare))

    def discrete_laplace(self, epsilon: float) -> int:
        """Two-sided geometric noise, P(k) ∝ exp(−ε·|k|), for a count of sensitivity 1.

        Adding it to a count is ε-DP (Ghosh, Roughgarden, Sundararajan 2009, §2). Exact: only
        integers are drawn and compared, ε being the rational number that the float is, by
        Canonne, Kamath, Steinke, *The Discrete Gaussian for Differential Privacy* (2020),
        algorithms 1 and 2. PrivacyError unless ε is positive and finite.
        """
        if not (epsilon > 0 and math.isfinite(epsilon)):
            raise PrivacyError(f"no noise gives ε={epsilon}", "use a finite ε > 0")
        s, t = float(epsilon).as_integer_ratio()
        while True:
            u = self._below(t)
            if not self._bernoulli_exp(Fraction(u, t)):
                continue
            v = 0
            while self._bernoulli_exp(Fraction(1)):
                v += 1
            k = (u + t * v) // s
            negative = self._below(2) == 1
            if not (negative and k == 0):  # zero would count twice
                return -k if negative else k

    def _below(self, n: int) -> int:
        """An integer uniform on 0, …, n − 1."""
        bits = (n - 1).bit_length()
        size = -(-bits // 8)
        while True:
            drawn = int.from_bytes(self._stream.update(bytes(size))) >> (8 * size - bits)
            if drawn < n:
                return drawn

    def _bernoulli_exp(self, x: Fraction) -> bool:
        """True with probability exp(−x), for x in [0, 1]; algorithm 1 of the paper above."""
        k = 1
        while self._below(x.denominator * k) < x.numerator:
            k += 1
        return k % 2 == 1

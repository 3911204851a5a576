"""Randomness that privacy rests on: Poisson sampling and Gaussian noise.

Every stream is AES-256 in counter mode under a key drawn from the operating system for that
stream alone, so neither a run's seed nor another hospital's stream in the same process tells
anything about it. A fixed key is for tests only and nothing in the configuration reaches it.

Caveat: noise is Box–Muller in float64 rounded to float32. Sums of floating-point numbers are
not the real Gaussian mechanism (Mironov 2012); an adversary who sees the exact low-order bits
of a released sum may learn more than ε says. Closing that is the ledger's work, not done yet.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_ZEROS = bytes(1 << 20)


class SecureRandom:
    """A cryptographic stream of uniforms and normals, keyed from OS entropy when created."""

    def __init__(self, *, key_for_tests: bytes | None = None) -> None:
        # One key serves one object for its life; the counter never repeats under it.
        key = os.urandom(32) if key_for_tests is None else key_for_tests
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        return "SecureRandom()"

    def __reduce__(self) -> str:
        raise TypeError("a SecureRandom is never copied to another process: two would share it")

    def _bits(self, n: int) -> np.ndarray:
        """``n`` uniform 64-bit words."""
        size, parts = 8 * n, []
        while size > 0:
            block = min(size, len(_ZEROS))
            parts.append(self._stream.update(_ZEROS[:block] if block < len(_ZEROS) else _ZEROS))
            size -= block
        return np.frombuffer(b"".join(parts), dtype=np.uint64)

    def uniform(self, n: int) -> np.ndarray:
        """``n`` float64 uniform on [0, 1), with all 53 bits."""
        return (self._bits(n) >> np.uint64(11)) * 2.0**-53

    def bernoulli(self, n: int, probability: float) -> np.ndarray:
        """``n`` independent booleans, each true with ``probability``."""
        return self.uniform(n) < probability

    def normal(self, shape: torch.Size | tuple[int, ...], std: float) -> torch.Tensor:
        """Float32 tensor of independent normals, mean 0 and standard deviation ``std``."""
        n = math.prod(shape)
        half = (n + 1) // 2
        u = torch.from_numpy(self.uniform(2 * half))
        # 1 − u lies in (0, 1], so that the logarithm is finite; the largest |z| is then 8.5 σ.
        radius = torch.sqrt(-2.0 * torch.log1p(-u[:half])).mul_(std)
        angle = u[half:].mul_(2.0 * math.pi)
        z = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)])
        return z[:n].to(torch.float32).reshape(shape)

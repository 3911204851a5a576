"""Standard normals made on a device, from a ChaCha20 stream there: for sums that lie on it.

By the arithmetic of :meth:`common.privacy.randomness.SecureRandom.normal_chunks` (Box–Muller in
float64), but that the radius's uniform has 53 + 22 bits: |z| is at most 10.2, and a larger one
would be met once in 10^23 draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.privacy.chacha import PAIRS, keystream

_BLOCKS = 1 << 20
"""Made at once: 64 MB of stream."""
_UNIFORM = (1 << 53) - 1
_SPARE = (1 << 11) - 1
_RARE = 2.0**32
"""Radius uniforms below this many units of 2^−53 get 22 further bits: larger ones have no room."""


def normals(key: Tensor, n: int) -> Tensor:
    """(n,) float64: independent standard normals from the stream of ``key``, on its device.

    One key serves one call. ``key`` is of :func:`common.privacy.chacha.key_tensor`; nothing waits
    for the device.
    """
    blocks = -(-n // PAIRS)
    pieces = [
        _normals(keystream(key, start, min(_BLOCKS, blocks - start)))
        for start in range(0, blocks, _BLOCKS)
    ]
    return torch.cat([*pieces, torch.empty(0, dtype=torch.float64, device=key.device)])[:n]


def _normals(words: Tensor) -> Tensor:
    """(8, blocks) int64 of the stream → 8 · blocks normals: each pair of numbers gives a pair."""
    one, other = words.view(PAIRS // 2, 2, -1).unbind(1)
    radius = ((one >> 11) & _UNIFORM).to(torch.float64)
    angle = ((other >> 11) & _UNIFORM).to(torch.float64)
    spread = (((one & _SPARE) << 11) | (other & _SPARE)).to(torch.float64).mul_(2.0**-22)
    # Integers k become uniforms of (k, k + 1]: never 0, so that the logarithm is finite.
    radius += torch.where(radius < _RARE, 1.0 - spread, 1.0)
    radius.mul_(2.0**-53).log_().mul_(-2.0).sqrt_()
    angle.mul_(2.0 * math.pi * 2.0**-53)
    return torch.stack([torch.cos(angle).mul_(radius), torch.sin(angle).mul_(radius)]).view(-1)

"""A small ResNet-9 with group norm, whose ring-pooled activations are the learnt features.

Three resolutions (for 28 pixels: 28, 14, 7) with ``width``, 2 and 4 times as many channels, a
residual block at the last two. After He et al. (2016); group norm after Wu and He (2018).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.prior.rings import ring_weights

_MIDDLE_EDGES = (0.35, 0.65)
_LAST_EDGES = (0.35, 0.7)
_RINGS = 3


class _Layer(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.GroupNorm(max(1, outputs // 8), outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _Layer(channels, channels)
        self.second = _Layer(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.second(functional.relu(self.first(x))))


class RingNet(nn.Module):
    """(n, 3, s, s) in [-1, 1] -> (n, ``features``): means in rings of the last two stages."""

    middle: Tensor
    last: Tensor

    def __init__(self, width: int = 16, size: int = 28) -> None:
        super().__init__()
        self.width = width
        self.stem = _Layer(3, width)
        self.down1 = _Layer(width, 2 * width, 2)
        self.block1 = _Residual(2 * width)
        self.down2 = _Layer(2 * width, 4 * width, 2)
        self.block2 = _Residual(4 * width)
        half = (size + 1) // 2
        self.register_buffer("middle", ring_weights(half, _MIDDLE_EDGES), persistent=False)
        self.register_buffer("last", ring_weights((half + 1) // 2, _LAST_EDGES), persistent=False)
        self.features = _RINGS * (2 + 2 * 4) * width

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = functional.relu(self.stem(x))
        x = self.block1(functional.relu(self.down1(x)))
        middle = x.flatten(2).float() @ self.middle.T
        x = self.block2(functional.relu(self.down2(x)))
        flat = x.flatten(2).float()
        means = flat @ self.last.T
        squares = (flat * flat) @ self.last.T
        spread = (squares - means * means).clamp(min=0).add(1e-6).sqrt()
        return torch.cat([part.flatten(1) for part in (middle, means, spread)], 1)


class PretextHeads(nn.Module):
    """What a network is asked about drawn pictures: the stage, the nucleus's form, attributes."""

    def __init__(self, features: int, stages: int, forms: int, attributes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.stage = nn.Linear(features, stages)
        self.form = nn.Linear(features, forms)
        self.attributes = nn.Linear(features, attributes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, features) -> logits of stages and forms, and attributes."""
        x = self.norm(features)
        return self.stage(x), self.form(x), self.attributes(x)

"""How dyes colour a picture, and what a microscope and a camera do to it.

Colour follows the law of Beer and Lambert: each dye takes its share of red, green and blue light
away, and layers add in optical density. The four dyes are those of a Romanowsky stain: eosin,
methylene blue with the azures, the purple of azure B bound with eosin to chromatin, and
haemoglobin with bound eosin (red cells, eosinophil granules). Their densities come from where
their absorption peaks lie (about 520, 650, 550, and 415 with 540-580 nm), not from pictures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

EOSIN, BLUE, PURPLE, HAEMOGLOBIN = range(4)
DYES = 4

# Optical density in red, green, blue at concentration 1.
_DENSITY = ((0.06, 0.75, 0.35), (0.80, 0.45, 0.12), (0.75, 1.00, 0.35), (0.15, 0.80, 0.75))


class Draw:
    """Random numbers for ``n`` pictures from a public seed (this randomness is no secret)."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.n, self.generator = n, generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(n, *shape), uniform in [low, high]."""
        return torch.rand(self.n, *shape, generator=self.generator) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """(n, *shape), standard normal."""
        return torch.randn(self.n, *shape, generator=self.generator)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """(n, *shape) of 0 and 1."""
        return (torch.rand(self.n, *shape, generator=self.generator) < probability).float()

    def field(self, cells: int, size: int) -> Tensor:
        """(n, size, size) of smooth noise, about unit variance, ``cells`` bumps a side."""
        grid = torch.randn(self.n, 1, cells + 1, cells + 1, generator=self.generator)
        mode = "bilinear" if cells < size else "nearest"
        corners = None if mode == "nearest" else True
        return functional.interpolate(grid, (size, size), mode=mode, align_corners=corners)[:, 0]


def blur(planes: Tensor, sigma: Tensor) -> Tensor:
    """Blur (n, c, s, s) with a Gaussian of ``sigma`` (n,) pixels for each picture."""
    axis = torch.arange(planes.shape[-1], dtype=planes.dtype)
    reach = (axis[:, None] - axis) / sigma.clamp(min=0.05)[:, None, None]
    kernel = torch.exp(-0.5 * reach**2)
    kernel = (kernel / kernel.sum(2, keepdim=True))[:, None]
    both: Tensor = kernel @ planes @ kernel.transpose(2, 3)
    return both


def _cosines(block: int) -> Tensor:
    k = torch.arange(block, dtype=torch.float32)
    basis = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / block) * math.sqrt(2 / block)
    basis[0] /= math.sqrt(2)
    return basis


def compressed(picture: Tensor, step: Tensor, block: int = 4) -> Tensor:
    """Round block-cosine coefficients of (n, 3, s, s) to multiples of ``step`` (n,), as JPEG."""
    n, c, s, _ = picture.shape
    basis = _cosines(block)
    parts = picture.reshape(n, c, s // block, block, s // block, block)
    coefficients = torch.einsum("ki,ncaibj,lj->ncakbl", basis, parts, basis)
    frequency = torch.arange(block)
    grown = (1 + frequency[:, None, None] + frequency[None, None, :]).float()  # (k, 1, l)
    steps = step[:, None, None, None, None, None].clamp(min=1e-4) * grown
    rounded = torch.round(coefficients / steps) * steps
    back: Tensor = torch.einsum("ki,ncakbl,lj->ncaibj", basis, rounded, basis)
    return back.reshape(n, c, s, s)


def photograph(dyes: Tensor, draw: Draw, size: int) -> Tensor:
    """Turn dye concentrations (n, 4, s, s) into pictures (n, 3, size, size), values in 0 to 1.

    Stain, lamp, white balance, focus, compression, gamma, sharpening and noise vary.
    """
    n, s = len(dyes), dyes.shape[-1]
    density = torch.tensor(_DENSITY) * torch.exp(0.16 * draw.normal(DYES, 3))
    density = density + 0.04 * draw.uniform(0, 1, DYES, 3)
    strength = torch.exp(0.22 * draw.normal(1, 1)) * torch.exp(0.15 * draw.normal(DYES, 1))
    od = torch.einsum("ndij,ndc->ncij", dyes, density * strength)
    white = draw.uniform(0.82, 1.0, 1) * (1 - draw.uniform(0, 0.1, 3) * draw.chance(0.8, 1))
    light = white[:, :, None, None] * torch.exp(-od)
    axis = torch.linspace(-1, 1, s)
    slope = draw.normal(2) * 0.02
    tilt = slope[:, 0, None, None] * axis[:, None] + slope[:, 1, None, None] * axis
    light = light * (1 + tilt)[:, None]
    light = blur(light, draw.uniform(0.3, 1.7) * s / 56)
    light = compressed(light, draw.uniform(0, 0.03) * draw.chance(0.5))
    if s != size:
        light = functional.interpolate(light, (size, size), mode="area")
    sharpen = draw.uniform(-0.1, 0.6)[:, None, None, None]
    light = light + sharpen * (light - blur(light, torch.full((n,), 0.8)))
    light = light.clamp(1e-3, 1) ** torch.exp(0.15 * draw.normal())[:, None, None, None]
    grain = draw.normal(3, size, size) * draw.uniform(0.0, 0.02)[:, None, None, None]
    return (light + grain).clamp(0, 1)

"""A few hundred statistics of a picture's colour, rings, shapes and texture.

Every one is the same for a picture turned by quarter turns or mirrored. They follow what a
microscopist looks at: how dark and how blue or pink each zone is, how large, round and lobed the
dark part is, how grainy. No number in here was fitted to real pictures.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from common.prior.rings import ring_weights

_EDGES = (0.2, 0.4, 0.6, 0.8, 1.0)
_BINS = 12
_GRID = 6
_LEVELS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85)
_SPECTRUM = 7


def _planes(rgb: Tensor) -> Tensor:
    """(n, 3, s, s) in 0 to 1 -> (n, 8, s, s): colours, opponents, darkness and saturation."""
    red, green, blue = rgb.unbind(1)
    density = -torch.log(rgb.clamp(min=1 / 64)).mean(1) / 2
    spread = rgb.amax(1) - rgb.amin(1)
    opponents = [0.5 + red - green, 0.5 + blue - green, 0.5 + red - blue]
    return torch.stack([red, green, blue, density, *opponents, spread], 1)


def _rings(planes: Tensor) -> Tensor:
    weights = ring_weights(planes.shape[-1], _EDGES).to(planes)
    flat = planes.flatten(2)
    means = flat @ weights.T
    spread = ((flat * flat) @ weights.T - means * means).clamp(min=0).add(1e-5).sqrt()
    return torch.cat((means.flatten(1), spread.flatten(1)), 1)


def _soft_bins(plane: Tensor, bins: int) -> Tensor:
    """(n, p) -> (n, bins, p): triangular membership of bins over 0 to 1; each pixel sums to 1."""
    at = plane.clamp(0, 1) * (bins - 1)
    centre = torch.arange(bins, dtype=plane.dtype)[None, :, None]
    return (1 - (at[:, None] - centre).abs()).clamp(min=0)


def _histograms(planes: Tensor) -> Tensor:
    """Square roots of histograms over the middle disc, one or two planes at a time."""
    disc = ring_weights(planes.shape[-1], (0.75,)).to(planes)[0]
    flat = planes.flatten(2)
    parts = [(_soft_bins(flat[:, c], _BINS) * disc).sum(2) for c in range(flat.shape[1])]
    for first, second in ((0, 2), (0, 1), (3, 6)):
        one, two = _soft_bins(flat[:, first], _GRID), _soft_bins(flat[:, second], _GRID)
        parts.append(torch.einsum("nap,nbp->nab", one * disc, two).flatten(1))
    return torch.cat(parts, 1).add(1e-4).sqrt()


def _shapes(plane: Tensor) -> Tensor:
    """Area, outline, place, length and width of the part darker than each of some levels."""
    size = plane.shape[-1]
    axis = (torch.arange(size, dtype=plane.dtype) * 2 + 1) / size - 1
    y, x = axis[:, None].expand(size, size), axis[None, :].expand(size, size)
    disc = (ring_weights(size, (0.95,)).to(plane)[0] > 1e-6).reshape(size, size).float()
    parts = []
    for level in _LEVELS:
        mask = torch.sigmoid((level - plane) * 25) * disc
        total = mask.sum((1, 2)) + 1e-2
        mx, my = (mask * x).sum((1, 2)) / total, (mask * y).sum((1, 2)) / total
        xx = (mask * x * x).sum((1, 2)) / total - mx * mx
        yy = (mask * y * y).sum((1, 2)) / total - my * my
        xy = (mask * x * y).sum((1, 2)) / total - mx * my
        trace, gap = xx + yy, torch.sqrt((xx - yy) ** 2 + 4 * xy * xy + 1e-8)
        one, two = mask[:, 1:, 1:] - mask[:, :-1, :-1], mask[:, 1:, :-1] - mask[:, :-1, 1:]
        length = ((one * one + two * two) / 2 + 1e-6).sqrt()
        outline = length.sum((1, 2))
        area = total / size**2
        parts += [
            area.sqrt(),
            outline / size,
            torch.log1p(outline**2 / total),
            torch.sqrt(mx * mx + my * my),
            trace.clamp(min=0).sqrt(),
            gap / (trace + 1e-2),
        ]
    return torch.stack(parts, 1)


def _texture(planes: Tensor) -> Tensor:
    """How strongly planes change from pixel to pixel, in rings, at three scales."""
    parts = []
    current = planes[:, [0, 1, 2, 6]]
    for edges in ((0.3, 0.6, 0.9), (0.3, 0.6, 0.9), (0.5,)):
        around = functional.avg_pool2d(functional.pad(current, (1, 1, 1, 1), "replicate"), 3, 1)
        detail = current - around
        weights = ring_weights(current.shape[-1], edges).to(planes)
        flat = detail.flatten(2)
        for part in (flat.abs(), flat.clamp(min=0) ** 2, (-flat).clamp(min=0) ** 2):
            mean = part @ weights.T
            parts.append((mean + 1e-6).sqrt().flatten(1))
        current = functional.avg_pool2d(current, 2)
    return torch.cat(parts, 1)


def _spectrum(planes: Tensor) -> Tensor:
    """Logarithm of the power in rings of spatial frequency, made even under quarter turns."""
    chosen = planes[:, [0, 1, 2, 6]]
    size = chosen.shape[-1]
    axis = torch.hann_window(size, periodic=False, dtype=chosen.dtype)
    centred = (chosen - chosen.mean((2, 3), keepdim=True)) * axis[:, None] * axis
    power = torch.fft.fft2(centred).abs() ** 2 / size**2
    frequency = torch.fft.fftfreq(size) * size
    far = torch.sqrt(frequency[:, None] ** 2 + frequency[None, :] ** 2)
    ring = (far.round().long().clamp(max=size) - 1).clamp(min=0)
    member = torch.stack([(ring == k) & (far > 0) for k in range(_SPECTRUM)]).to(chosen)
    member = member.flatten(1) / member.flatten(1).sum(1, keepdim=True)
    return torch.log(power.flatten(2) @ member.T + 1e-4).flatten(1)


def statistics(pictures: Tensor) -> Tensor:
    """(n, 3, s, s) in [-1, 1] -> (n, features) float32."""
    rgb = ((pictures.float() + 1) / 2).clamp(0, 1)
    planes = _planes(rgb)
    return torch.cat(
        (
            _rings(planes),
            _histograms(planes),
            _shapes(planes[:, 0]),
            _shapes(planes[:, 1]),
            _shapes(1 - planes[:, 7]),
            _texture(planes),
            _spectrum(planes),
        ),
        1,
    )

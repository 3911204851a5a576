"""The shapes of nuclei, as smooth unions of a few discs in the cell's own frame.

A round nucleus is one disc, a kidney a disc with a bite, a band an arc of five discs, a lobed
nucleus two to five discs with thin bridges, a folded one three discs that overlap.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.prior.kinds import FORMS, RANGE_FIELDS
from common.prior.stains import Draw

_DISCS = 5
_FILLING = RANGE_FIELDS.index("filling")
_ECCENTRICITY = RANGE_FIELDS.index("eccentricity")
_ELONGATION = RANGE_FIELDS.index("elongation")


def _discs(draw: Draw, form: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return discs' x, y, radius (n, 5) in free units, and the number of lobes (n,)."""
    n = draw.n
    index = torch.arange(_DISCS)[None].expand(n, -1).float()
    name = {f: (form == i)[:, None] for i, f in enumerate(FORMS)}
    lobes = torch.randint(3, 6, (n, 1), generator=draw.generator).float()
    lobes = torch.where(name["two lobes"], torch.full_like(lobes, 2), lobes)
    lobes = torch.where(name["folded"], torch.full_like(lobes, 3), lobes)
    lobes = torch.where(name["band"], torch.full_like(lobes, _DISCS), lobes)
    single = name["round"] | name["kidney"] | name["none"]
    lobes = torch.where(single, torch.ones_like(lobes), lobes)

    # Discs sit on an arc: its opening, and how far they are apart, make the form.
    sweep = draw.uniform(0.6, 1.7, 1) * math.pi
    sweep = torch.where(name["band"], draw.uniform(0.6, 1.5, 1) * math.pi, sweep)
    sweep = torch.where(name["folded"], draw.uniform(0.7, 1.4, 1) * math.pi, sweep)
    sweep = torch.where(name["two lobes"], draw.uniform(0.45, 1.0, 1) * math.pi, sweep)
    loose = draw.uniform(-0.12, 0.12, _DISCS) * (1 - name["band"].float())
    turn = sweep * ((index / (lobes - 1).clamp(min=1)) - 0.5 + loose)
    arc = draw.uniform(0.8, 1.25, _DISCS)
    arc = torch.where(name["band"], 1 + (arc - 1) * 0.3, arc)
    x, y = arc * torch.cos(turn), arc * torch.sin(turn)

    apart = 2 * torch.sin(sweep / (lobes - 1).clamp(min=1) / 2)
    size = apart * draw.uniform(0.34, 0.6, 1) * torch.exp(0.15 * draw.normal(_DISCS))
    # A band's discs overlap so far that no bead shows.
    band = torch.maximum(draw.uniform(0.28, 0.55, 1), 0.68 * apart)
    band = band * torch.exp(0.08 * draw.normal(_DISCS))
    size = torch.where(name["band"], band, size)
    size = torch.where(name["folded"], draw.uniform(0.7, 1.2, _DISCS), size)
    size = torch.where(single, torch.ones_like(size), size)
    x = torch.where(single, torch.zeros_like(x), x)
    y = torch.where(single, torch.zeros_like(y), y)
    size = torch.where(index < lobes, size, torch.full_like(size, -9.0))
    weight = (index < lobes).float()
    x = x - (x * weight).sum(1, keepdim=True) / lobes
    y = y - (y * weight).sum(1, keepdim=True) / lobes
    return x, y, size, lobes[:, 0]


def nucleus_mask(
    draw: Draw, form: Tensor, values: Tensor, x: Tensor, y: Tensor, radius: Tensor, edge: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the nuclei's masks (n, s, s) in 0 to 1 and their numbers of lobes (n,).

    ``values`` are the fields of :mod:`common.prior.kinds`; ``x`` and ``y`` (n, s, s) are
    micrometres from the cell's middle; ``radius`` and ``edge`` (n, 1, 1) are micrometres. The
    nucleus is scaled to fill its share of the cell, and moved towards the membrane.
    """
    n, s = draw.n, x.shape[-1]
    dx, dy, size, lobes = _discs(draw, form)
    kidney = (form == FORMS.index("kidney"))[:, None, None]
    bite_at = draw.uniform(0.75, 1.35, 1, 1)
    bite_size = draw.uniform(0.35, 0.75, 1, 1)
    bridge = draw.uniform(0.03, 0.12, 1, 1)
    turn = draw.uniform(0, 2 * math.pi, 1, 1)
    cos, sin = torch.cos(turn), torch.sin(turn)
    long = values[:, _ELONGATION, None, None].clamp(min=1) ** 0.5
    wobble = 0.06 * draw.field(4, s) * draw.uniform(0, 1.5, 1, 1)

    def distance(u: Tensor, v: Tensor) -> Tensor:
        """Signed distance to the outline in free units, negative inside."""
        gaps = [
            torch.sqrt((u - dx[:, k, None, None]) ** 2 + (v - dy[:, k, None, None]) ** 2 + 1e-9)
            - size[:, k, None, None]
            for k in range(_DISCS)
        ]
        union = torch.zeros_like(gaps[0])
        nearest = torch.stack(gaps).amin(0)
        for gap in gaps:
            union += torch.exp(((nearest - gap) / bridge).clamp(min=-30))
        union = nearest - bridge * torch.log(union)
        bite = bite_size - torch.sqrt((u - bite_at) ** 2 + v * v)
        return torch.where(kidney, torch.maximum(union, bite), union)

    # Its area in free units, on a coarse grid, gives the scale that fills the wanted share.
    reach, points = 3.2, 24
    grid = ((torch.arange(points) + 0.5) / points * 2 - 1) * reach
    inside = distance(grid[None, None, :].expand(n, points, points), grid[None, :, None]) < 0
    area = inside.float().mean((1, 2))[:, None, None] * (2 * reach) ** 2
    wanted = values[:, _FILLING, None, None].clamp(0.02, 0.97) * math.pi * radius**2
    scale = torch.sqrt(wanted / area.clamp(min=0.2))

    room = (radius - torch.sqrt(wanted / math.pi) * long).clamp(min=0)
    room = room * values[:, _ECCENTRICITY, None, None].clamp(max=1)
    way = draw.uniform(0, 2 * math.pi, 1, 1)
    px, py = x - room * torch.cos(way), y - room * torch.sin(way)
    u = (px * cos + py * sin) / scale / long
    v = (py * cos - px * sin) / scale * long
    outline = (distance(u, v) + wobble) * scale
    mask = torch.sigmoid(-outline / edge * 2)
    # The membrane holds the nucleus in.
    mask = mask * torch.sigmoid((radius - torch.sqrt(x * x + y * y)) / edge * 2)
    return mask * (form > 0).float()[:, None, None], lobes * (form > 0).float()

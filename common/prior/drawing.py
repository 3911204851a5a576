"""Draw small pictures like stained blood cells, with labels, from a public seed.

Every cell is drawn from the ranges of :mod:`common.prior.kinds`; about a third of them are
*chimeras*, which take each property from a kind of its own, so that no property gives another
away. What a network learns from these pictures costs no privacy: no real image was read, looked
at or measured to write this generator. Nothing in it was changed for accuracy on real pictures; the
networks' widths and the whitening's size and ridge (:mod:`common.prior.train`) were chosen by
accuracy on BloodMNIST's validation split, which the privacy figures do not count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from common.errors import DataError
from common.prior.kinds import KINDS, RANGE_FIELDS, STAGES
from common.prior.nuclei import nucleus_mask
from common.prior.stains import BLUE, DYES, EOSIN, HAEMOGLOBIN, PURPLE, Draw, blur, photograph

CHIMERA = len(STAGES)
STAGE_COUNT = len(STAGES) + 1
_CHUNK = 64
_VIEW = (13.0, 26.0)  # micrometres across a picture
_LOW = torch.tensor([[getattr(s, f)[0] for f in RANGE_FIELDS] for s in STAGES])
_HIGH = torch.tensor([[getattr(s, f)[1] for f in RANGE_FIELDS] for s in STAGES])
_FORMS = torch.tensor([s.forms for s in STAGES])
# Kinds come equally often; a kind's stages by their shares.
_SHARES = torch.tensor([s.share for s in STAGES]) / len(KINDS)
_SCALE_LOW, _SCALE_SPAN = _LOW.amin(0), (_HIGH.amax(0) - _LOW.amin(0)).clamp(min=1e-6)

ATTRIBUTES: tuple[str, ...] = (*RANGE_FIELDS, "field of view", "area in view", "lobes")


@dataclass(frozen=True)
class Cells:
    """Drawn pictures with what they show.

    ``pictures`` uint8 (n, 3, size, size); ``kind`` int64 (n,), -1 for a chimera; ``stage`` int64
    (n,), ``CHIMERA`` for a chimera; ``form`` int64 (n,), index into ``FORMS``; ``attributes``
    float32 (n, len(ATTRIBUTES)), each about 0 to 1.
    """

    pictures: Tensor
    kind: Tensor
    stage: Tensor
    form: Tensor
    attributes: Tensor

    def __len__(self) -> int:
        return len(self.pictures)

    def to(self, device: torch.device) -> Cells:
        """The same on ``device``."""
        return Cells(*(getattr(self, field.name).to(device) for field in fields(self)))


def draw_cells(count: int, *, seed: int, size: int = 28, chimeras: float = 0.35) -> Cells:
    """Draw ``count`` cells of ``size`` pixels a side. The same arguments give the same cells.

    Raises :class:`DataError` for a count below 1 or a size that is odd or below 12.
    """
    if count < 1:
        raise DataError(f"{count} pictures were asked for.", "Ask for one or more.")
    parts = list(_chunks(count, seed, size, chimeras))
    return Cells(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("pictures", "kind", "stage", "form", "attributes")
        )
    )


def _chunks(count: int, seed: int, size: int, chimeras: float) -> Iterator[Cells]:
    if size < 12 or size % 2:
        raise DataError(f"A drawn cell of {size} pixels.", "Use an even size of 12 or more.")
    generator = torch.Generator().manual_seed(seed % 2**63)
    for start in range(0, count, _CHUNK):
        yield _draw(Draw(min(_CHUNK, count - start), generator), size, chimeras)


def _properties(draw: Draw, chimeras: float) -> tuple[Tensor, Tensor, Tensor]:
    """Draw (stage, form, values (n, fields)) for each picture."""
    n, g = draw.n, draw.generator
    stage = torch.multinomial(_SHARES, n, replacement=True, generator=g)
    mixed = draw.chance(chimeras).bool()
    source = stage[:, None].repeat(1, len(RANGE_FIELDS) + 1)
    other = torch.randint(len(STAGES), source.shape, generator=g)
    # A platelet's size and empty nucleus would leave nothing of the other properties to see.
    other[:, [0, 1, -1]] = other[:, [0, 1, -1]].clamp(max=len(STAGES) - 2)
    source = torch.where(mixed[:, None], other, source)
    column = torch.arange(len(RANGE_FIELDS))
    low, high = _LOW[source[:, :-1], column], _HIGH[source[:, :-1], column]
    # The books' ranges are not sharp: reach a little beyond them.
    slack = draw.uniform(-0.15, 1.15, len(RANGE_FIELDS))
    values = (low + (high - low) * slack).clamp(min=0)
    form = torch.multinomial(_FORMS[source[:, -1]], 1, generator=g)[:, 0]
    return torch.where(mixed, torch.full_like(stage, CHIMERA), stage), form, values


def _draw(draw: Draw, size: int, chimeras: float) -> Cells:
    stage, form, values = _properties(draw, chimeras)
    n, s = draw.n, 2 * size
    value = {name: values[:, i, None, None] for i, name in enumerate(RANGE_FIELDS)}
    view = (
        _VIEW[0] * torch.exp(draw.uniform(0, math.log(_VIEW[1] / _VIEW[0])))[:, None, None]
    )  # micrometres across
    pixel = view / s
    axis = (torch.arange(s) + 0.5) / s - 0.5
    shift = draw.normal(2, 1, 1) * 0.035
    x, y = (axis[None, None, :] - shift[:, 0]) * view, (axis[None, :, None] - shift[:, 1]) * view
    x, y = x.expand(n, s, s), y.expand(n, s, s)
    radius = value["diameter"] / 2

    far, angle = torch.sqrt(x * x + y * y), torch.atan2(y, x)
    wave = torch.zeros_like(x)
    for k in range(2, 7):
        phase = draw.uniform(0, 2 * math.pi, 1, 1)
        wave += draw.normal(1, 1) * torch.cos(k * angle + phase) / k**0.5
    outline = radius * (1 + value["ruggedness"] * wave)
    edge = pixel * draw.uniform(0.8, 2.0, 1, 1)
    cell = torch.sigmoid((outline - far) / edge * 2)
    nucleus, lobes = nucleus_mask(draw, form, values, x, y, radius, edge)
    nucleus = nucleus * cell

    dyes = torch.zeros(n, DYES, s, s)
    _red_cells(dyes, draw, x, y, radius, pixel, view)
    _other_platelets(dyes, draw, x, y, radius, pixel)
    dyes *= (1 - 0.95 * cell)[:, None]
    _cytoplasm(dyes, draw, value, cell, nucleus)
    _chromatin(dyes, draw, value, nucleus, pixel)
    _granules(dyes, draw, value, cell, nucleus, pixel)
    pictures = photograph(dyes, draw, size)

    kinds = torch.tensor([*(s.kind for s in STAGES), -1])
    area = (cell.mean((1, 2)), lobes / 5)
    extras = torch.stack(((view[:, 0, 0] - _VIEW[0]) / (_VIEW[1] - _VIEW[0]), *area), 1)
    scaled = (values - _SCALE_LOW) / _SCALE_SPAN
    return Cells(
        pictures=(pictures * 255).round().to(torch.uint8),
        kind=kinds[stage],
        stage=stage,
        form=form,
        attributes=torch.cat((scaled, extras), 1),
    )


def _red_cells(
    dyes: Tensor, draw: Draw, x: Tensor, y: Tensor, radius: Tensor, pixel: Tensor, view: Tensor
) -> None:
    """Lay red cells around the cell: discs of about 7.5 µm, paler in the middle."""
    crowd = draw.uniform(0, 1, 1, 1)
    strength = draw.uniform(0.2, 0.55, 1, 1)
    pallor = draw.uniform(0.0, 0.7, 1, 1)
    usual = draw.uniform(3.2, 4.3, 1, 1)
    start = draw.uniform(0, 2 * math.pi, 1, 1)
    slots = 7
    total = torch.zeros_like(x)
    for k in range(slots):
        there = (draw.uniform(0, 1, 1, 1) < crowd).float()
        r = usual * torch.exp(0.08 * draw.normal(1, 1))
        away = radius + r * draw.uniform(0.9, 1.15, 1, 1) + 4 * draw.uniform(0, 1, 1, 1) ** 2
        turn = start + 2 * math.pi * (k + draw.uniform(-0.35, 0.35, 1, 1)) / slots
        dx, dy = x - away * torch.cos(turn), y - away * torch.sin(turn)
        squash = torch.exp(0.1 * draw.normal(1, 1))
        d = torch.sqrt((dx * squash) ** 2 + (dy / squash) ** 2)
        disc = torch.sigmoid((r - d) / pixel * 2)
        middle = torch.exp(-((d / (0.5 * r)) ** 2))
        total += there * disc * (1 - pallor * middle) * torch.exp(0.1 * draw.normal(1, 1))
    total = strength * torch.minimum(total, 1 + 0.5 * (total - 1).clamp(min=0))
    dyes[:, HAEMOGLOBIN] += total
    dyes[:, BLUE] += total * draw.uniform(0, 0.25, 1, 1) * draw.chance(0.4, 1, 1)
    dyes[:, EOSIN] += total * draw.uniform(0, 0.4, 1, 1)
    # Plasma takes a little stain too.
    dyes[:, EOSIN] += draw.uniform(0, 0.08, 1, 1) + 0.01 * draw.field(4, x.shape[-1])
    dyes[:, BLUE] += draw.uniform(0, 0.05, 1, 1)


def _other_platelets(
    dyes: Tensor, draw: Draw, x: Tensor, y: Tensor, radius: Tensor, pixel: Tensor
) -> None:
    """Now and then a platelet or a speck of stain lies beside the cell."""
    there = draw.chance(0.2, 1, 1)
    turn, r = draw.uniform(0, 2 * math.pi, 1, 1), draw.uniform(0.7, 1.8, 1, 1)
    away = radius + r + draw.uniform(0, 4, 1, 1)
    d = torch.sqrt((x - away * torch.cos(turn)) ** 2 + (y - away * torch.sin(turn)) ** 2)
    disc = there * torch.sigmoid((r - d) / pixel * 2)
    dyes[:, PURPLE] += disc * draw.uniform(0.1, 0.5, 1, 1)
    dyes[:, BLUE] += disc * draw.uniform(0.0, 0.2, 1, 1)


def _cytoplasm(
    dyes: Tensor, draw: Draw, value: dict[str, Tensor], cell: Tensor, nucleus: Tensor
) -> None:
    s = cell.shape[-1]
    uneven = 1 + value["mottling"] * (0.35 * draw.field(s // 4, s) + 0.35 * draw.field(s // 9, s))
    halo_zone = blur(nucleus[:, None], torch.full((draw.n,), 2.5 * s / 56))[:, 0] * (1 - nucleus)
    holes = torch.rand(cell.shape, generator=draw.generator)
    rate = value["vacuoles"] * 0.15
    bubbles = (holes < rate).float()[:, None]
    bubbles = (blur(bubbles, draw.uniform(0.8, 1.5) * s / 56)[:, 0] * 12).clamp(max=0.8)
    amount = cell * uneven.clamp(0.2, 2) * (1 - 0.7 * nucleus) * (1 - bubbles)
    amount = amount * (1 - value["halo"] * 1.6 * halo_zone).clamp(0.1, 1)
    # The rim of a cell may be darker or paler than the rest.
    rim = cell * (1 - cell) * 4
    amount = amount * (1 + rim * draw.normal(1, 1) * 0.3).clamp(0.2, 2)
    dyes[:, EOSIN] += amount * value["cytoplasm_eosin"]
    dyes[:, BLUE] += amount * value["cytoplasm_blue"]
    dyes[:, HAEMOGLOBIN] += amount * value["cytoplasm_haemoglobin"]


def _chromatin(
    dyes: Tensor, draw: Draw, value: dict[str, Tensor], nucleus: Tensor, pixel: Tensor
) -> None:
    s = nucleus.shape[-1]
    coarse = value["coarseness"]
    texture = (1 - coarse) * draw.field(s // 2, s) + coarse * draw.field(s // 5, s)
    texture = texture + 0.3 * draw.field(s // 10, s)
    spots = torch.rand(nucleus.shape, generator=draw.generator)
    spots = (spots < 0.012 * pixel**2).float()[:, None]
    pale = (blur(spots, draw.uniform(1.2, 2.2) * s / 56)[:, 0] * 18).clamp(max=1)
    amount = nucleus * (1 + value["clumping"] * texture).clamp(0.3, 2.2)
    amount = amount * (1 - value["nucleoli"] * pale)
    dyes[:, PURPLE] += amount * value["nucleus_purple"]
    dyes[:, BLUE] += amount * value["nucleus_blue"] + nucleus * value["nucleoli"] * pale * 0.2
    dyes[:, EOSIN] += amount * draw.uniform(0, 0.15, 1, 1)


def _granules(
    dyes: Tensor,
    draw: Draw,
    value: dict[str, Tensor],
    cell: Tensor,
    nucleus: Tensor,
    pixel: Tensor,
) -> None:
    """Sprinkle granules: seeds at random pixels, spread to the granules' size."""
    seeds = torch.rand(cell.shape, generator=draw.generator)
    rate = (value["granule_density"] * pixel**2).clamp(max=0.5)
    patchy = (1 + 0.5 * draw.field(max(cell.shape[-1] // 8, 2), cell.shape[-1])).clamp(0, 2.5)
    seeds = (seeds < rate * patchy).float()[:, None]
    sigma = (value["granule_radius"] / pixel / 1.5)[:, 0, 0].clamp(min=0.3)
    spread = blur(seeds, sigma)[:, 0] * (2 * math.pi * sigma**2).clamp(min=1)[:, None, None]
    dots = (1.2 * spread).clamp(max=1.3) * cell * (1 - nucleus * (1 - value["granule_cover"]))
    # Seen from above, an orange granule on the nucleus hides some of its purple.
    dyes[:, PURPLE] *= 1 - 0.5 * (dots * value["granule_orange"]).clamp(max=1)
    dyes[:, PURPLE] += dots * value["granule_purple"]
    dyes[:, HAEMOGLOBIN] += dots * value["granule_orange"]

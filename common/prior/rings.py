"""Pooling by distance from the middle of a picture: it does not change when a picture is turned."""

from __future__ import annotations

import torch
from torch import Tensor

from common.privacy.views import dihedral


def ring_weights(size: int, edges: tuple[float, ...]) -> Tensor:
    """Return weights (len(edges) + 1, size * size), each row summing to 1.

    ``edges`` are radii in half picture widths, growing. A pixel belongs to the ring its centre
    lies in, with a soft border one pixel wide.
    """
    axis = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1
    far = torch.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)
    soft = 2 / size
    below = [((edge - far) / soft + 0.5).clamp(0, 1) for edge in edges]
    inner = [torch.zeros_like(far), *below]
    outer = [*below, torch.ones_like(far)]
    rings = torch.stack([o - i for i, o in zip(inner, outer, strict=True)])
    rings = rings.reshape(len(rings), -1)
    return rings / rings.sum(1, keepdim=True).clamp(min=1e-6)


def dihedral_views(pictures: Tensor) -> list[Tensor]:
    """The eight turned and mirrored views of (n, c, s, s), contiguous, themselves first."""
    return list(dihedral(pictures))

"""The public prior: pictures in, a short vector of norm 1 out, nothing left to train.

Ring-pooled activations of small networks, averaged over the eight turned and mirrored views,
beside handcrafted statistics, of the picture at several magnifications; standardised, then whitened
by principal components. Networks, standardisation and components all come from drawn pictures
(:mod:`common.prior.drawing`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ModelError
from common.prior.handcrafted import statistics
from common.prior.network import RingNet
from common.prior.rings import dihedral_views
from common.prior.whitening import unit

_FAR = 5.0  # standard deviations; further is a fault of the picture, not news


@dataclass(frozen=True)
class PriorSpec:
    """What a prior is built from; equal specs have equal names and shapes of tensors.

    ``widths`` of its networks, ``dimension`` of the vectors, ``size`` of the pictures in pixels;
    ``zooms``: the magnifications at which a picture is looked at, each about its middle.
    """

    widths: tuple[int, ...] = (16, 24)
    dimension: int = 300
    size: int = 28
    zooms: tuple[float, ...] = (1.0, 1.18, 1.4)

    def __post_init__(self) -> None:
        if self.dimension < 1 or self.size < 12 or self.size % 2 or any(w % 8 for w in self.widths):
            raise ModelError(
                f"No prior can be built from {self}.",
                "Use an even size of 12 or more, a positive dimension, and widths that 8 divides.",
            )
        if not self.zooms or not all(0.5 <= zoom <= 2 for zoom in self.zooms):
            raise ModelError(
                f"No prior can look at pictures at zooms {self.zooms}.",
                "Use one zoom or more, each from 0.5 to 2.",
            )


def magnified(pictures: Tensor, zoom: float) -> Tensor:
    """(n, c, s, s) in [-1, 1], magnified about the middle by ``zoom``; bicubic, still in [-1, 1].

    Below 1, what lies outside is the picture's reflection.
    """
    if zoom == 1:
        return pictures
    onto = torch.eye(2, 3, device=pictures.device).div(zoom).expand(len(pictures), 2, 3)
    grid = functional.affine_grid(onto, list(pictures.shape), align_corners=False)
    return functional.grid_sample(
        pictures, grid, mode="bicubic", padding_mode="reflection", align_corners=False
    ).clamp(-1, 1)


_raw_counts: dict[PriorSpec, int] = {}
"""How many raw features a prior has."""


class PriorFeatures(nn.Module):
    """(n, 3, size, size) float32 in [-1, 1] -> (n, dimension) float32 of norm 1.

    Less one millionth, so that rounding never carries a norm over 1. Deterministic, without
    gradient; a picture and its turned or mirrored views give the same vector, up to rounding.
    Raises :class:`ModelError` for pictures of another shape.
    """

    centre: Tensor
    spread: Tensor
    middle: Tensor
    projection: Tensor

    def __init__(self, spec: PriorSpec) -> None:
        super().__init__()
        self.spec = spec
        self.networks = nn.ModuleList(RingNet(width, spec.size) for width in spec.widths)
        self.networks.requires_grad_(False)
        if spec not in _raw_counts:  # a forward pass, and a hospital builds many
            with torch.inference_mode():
                _raw_counts[spec] = self.raw(torch.zeros(1, 3, spec.size, spec.size)).shape[1]
        raw = _raw_counts[spec]
        if spec.dimension > raw:
            raise ModelError(
                f"{spec.dimension} features of {raw} raw ones.",
                f"Ask for a dimension of {raw} or less.",
            )
        self.register_buffer("centre", torch.zeros(raw))
        self.register_buffer("spread", torch.ones(raw))
        self.register_buffer("middle", torch.zeros(raw))
        self.register_buffer("projection", torch.eye(raw, spec.dimension))
        self.eval()

    @torch.no_grad()
    def raw(self, pictures: Tensor) -> Tensor:
        """(n, 3, size, size) in [-1, 1] -> (n, raw features) before any standardising."""
        shape = (3, self.spec.size, self.spec.size)
        if pictures.ndim != 4 or tuple(pictures.shape[1:]) != shape:
            raise ModelError(
                f"The prior reads pictures of shape {shape}, not {tuple(pictures.shape[1:])}.",
                "Resize the pictures, or make a prior for that size.",
            )
        parts = []
        for zoom in self.spec.zooms:
            seen = magnified(pictures.float(), zoom)
            # One view at a time and contiguous: the same arithmetic whatever the batch size.
            views = dihedral_views(seen)
            for network in self.networks:
                parts.append(torch.stack([network(view) for view in views]).mean(0))
            parts.append(statistics(seen))
        return torch.cat(parts, 1)

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """See the class."""
        if not len(pictures):  # Fourier transforms of nothing fail
            return torch.zeros(0, self.spec.dimension)
        return self.finish(self.raw(pictures))

    @torch.no_grad()
    def finish(self, raw: Tensor) -> Tensor:
        """Standardise, whiten and scale raw features (n, raw) to norm 1."""
        standard = self.standard(raw)
        return unit((standard - self.middle) @ self.projection)

    def standard(self, raw: Tensor) -> Tensor:
        """(raw - centre) / spread, held within five standard deviations."""
        return ((raw - self.centre) / self.spread).clamp(-_FAR, _FAR)

    @torch.no_grad()
    def fit(self, raw: Tensor, *, ridge: float) -> None:
        """Set standardisation and whitening from raw features (m, raw) of drawn pictures.

        ``ridge``, as a fraction of the kept components' mean variance, is added to each variance.
        """
        self.centre.copy_(raw.mean(0))
        self.spread.copy_(raw.std(0).clamp(min=1e-4))
        standard = self.standard(raw)
        self.middle.copy_(standard.mean(0))
        centred = (standard - self.middle).double()
        moment = (centred.T @ centred / len(raw)).numpy()
        d = self.spec.dimension
        # All eigenvectors would take several times as long.
        largest = eigh(moment, subset_by_index=[len(moment) - d, len(moment) - 1])
        values, vectors = (torch.from_numpy(part).flip(-1) for part in largest)
        # An eigenvector's sign is the library's whim: make its largest entry positive.
        signed = vectors.abs().argmax(0)
        vectors = vectors * torch.sign(vectors[signed, torch.arange(d)])
        scale = (values.clamp(min=0) + ridge * values.mean()) ** -0.5
        self.projection.copy_((vectors * scale).float())

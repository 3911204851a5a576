"""Views of a picture that leave its class as it is: flips, quarter turns, small shifts.

For augmentation multiplicity (De et al. 2022, *Unlocking High-Accuracy Differentially Private
Image Classification through Scale*, §3.4): K views of each image are drawn, and their gradients
averaged *before* clipping, so that more views cost no more privacy. And for averaging a model's
answers over the eight flips and turns when it is tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import PrivacyError

LARGEST_SHIFT = 2
"""Pixels, in each direction; what comes in at the edge repeats the edge."""

_TURNS = 8
"""Flips and quarter turns of a square: (turn by 0, 90, 180, 270°) × (mirrored or not)."""

SINGLE, DIHEDRAL = TEST_VIEWS = ("single", "dihedral")
"""Of which views an image's class probabilities are the mean when it is tested."""


class Uniform(Protocol):
    """A source of random numbers, such as :class:`common.privacy.randomness.SecureRandom`."""

    def uniform(self, n: int) -> np.ndarray:
        """``n`` float64 uniform on [0, 1)."""


class SeededUniform:
    """The same numbers for the same seed: for training *without* privacy only."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def uniform(self, n: int) -> np.ndarray:
        """``n`` float64 uniform on [0, 1)."""
        return self._generator.random(n)


def draw_views(images: int, views: int, random: Uniform) -> Tensor:
    """``views`` random views for each of ``images`` images: (images, views, 3) int64.

    Each is (flip and turn, shift down, shift right). An image's flips and turns are dealt in
    random order, so eight views hold each of the eight once; shifts are independent.

    Under privacy the randomness must be unknown to whoever sees the noisy sum, though it is not
    private: with views that each image draws by itself, one image less leaves the distribution of
    all others' as it was, and the sum is a mixture of mechanisms of sensitivity C, each with the
    same ε. Were the seed known, one image less would shift the stream, so that all later images'
    views and gradients changed as well: of the sum given the seed, the sensitivity would be many
    times C.
    """
    order = torch.from_numpy(random.uniform(images * _TURNS)).view(images, _TURNS).argsort(1)
    turns = order[:, torch.arange(views) % _TURNS]
    width = 2 * LARGEST_SHIFT + 1
    uniform = torch.from_numpy(random.uniform(images * views * 2)).view(images, views, 2)
    shifts = (uniform * width).to(torch.int64) - LARGEST_SHIFT
    return torch.cat([turns.unsqueeze(2), shifts], 2)


def apply_views(images: Tensor, views: Tensor) -> Tensor:
    """Image i seen as ``views[i]`` tells: (n, C, H, W) and (n, 3) → (n, C, H, W), contiguous.

    Pixels are moved, never blended: a view of an image of one colour is that image. Raises
    PrivacyError for images that are not square, which have no quarter turns.
    """
    n, channels, height, width = images.shape
    check_square(images)
    turn, down, right = views.unsqueeze(2).unbind(1)  # (n, 1) each
    last = height - 1
    at = torch.arange(height * width, device=images.device)
    # Where each pixel of the view comes from: shift back, turn, mirror.
    y = ((at // width).unsqueeze(0) - down).clamp_(0, last)
    x = ((at % width).unsqueeze(0) - right).clamp_(0, last)
    quarters = turn % 4
    from_y = torch.where(quarters == 0, y, torch.where(quarters == 1, x, last - y))
    from_y = torch.where(quarters == 3, last - x, from_y)
    from_x = torch.where(quarters == 0, x, torch.where(quarters == 1, last - y, last - x))
    from_x = torch.where(quarters == 3, y, from_x)
    from_x = torch.where(turn >= 4, last - from_x, from_x)
    source = (from_y * width + from_x).unsqueeze(1).expand(n, channels, height * width)
    return images.reshape(n, channels, height * width).gather(2, source).view_as(images)


def check_square(images: Tensor) -> None:
    """Refuse images (N, C, H, W) that are not square: PrivacyError."""
    if images.dim() != 4 or images.shape[2] != images.shape[3]:
        raise PrivacyError(
            f"images of shape {tuple(images.shape[1:])} have no quarter turns",
            "use square images, or augmentation-multiplicity=0",
        )


def dihedral(images: Tensor) -> Iterator[Tensor]:
    """The eight flips and quarter turns of (N, C, H, W) images, contiguous, themselves first.

    Turned images that are not square are (N, C, W, H).
    """
    for mirrored in (images, images.flip(3)):
        for quarters in range(4):
            yield mirrored.rot90(quarters, (2, 3)).contiguous()

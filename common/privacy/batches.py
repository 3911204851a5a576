"""Poisson batches of privacy units, cut into parts that fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from common.errors import PrivacyError
from common.privacy.guard import check_units
from common.privacy.randomness import SecureRandom
from common.privacy.views import apply_views, check_square, draw_views


@dataclass(frozen=True)
class Part:
    """The images of a batch that go through the network at once, or ``views`` views of each."""

    images: Tensor
    labels: Tensor
    units: Tensor | None
    """(n,) int64: which unit of this part each image is of, from 0 on; None: each its own."""
    finished: bool = True
    """False: the part holds one unit alone, of which more images follow."""
    last: bool = False
    """Whether the batch ends here."""
    views: int = 1
    """Rows that stand for one image: a unit's gradient is the sum over its rows here / this."""


class PoissonBatches:
    """``steps`` Poisson batches at the public ``sampling_rate``, as :class:`Part`.

    Each privacy unit is in each batch independently of all others, with all its images, so a
    batch may be empty (one part without images). ``units`` (N,) int64 tells which unit each
    image is of; None: each its own. A part holds at most ``most_images``, and whole units: only
    one that alone is larger is spread over several. Units of one image and larger ones
    are in different parts. Not thread-safe.

    With ``views`` K ≥ 1 every image comes as K random views of itself
    (:mod:`common.privacy.views`), drawn anew for each batch; ``most_images`` counts views then,
    and parts always tell their units. With 0 it comes as it is. PrivacyError for K below 0 and
    for images that have no quarter turns.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        sampling_rate: float,
        steps: int,
        expected_batch_size: float,
        random: SecureRandom,
        units: Tensor | None = None,
        most_images: int = 1024,
        views: int = 0,
    ) -> None:
        if views < 0:
            raise PrivacyError(f"{views} views of each image", "use views ≥ 0")
        if views:
            check_square(images)
        self.dataset = TensorDataset(images, labels)
        self.sampling_rate = sampling_rate
        self.steps = steps
        self.expected_batch_size = expected_batch_size
        self.random = random
        self.most_images = most_images
        self.views = views
        self.images_of = None if units is None else _group(check_units(units, len(labels)).cpu())
        groups = self.images_of or []
        self._sizes = torch.tensor([len(group) for group in groups], dtype=torch.int64)
        self._first = torch.tensor([int(group[0]) for group in groups], dtype=torch.int64)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Part]:
        count = len(self.dataset) if self.images_of is None else len(self.images_of)
        for _ in range(self.steps):
            chosen = torch.from_numpy(self.random.bernoulli(count, self.sampling_rate))
            device = self.dataset.tensors[0].device
            yield from self._parts(torch.nonzero(chosen).flatten().to(device))

    def _parts(self, chosen: Tensor) -> Iterator[Part]:
        """One batch: the units ``chosen``, at most ``most_images`` images at a time."""
        waiting: Part | None = None
        images, labels = self.dataset.tensors
        for rows, units, finished in self._divide(
            chosen, max(1, self.most_images // max(1, self.views))
        ):
            for part in self._seen(images[rows], labels[rows], units, finished):
                if waiting is not None:
                    yield waiting
                waiting = part
        assert waiting is not None
        yield replace(waiting, last=True)

    def _seen(
        self, images: Tensor, labels: Tensor, units: Tensor | None, finished: bool
    ) -> Iterator[Part]:
        """The images as they are, or K views of each; in pieces where one image's are too many."""
        n, k = len(labels), self.views
        if k == 0:
            yield Part(images, labels, units, finished)
            return
        device = images.device
        units = torch.arange(n, device=device) if units is None else units
        views = draw_views(n, k, self.random).view(n * k, 3).to(device)
        # Cuts only where one image has more views than a part may hold.
        for start in range(0, max(1, n * k), self.most_images):
            rows = torch.arange(start, min(start + self.most_images, n * k), device=device)
            of = rows // k
            ended = finished and start + len(rows) == n * k
            yield Part(
                apply_views(images[of], views[rows]), labels[of], units[of], ended, views=k
            )  # fmt: skip

    def _divide(self, chosen: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
        """(images, their units within the part, whether the units are complete)."""
        if self.images_of is None:
            for rows in torch.split(chosen, most):
                yield rows, None, True
            return
        if self.views > 1:  # then each unit has several rows
            yield from self._whole_units(chosen, most)
            return
        # A unit's gradient is summed over its images, that of a single image is as it was made:
        # which of them it is must hang on that unit alone. So the two kinds share no part.
        sizes = self._sizes.to(chosen.device)[chosen]
        alone, several = chosen[sizes == 1], chosen[sizes > 1]
        if len(alone) or not len(several):
            rows = self._first.to(chosen.device)[alone]
            for piece in torch.split(rows, most):
                yield piece, torch.arange(len(piece), device=piece.device), True
        if len(several):
            yield from self._whole_units(several, most)

    def _whole_units(
        self, chosen: Tensor, most: int
    ) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
        assert self.images_of is not None
        together: list[Tensor] = []
        size = 0
        device = chosen.device
        for unit in chosen.tolist():
            rows = self.images_of[unit].to(device)
            if together and size + len(rows) > most:
                yield torch.cat(together), _numbers(together), True
                together, size = [], 0
            if len(rows) > most:
                *first, rest = torch.split(rows, most)
                for piece in first:
                    yield piece, torch.zeros_like(piece), False
                yield rest, torch.zeros_like(rest), True
            else:
                together.append(rows)
                size += len(rows)
        if together or len(chosen) == 0:
            together.append(torch.empty(0, dtype=torch.int64, device=device))
            yield torch.cat(together), _numbers(together), True


def _group(units: Tensor) -> list[Tensor]:
    """The images of each unit; units in the order of their first image."""
    _, first, number = np.unique(units.numpy(), return_index=True, return_inverse=True)
    order = np.argsort(number, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(number))[:-1])
    return [torch.from_numpy(groups[unit]) for unit in np.argsort(first)]


def _numbers(groups: list[Tensor]) -> Tensor:
    lengths = torch.tensor([len(rows) for rows in groups])
    return torch.repeat_interleave(torch.arange(len(groups)), lengths).to(groups[0].device)

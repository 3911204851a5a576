"""Whether a training's steps can be recorded, and those of others like it that were."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.model import trainable_names
from common.optimizers import make_optimizer
from common.privacy.batches import PoissonBatches
from common.privacy.bookkeeping.module import BookKeeping, unknown_layer
from common.privacy.engine import filled_up_to, images_at_once, make_private
from common.privacy.guard import Criterion
from common.recorded.graph import Kept
from common.recorded.plain import Batch, RecordedStep
from common.recorded.private import RecordedPrivateSteps

if TYPE_CHECKING:
    from common.training import TrainSettings

_PLAIN: Kept[RecordedStep] = Kept()
_PRIVATE: Kept[RecordedPrivateSteps] = Kept()

Alike = tuple[Hashable, Criterion] | None
"""What trainings have in common that may share recorded steps: model's structure, loss."""


@contextmanager
def recorded_step(
    model: nn.Module, settings: TrainSettings, images: Tensor, labels: Tensor, alike: Alike
) -> Iterator[RecordedStep | None]:
    """The recorded step for whole batches, this caller's until the end; None if there is none."""
    n, k = settings.batch_size, settings.views
    if alike is None or not images.is_cuda or len(labels) < n:
        yield None
        return
    views = torch.zeros((n, k, 3), dtype=torch.int64, device=images.device) if k else None
    example = Batch(images[:n], labels[:n], views)

    def make() -> RecordedStep:
        own = copy.deepcopy(model)
        optimizer = make_optimizer(own, settings, recorded=True)
        return RecordedStep(own, optimizer, alike[1], example, half=settings.half)

    key = (alike, trainable_names(model), settings.optimizer, settings.half, k,
           example.images.shape, example.images.dtype)  # fmt: skip
    with _PLAIN.lent(key, make) as found:
        yield found


@contextmanager
def recorded_private(
    model: nn.Module, batches: PoissonBatches, settings: TrainSettings, alike: Alike
) -> Iterator[RecordedPrivateSteps | None]:
    """The recorded steps, this caller's until the end; None where there are none.

    For all hospitals' alike: rate, divisor, noise and learning rate are set for each.
    """
    images, privacy = batches.dataset.tensors[0], settings.privacy
    if (
        alike is None
        or privacy is None
        or not images.is_cuda
        or alike[1] is not F.cross_entropy
        or batches.images_of is not None
        or batches.views
        or unknown_layer(model) is not None
    ):
        yield None
        return
    size = min(filled_up_to(batches), images_at_once(model))

    def make() -> RecordedPrivateSteps:
        own = copy.deepcopy(model)
        books, private, engine = make_private(
            own,
            make_optimizer(own, settings, recorded=True),
            batches,
            noise_multiplier=privacy.noise_multiplier,
            clipping_norm=privacy.clipping_norm,
            clipping=privacy.clipping,
            precision=settings.precision,
        )
        assert isinstance(books, BookKeeping)
        return RecordedPrivateSteps(
            books, private, engine, images[0], size=size, half=settings.half
        )

    key = (alike, trainable_names(model), settings.optimizer, settings.half, privacy.clipping_norm,
           privacy.clipping, size, images.shape[1:], images.dtype)  # fmt: skip
    with _PRIVATE.lent(key, make) as found:
        yield found

"""Steps without privacy: one by one, or recorded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common.model import set_weights
from common.privacy.guard import Criterion
from common.privacy.views import apply_views
from common.recorded.graph import Recorded


class Batch(NamedTuple):
    """Images of a step, and which random views of them stand for them."""

    images: Tensor
    labels: Tensor
    views: Tensor | None
    """(n, K, 3) int64 of :func:`common.privacy.views.draw_views`; None: the images themselves."""

    def seen(self) -> tuple[Tensor, Tensor]:
        """What goes through the network, and its labels: n · K of each."""
        if self.views is None:
            return self.images, self.labels
        k = self.views.shape[1]
        images = self.images.repeat_interleave(k, 0)
        return apply_views(images, self.views.view(-1, 3)), self.labels.repeat_interleave(k)


class PlainStep:
    """A step of ``optimizer`` along the gradient of ``criterion``; called, it returns the loss."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Criterion,
        *,
        half: bool,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._criterion, self._half = criterion, half

    def __call__(self, batch: Batch) -> Tensor:
        """Take the step; the mean loss of ``batch`` before it."""
        self.optimizer.zero_grad()
        images, labels = batch.seen()
        with computed_in(images.device, half=self._half):
            loss = self._criterion(self.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()


class RecordedStep(PlainStep):
    """The same for batches like ``example``, recorded; others are taken as they come.

    ``optimizer`` is one of :func:`common.optimizers.make_optimizer` that can be recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Criterion,
        example: Batch,
        *,
        half: bool,
    ) -> None:
        super().__init__(model, optimizer, criterion, half=half)
        images, labels, views = example
        self._batch = Batch(
            images.clone(), labels.clone(), None if views is None else views.clone()
        )
        self._loss = torch.zeros((), device=images.device)
        self._recorded = Recorded(self._step)

    def _step(self) -> None:
        self._loss.copy_(super().__call__(self._batch))

    def begin(self, start: Mapping[str, np.ndarray]) -> None:
        """From these weights, with an optimizer that remembers nothing."""
        set_weights(self.model, start)
        forget(self.optimizer)

    def wipe(self) -> None:
        """No image of a training stays in what is recorded; weights are anything from then on."""
        for here in self._batch:
            if here is not None:
                here.zero_()
        self._recorded()

    def __call__(self, batch: Batch) -> Tensor:
        """As :class:`PlainStep`; what is returned stands until the next call."""
        if batch.images.shape != self._batch.images.shape:
            return super().__call__(batch)
        for here, given in zip(self._batch, batch, strict=True):
            if here is not None and given is not None:
                here.copy_(given)
        self._recorded()
        return self._loss


def computed_in(device: torch.device, *, half: bool) -> AbstractContextManager[object]:
    """Autocast to bfloat16 where ``half``; no converted weight is kept from step to step."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False)


def forget(optimizer: torch.optim.Optimizer) -> None:
    """What an optimizer remembers becomes 0, where it is."""
    for remembered in optimizer.state.values():
        for value in remembered.values():
            if isinstance(value, Tensor):
                value.zero_()

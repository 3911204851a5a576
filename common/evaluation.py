"""What a model's weights reach on a set of images: loss, accuracy, class probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.devices import CPU, device_of, use_threads
from common.errors import ModelError
from common.fixed_shape import (
    ROWS,
    aligned_layers,
    alike_rows,
    invariant_rows,
    padded,
    random_copy,
    structure_of,
)
from common.model import set_weights
from common.privacy.views import DIHEDRAL, SINGLE, TEST_VIEWS, dihedral


@dataclass(frozen=True)
class EvalResult:
    """Sums over ``examples`` images, and each image's class probabilities (N, K) float32."""

    loss_sum: float
    correct: int
    examples: int
    probabilities: np.ndarray


def evaluate(
    model: nn.Module,
    weights: Mapping[str, np.ndarray],
    images: Tensor,
    labels: Tensor,
    *,
    threads: int = 1,
    batch_size: int = 0,
    views: str = SINGLE,
    precision: str = "float32",
    device: str = CPU,
) -> EvalResult:
    """Loss, accuracy and class probabilities of ``weights`` on ``images``, no gradient taken.

    With ``views`` ``dihedral`` an image's probabilities are the mean over its eight flips and
    quarter turns, so that they do not depend on how it lies; loss and accuracy are of that mean,
    and it takes eight times as long. ``precision`` and ``device`` as of
    :class:`common.training.TrainSettings`; losses and probabilities are float32 in any case.
    All passes have one shape, of ``batch_size`` images (0: :data:`common.fixed_shape.ROWS`), in
    which an image's figures are the same to the bit whatever the others are and however many.
    ModelError for views that are none of :data:`~common.privacy.views.TEST_VIEWS`.
    """
    if views not in TEST_VIEWS:
        raise ModelError(f"there are no '{views}' views", f"use one of: {', '.join(TEST_VIEWS)}")
    where = device_of(device)
    set_weights(model, weights)
    model.to(where).eval()
    use_threads(threads)
    labels = labels.to(where)

    def predicted(x: Tensor) -> Tensor:
        """(n, K): logits, or their like of the mean over the views."""
        with torch.no_grad(), torch.autocast(where.type, torch.bfloat16, enabled=half):
            if views == DIHEDRAL:
                each = (model(view).float() for view in dihedral(x))
                seen = torch.stack([F.log_softmax(logits, dim=1) for logits in each])
                return seen.logsumexp(0)  # of the mean softmax, up to a constant
            logits: Tensor = model(x).float()
            return logits

    half, size = precision == "bfloat16", batch_size or ROWS[where.type]
    size = _invariant(model, images, size, half=half, views=views)
    losses, outputs = [torch.zeros(0, dtype=torch.float64)], []
    with aligned_layers(model):
        for x, y in zip(torch.split(images, size), torch.split(labels, size), strict=True):
            n = len(y)
            logits = predicted(padded(x.to(where), size))
            each = F.cross_entropy(logits, padded(y, size), reduction="none")
            losses.append(each[:n].double().cpu())
            outputs.append(F.softmax(logits, dim=1)[:n].cpu())
    loss = float(torch.cat(losses).sum())
    probabilities = torch.cat(outputs).numpy()
    correct = int((probabilities.argmax(1) == labels.cpu().numpy()).sum())
    return EvalResult(loss, correct, len(labels), probabilities)


def _invariant(model: nn.Module, images: Tensor, size: int, *, half: bool, views: str) -> int:
    """``size``, or fewer images where at it an image's logits would hang on its place."""
    device = next(model.parameters()).device
    fresh = cache(lambda: random_copy(model).to(device).eval())

    def trial(rows: int, seed: int) -> Iterator[Tensor]:
        own, x = fresh(), alike_rows(images.shape[1:], rows, seed).to(device)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        with torch.no_grad(), autocast, aligned_layers(own):
            yield from (own(x.rot90(turns, (2, 3)).contiguous()) for turns in range(turned))
            yield F.softmax(own(x).float(), dim=1)

    # An upright picture and one that lies are of different shapes.
    turned = 2 if views == DIHEDRAL else 0
    sizes = [size, *(s for s in (32, 16, 8) if s < size)]
    key = ("evaluation", structure_of(model), tuple(images.shape[1:]), half, turned)
    return invariant_rows(key, sizes, trial)

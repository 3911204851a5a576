"""What a model's weights reach on a set of images: loss, accuracy, class probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.devices import CPU, device_of, use_threads
from common.errors import ModelError
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
    batch_size: int = 256,
    views: str = SINGLE,
    precision: str = "float32",
    device: str = CPU,
) -> EvalResult:
    """Loss, accuracy and class probabilities of ``weights`` on ``images``, no gradient taken.

    With ``views`` ``dihedral`` an image's probabilities are the mean over its eight flips and
    quarter turns, so that they do not depend on how it lies; loss and accuracy are of that mean,
    and it takes eight times as long. ``precision`` and ``device`` as of
    :class:`common.training.TrainSettings`; losses and probabilities are float32 in any case.
    ModelError for views that are none of :data:`~common.privacy.views.TEST_VIEWS`.
    """
    if views not in TEST_VIEWS:
        raise ModelError(f"there are no '{views}' views", f"use one of: {', '.join(TEST_VIEWS)}")
    where = device_of(device)
    set_weights(model, weights)
    model.to(where).eval()
    use_threads(threads)
    loss, outputs = torch.zeros((), dtype=torch.float64, device=where), []
    half = torch.autocast(where.type, torch.bfloat16, enabled=precision == "bfloat16")
    with torch.no_grad(), half:
        for x, y in zip(
            torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
        ):
            x, y = x.to(where), y.to(where)
            if views == DIHEDRAL:
                each = (model(view).float() for view in dihedral(x))
                seen = torch.stack([F.log_softmax(logits, dim=1) for logits in each])
                logits = seen.logsumexp(0)  # of the mean softmax, up to a constant
            else:
                logits = model(x).float()
            loss += F.cross_entropy(logits, y, reduction="sum")
            outputs.append(F.softmax(logits, dim=1))
    probabilities = torch.cat(outputs).cpu().numpy()
    correct = int((probabilities.argmax(1) == labels.numpy()).sum())
    return EvalResult(float(loss), correct, len(labels), probabilities)

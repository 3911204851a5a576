"""A prior's classifier fitted to public pictures, as a base: mean, whitening and head.

What a run under privacy then spends nothing on. The pictures must be public: nothing here is noisy.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import ModelError
from common.model import Weights, set_weights
from common.prior.kept import features_of
from common.prior.model import PriorHead, with_mean, with_whitening
from common.privacy.plan import MEAN, SECOND_MOMENT
from common.privacy.statistics import statistic_sum

DECAYS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Weight decays of the head to choose from."""
FOLDS = 5
_RIDGE = 0.3
"""Of a second moment without noise, but of few pictures: in multiples of the mean eigenvalue."""


def fit_prior(
    model: PriorHead, weights: Mapping[str, np.ndarray], pictures: Tensor, labels: Tensor
) -> tuple[Weights, float]:
    """(``weights`` with mean, whitening and head fitted, the weight decay that was chosen).

    ``pictures`` (N, 3, H, W) float32 in [-1, 1], ``labels`` (N,) int64, all public. The decay is
    the one of :data:`DECAYS` with the most right answers on pictures that the head was not fitted
    to (:data:`FOLDS` parts, in turn). Deterministic. ModelError for too few pictures.
    """
    if len(labels) < 2 * FOLDS:
        raise ModelError(f"{len(labels)} public pictures are too few", f"give {2 * FOLDS} or more")
    set_weights(model, weights)
    features = features_of(model, pictures)
    total = statistic_sum(MEAN, features).numpy()
    fitted = with_mean(weights, total, len(labels))
    set_weights(model, fitted)
    moment = statistic_sum(SECOND_MOMENT, model.map.centred(features)).numpy()
    fitted = with_whitening(fitted, moment, len(labels), ridge=_RIDGE)
    set_weights(model, fitted)
    inputs = model.map(features)
    classes = len(fitted["head.weight"])
    right = {decay: _right(inputs, labels, classes, decay) for decay in DECAYS}
    decay = max(DECAYS, key=lambda d: right[d])
    head = fit_head(inputs, labels, classes, decay)
    return {**fitted, "head.weight": head.numpy()}, decay


def fit_head(inputs: Tensor, labels: Tensor, classes: int, decay: float) -> Tensor:
    """(classes, k) float32: argmin of the mean cross-entropy + ``decay``/2 · ‖W‖², by L-BFGS."""
    x = inputs.double()
    w = torch.zeros(classes, x.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ w.T, labels) + decay / 2 * w.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return w.detach().float()


def _right(inputs: Tensor, labels: Tensor, classes: int, decay: float) -> int:
    """Right answers on the parts that were left out, each in turn."""
    # By place in the file: public pictures come in no order that tells of the class.
    fold = torch.arange(len(labels)) % FOLDS
    right = 0
    for out in range(FOLDS):
        kept, left = fold != out, fold == out
        w = fit_head(inputs[kept], labels[kept], classes, decay)
        right += int(((inputs[left] @ w.T).argmax(1) == labels[left]).sum())
    return right

"""The classifier on a public prior: frozen features, whitened in the end, and a small head.

Only the head is trained: 8 × 301 parameters under the noise, where a network has hundreds of
thousands; without noise a hidden layer before it is worth having. Mean and whitening are public
figures by the time that they are in the model: releases with noise, or nothing (zero and the
identity).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ModelError
from common.prior.features import PriorFeatures, PriorSpec
from common.prior.whitening import Whitening, whitening

BIAS = 0.1
"""What is appended to a picture's features of norm 1, before the whole is brought to norm 1."""
RIDGE, LOCAL_RIDGE = 1.0, 4.0
"""Of a second moment with shared noise, and with local noise, of which there is more: added to the
eigenvalues, in multiples of a unit vector's mean one. Chosen on validation images."""
HIDDEN_NORM = 10.0
"""Of what a hidden layer sees; 20 did as well on images held out of training."""


class Head(nn.Module):
    """(N, d + 1) of norm 1 → logits: what is trained, under the names of the whole classifier."""

    def __init__(self, hidden: nn.Linear | None, head: nn.Linear) -> None:
        super().__init__()
        self.hidden = hidden
        self.head = head

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        if self.hidden is not None:
            inputs = functional.relu(self.hidden(HIDDEN_NORM * inputs))
        logits: Tensor = self.head(inputs)
        return logits


class PriorHead(nn.Module):
    """(N, 3, 28, 28) float32 in [-1, 1] → (N, num_classes) logits.

    Linear on what the map gives, or with ``hidden_units`` rectified ones in between.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(
        self,
        *,
        num_classes: int,
        channels: int,
        hidden_units: int = 0,
        spec: PriorSpec | None = None,
    ) -> None:
        super().__init__()
        if channels != 3:
            raise ModelError("the prior reads colour pictures only", "use model=dpresnet")
        self.features = PriorFeatures(spec or PriorSpec())
        d = self.features.spec.dimension
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("matrix", torch.eye(d))
        self.hidden = nn.Linear(d + 1, hidden_units) if hidden_units else None
        self.head = nn.Linear(hidden_units or d + 1, num_classes, bias=False)
        nn.init.zeros_(self.head.weight)

    @property
    def trained(self) -> Head:
        """What is trained, as a network of its own with the same tensors."""
        return Head(self.hidden, self.head)

    @property
    def map(self) -> Whitening:
        """From the prior's features to what the head sees."""
        return Whitening(self.mean, self.matrix, BIAS)

    def forward(self, pictures: Tensor) -> Tensor:
        """See the class."""
        logits: Tensor = self.trained(self.map(self.features(pictures)))
        return logits


def on_prior(weights: Mapping[str, np.ndarray], prior: PriorFeatures) -> dict[str, np.ndarray]:
    """A fresh classifier's ``weights`` on the features of ``prior``; ModelError if unlike."""
    tensors = {f"features.{name}": t.numpy() for name, t in prior.state_dict().items()}
    if prior.spec != PriorSpec() or not tensors.keys() <= weights.keys():
        raise ModelError(
            f"the prior ({prior.spec}) is not of this version's kind ({PriorSpec()})",
            "make one with `consilium prior`",
        )
    return {**weights, **tensors}


def with_mean(
    weights: Mapping[str, np.ndarray], total: np.ndarray, count: float
) -> dict[str, np.ndarray]:
    """The model's ``weights`` after the release of its features' sum ``total`` (d,)."""
    return {**weights, "mean": (total / count).astype(np.float32)}


def with_whitening(
    weights: Mapping[str, np.ndarray], total: np.ndarray, count: float, *, ridge: float = RIDGE
) -> dict[str, np.ndarray]:
    """``weights`` after the release of the centred features' packed second moment ``total``."""
    mean = torch.from_numpy(np.array(weights["mean"], dtype=np.float32))
    found = whitening(mean, torch.from_numpy(total), count, ridge=ridge, bias=BIAS)
    return {**weights, "matrix": found.matrix.numpy()}


def update_of_head(
    weights: Mapping[str, np.ndarray], update: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The update of a whole classifier of these ``weights``, from its head's own: 0 elsewhere."""
    whole = {name: np.zeros_like(array) for name, array in weights.items()}
    return {**whole, **update}

"""The optimizers of local training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from common.training import TrainSettings


def make_optimizer(
    model: nn.Module, settings: TrainSettings, *, recorded: bool = False
) -> torch.optim.Optimizer:
    """The optimizer of ``settings``; one that can be ``recorded`` has its rate on the GPU."""
    # Fused: one pass over the parameters; Opacus hands its optimizers gradients one by one.
    how: dict[str, Any] = {"lr": settings.learning_rate, "fused": settings.privacy is None}
    device = next(model.parameters()).device
    if recorded:
        how = {"lr": torch.tensor(settings.learning_rate, device=device), "fused": True}
    if settings.optimizer == "adam":
        how["capturable"] = recorded and device.type == "cuda"
        return torch.optim.Adam(model.parameters(), **how)
    return torch.optim.SGD(model.parameters(), momentum=0.9, **how)

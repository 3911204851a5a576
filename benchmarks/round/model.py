"""What a round's training has to compute: the bound that its seconds stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.config import RunConfig
from common.model import ModelSpec, build


def multiply_adds(model: nn.Module, picture: Tensor) -> int:
    """Multiplications with additions of one picture's forward pass in convolutions and linears."""
    total = 0

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d):
            total += output[0].numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += layer.weight.numel()

    kinds = (nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            model(picture[None])
    finally:
        for hook in hooks:
            hook.remove()
    return total


def model_figures(values: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a cell's model; on synthetic pictures GFLOP a CPU second of training.

    A training step is three forward passes' work (one forward, two backward); of the synthetic
    pictures 0.75 train, 0.8 of those on the hospitals' training sides; each of them, each pass.
    """
    config = RunConfig.parse(dict(values))
    spec = ModelSpec.of(config, num_classes=8, channels=3)
    model = build(spec)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    if config.model == "prior-head" or config.dataset != "synthetic":
        return found
    side = config.image_size
    work = 6 * multiply_adds(model, torch.zeros(3, side, side))
    pictures = 0.6 * config.synthetic_size * config.local_epochs
    seconds = float(row["train_cpu_s"])
    return found | {
        "gflop_a_picture": round(work / 1e9, 3),
        "training_gflop_per_s": round(work * pictures / seconds / 1e9, 1),
        "pictures_per_s": round(pictures / seconds, 1),
    }

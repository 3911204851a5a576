"""How many images go through the network together, so that memory does not grow with the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from common.privacy.bookkeeping.convolution import FACTORS, best_way
from common.privacy.bookkeeping.layers import cheaper_as_factors

_NUMBERS = {"cpu": 3 << 23, "cuda": 1 << 30}
"""Activations and gradients of the images that go through together: 96 MiB of float32, and 4 GiB on
a GPU, which is idle where few go through."""


def images_together(model: nn.Module, images: Tensor, *, most: int) -> int:
    """At most ``most`` images, and as many as take 96 MiB (a GPU: 4 GiB); at least one.

    Counted for one of ``images`` (N, ...): the outputs of all of the model's layers, and its
    gradients as :class:`~common.privacy.bookkeeping.module.BookKeeping` keeps them. From 16 on in
    multiples of 16. Nothing but shapes is looked at.
    """
    each = numbers_per_image(model, images)
    count = max(1, min(most, _NUMBERS[images.device.type] // each))
    return count if count < 16 else count // 16 * 16


def numbers_per_image(model: nn.Module, images: Tensor) -> int:
    """Numbers that one image holds in memory between the forward and the backward pass."""
    found = 0

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal found
        found += output.numel() + _gradient_numbers(layer, output)

    handles = [
        layer.register_forward_hook(count)
        for layer in model.modules()
        if next(layer.children(), None) is None
    ]
    try:
        with torch.no_grad():
            model(images.new_zeros((1, *images.shape[1:])))
    finally:
        for handle in handles:
            handle.remove()
    return max(1, found)


def _gradient_numbers(layer: nn.Module, output: Tensor) -> int:
    dense = sum(p.numel() for p in layer.parameters(recurse=False) if p.requires_grad)
    if not dense:
        return 0
    if isinstance(layer, nn.Conv2d):
        positions = output[0, 0].numel()
        factors = best_way(layer, positions) == FACTORS
    elif isinstance(layer, nn.Linear):
        positions = output[0].numel() // layer.out_features
        factors = cheaper_as_factors(layer, positions)
    else:
        return dense
    weight: Tensor = layer.weight
    return positions * (len(weight) + weight[0].numel()) if factors else dense

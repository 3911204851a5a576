"""What would break per-image clipping, found before the first step and refused.

Each check is for a way in which a training run can look private and not be: the gradient of
one image is no longer what is clipped, or it is not what Opacus computes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType

import torch
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from common.errors import PrivacyError

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(logits (N, K), labels (N,)) → scalar."""

_ALLOWED = (
    "a network with group norm (model=dpresnet, resnet9-gn or resnet18) or without any norm "
    "(model=prior-head)"
)
"""Of :data:`common.model.MODELS`, those that can be trained so."""


def check_model(model: nn.Module) -> None:
    """Refuse batch norm, in-place modules, channels_last weights and what Opacus refuses."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(
                f"layer '{name}' is {type(module).__name__}: it mixes the images of a batch, so "
                "that one image changes the gradients of the others",
                f"use {_ALLOWED}, or privacy=none",
            )
        if getattr(module, "inplace", False):
            raise PrivacyError(
                f"layer '{name}' ({type(module).__name__}) works in place: it overwrites the "
                "activations from which per-image gradients are computed",
                "build it with inplace=False",
            )
    for name, parameter in model.named_parameters():
        if not parameter.is_contiguous():
            raise PrivacyError(
                f"parameter '{name}' is not contiguous (channels_last?): Opacus computes wrong "
                "per-image gradients for it, silently",
                "call model.to(memory_format=torch.contiguous_format)",
            )
    errors = ModuleValidator.validate(model, strict=False)
    if errors:
        raise PrivacyError(
            f"Opacus refuses the model: {errors[0]}", f"use {_ALLOWED}, or privacy=none"
        )


def check_images(images: Tensor) -> None:
    """Refuse image tensors (N, C, H, W) in channels_last layout, and values that are not finite."""
    if images.dim() == 4 and not images.is_contiguous():
        raise PrivacyError(
            "the image tensor is not contiguous (channels_last?): Opacus computes wrong "
            "per-image gradients for it, silently",
            "call images.contiguous()",
        )
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        raise PrivacyError("the images hold NaN or infinity", "check the image files and decoding")


def check_units(units: Tensor, images: int) -> Tensor:
    """``units`` itself: (N,) int64, one number for each of ``images`` images; else PrivacyError."""
    if units.dtype != torch.int64 or units.shape != (images,):
        raise PrivacyError(
            f"the privacy units are {units.dtype} of shape {tuple(units.shape)}, for "
            f"{images} images",
            "give one int64 number for each image: the patient's",
        )
    return units


def check_criterion(criterion: Criterion, num_classes: int) -> None:
    """Refuse a loss that is not the mean of losses of one image each.

    Tried on random logits. The gradient of each row must stay the same when the logits and the
    label of another row change: a mean weighted by class fails (its divisor is the sum of the
    batch's weights), as do contrastive losses. And of n rows it must be 1/n of what it is of the
    row alone: the trainer multiplies by n, so that under a sum each image's gradient would
    depend on how many others there are.
    """
    # A function of torch's own stays what it is: tried once. What has a state may change.
    once = isinstance(criterion, FunctionType) and criterion.__module__ == "torch.nn.functional"
    (_tried if once else _try_criterion)(criterion, num_classes)


@lru_cache(maxsize=64)
def _tried(criterion: Criterion, num_classes: int) -> None:
    _try_criterion(criterion, num_classes)


def _try_criterion(criterion: Criterion, num_classes: int) -> None:
    gen = torch.Generator().manual_seed(0)  # a probe's inputs, no secret
    logits = torch.randn(6, num_classes, generator=gen, dtype=torch.float64)
    labels = torch.arange(6) % num_classes

    def gradient(z: Tensor, y: Tensor) -> Tensor:
        z = z.clone().requires_grad_(True)
        return torch.autograd.grad(criterion(z, y), z)[0]

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=1e-9, atol=1e-12)

    before = gradient(logits, labels)[1:]
    for row in range(num_classes):
        changed_logits, changed_labels = logits.clone(), labels.clone()
        changed_logits[0] = 3.0 * torch.randn(num_classes, generator=gen, dtype=torch.float64)
        changed_labels[0] = row
        if not same(before, gradient(changed_logits, changed_labels)[1:]):
            raise PrivacyError(
                "the loss couples images: the gradient of one changes with another",
                "use a mean of per-image losses, without class-weighted averaging",
            )
    alone = torch.cat([gradient(logits[i : i + 1], labels[i : i + 1]) for i in range(6)])
    for n in range(2, 7):
        if not same(n * gradient(logits[:n], labels[:n]), alone[:n]):
            raise PrivacyError(
                "the loss is no mean: an image's gradient changes with the number of images",
                "use the mean of per-image losses (reduction='mean')",
            )


class ContiguityWatch:
    """Raises at the first layer that is fed a channels_last activation, while installed."""

    def __init__(self, model: nn.Module) -> None:
        self._handles = [
            module.register_forward_pre_hook(self._check)
            for module in model.modules()
            if isinstance(module, nn.Conv2d | nn.GroupNorm | nn.Linear)
        ]

    def _check(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not inputs[0].is_contiguous():
            raise PrivacyError(
                f"a {type(module).__name__} layer was fed a tensor that is not contiguous",
                "keep every activation in NCHW (torch.contiguous_format)",
            )

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()

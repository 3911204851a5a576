"""Layers as autograd functions whose backward pass hands out each image's gradient.

To autograd, a layer's parameters get no gradient: the summed one, which DP-SGD throws away, is
never computed. Each image's own goes to a :class:`Book` while the layer's input and output
gradient are at hand. Under autocast, convolutions and linear layers compute in its dtype, as
PyTorch's own do, and so do the gradients that they hand out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.fixed_shape import aligned, linear
from common.networks import StandardisedConv2d, _scale
from common.privacy.bookkeeping import convolution
from common.privacy.bookkeeping.factors import MOST_POSITIONS, Factors, full

Made = Callable[[slice], Tensor | Factors]
"""Images → the gradient of each of them by one parameter."""

_KEPT_AS_FACTORS = 1 << 14
"""From so many weights on, a linear layer's gradients are not multiplied out."""


class Book(Protocol):
    """Where the gradients go."""

    space: convolution.Workspace

    def keep(self, parameter: Tensor, images: int, made: Made) -> None:
        """Keep what ``made`` gives for the rows of a batch of ``images`` images."""


def _as_computed(tensor: Tensor) -> Tensor:
    """In autocast's dtype where it is on, for this device and this tensor."""
    device = tensor.device.type
    if tensor.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d, book: Book
    ) -> Tensor:
        used = weight
        if isinstance(layer, StandardisedConv2d):
            centred = weight.flatten(1) - weight.flatten(1).mean(1, keepdim=True)
            used = (centred * _scale(centred)).view_as(weight)
        ctx.dtype, ctx.layer, ctx.book = x.dtype, layer, book
        x, used = _as_computed(x), _as_computed(used)
        ctx.save_for_backward(x, used)
        return convolution.forward(layer, x, used, None if bias is None else _as_computed(bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, used), layer, book = ctx.saved_tensors, ctx.layer, ctx.book
        g = g.contiguous()
        _, weight, bias, *_ = ctx.needs_input_grad
        if weight:
            made = convolution.gradients
            book.keep(layer.weight, len(x), lambda rows: made(layer, x[rows], g[rows], book.space))
        if bias:
            book.keep(layer.bias, len(x), lambda rows: full(g[rows]).sum((2, 3)))
        back = None
        if ctx.needs_input_grad[0]:
            back = convolution.input_gradient(layer, x, used, g).to(ctx.dtype)
        return back, None, None, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: nn.GroupNorm, book: Book
    ) -> Tensor:
        ctx.dtype = x.dtype
        x = x.contiguous()
        if x.is_cuda:
            x = x.to(weight.dtype)  # as autocast does: a GPU's group norm takes one dtype
        n, channels = x.shape[:2]
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, n, channels, x.shape[2:].numel(), layer.num_groups, layer.eps
        )
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.layer, ctx.book = layer, book
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        (n, channels), positions = x.shape[:2], x.shape[2:].numel()
        wanted = list(ctx.needs_input_grad[:3])
        if n == 0:
            back, scales, shifts = torch.zeros_like(x), weight[:0], weight[:0]
        else:
            # Normalised, n images of c channels are one of n·c: its gradients by the scale and
            # the shift are those of each image, and cost what their sums would.
            back, scales, shifts = torch.ops.aten.native_group_norm_backward(
                g.contiguous().view(1, n * channels, -1), x.view(1, n * channels, -1),
                mean.view(1, -1), rstd.view(1, -1), weight.repeat(n), 1, n * channels,
                positions, n * ctx.layer.num_groups, wanted,
            )  # fmt: skip
        for parameter, rows, asked in (
            (ctx.layer.weight, scales, wanted[1]), (ctx.layer.bias, shifts, wanted[2]),
        ):  # fmt: skip
            if asked:
                made = rows.view(n, channels)
                ctx.book.keep(parameter, n, lambda chosen, made=made: made[chosen])
        return (
            back.view_as(x).to(ctx.dtype) if wanted[0] else None, None, None, None, None,
        )  # fmt: skip


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Linear, book: Book
    ) -> Tensor:
        ctx.dtype, ctx.layer, ctx.book = x.dtype, layer, book
        x, used = _as_computed(x), _as_computed(weight)
        ctx.save_for_backward(x, used)
        return linear(x, used, None if bias is None else _as_computed(bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, used), layer = ctx.saved_tensors, ctx.layer
        n, positions = len(x), x.shape[1:-1].numel()
        left, right = (t.reshape(n, positions, t.shape[-1]) for t in (g, x))

        def weights(rows: slice) -> Tensor | Factors:
            factors = Factors(left[rows], right[rows], tuple(layer.weight.shape))
            return factors if cheaper_as_factors(layer, positions) else factors.dense()

        if layer.weight.requires_grad:
            ctx.book.keep(layer.weight, n, weights)
        if layer.bias is not None and layer.bias.requires_grad:
            ctx.book.keep(layer.bias, n, lambda rows: full(left[rows]).sum(1))
        back = None
        if ctx.needs_input_grad[0]:
            back = (g @ aligned(used))[..., : used.shape[1]].to(ctx.dtype).contiguous()
        return back, None, None, None, None


def cheaper_as_factors(layer: nn.Linear, positions: int) -> bool:
    """Whether to keep the factors of its weight's gradients, by the layer's shape."""
    out, into = layer.weight.shape
    large = out * into >= max(_KEPT_AS_FACTORS, 4 * positions * (out + into))
    return large and positions <= MOST_POSITIONS


_FUNCTIONS: dict[type[nn.Module], type[torch.autograd.Function]] = {
    nn.Conv2d: _Convolution,
    StandardisedConv2d: _Convolution,
    nn.GroupNorm: _GroupNorm,
    nn.Linear: _Linear,
}


def function_of(layer: nn.Module) -> type[torch.autograd.Function] | None:
    """The function that computes ``layer`` with book-keeping; None for a layer it knows not.

    Goes by the exact type, as Opacus does: a subclass may compute something else.
    """
    if isinstance(layer, nn.Conv2d) and (
        isinstance(layer.padding, str) or layer.padding_mode != "zeros"
    ):
        return None
    return _FUNCTIONS.get(type(layer))

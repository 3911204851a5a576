"""The gradient of a convolution's weight for each image, from its input and output gradient.

A batch's gradient by the weight is a sum over its images of one product each: making the summands
costs as many multiplications as making the sum. What counts is how they are fed to the processor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.networks import StandardisedConv2d
from common.privacy.bookkeeping.factors import MOST_POSITIONS, Factors, full


class Workspace:
    """Memory that is used again and again: the system takes time to give it and to blank it."""

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}

    def get(self, name: object, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Of this shape and the dtype of ``like``: what was last left under this ``name``.

        At first it is 0. Whoever relies on what is there must always ask for the same shape, but
        for its first axis.
        """
        held, numbers = self._held.get(name), torch.Size(shape).numel()
        if held is None or held.numel() < numbers or held.dtype != like.dtype:
            held = self._held[name] = like.new_zeros(numbers)
        return held[:numbers].view(shape)


_backward = torch.ops.aten.convolution_backward
_FEW_CHANNELS = 16
"""Up to so many, a convolution runs in channels_last; with more, copying costs what that saves."""
_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 28}
"""Numbers in the patches of the images that go through a matrix product together."""
_ALIGNED = 32
"""Numbers: 128 bytes, of bfloat16 64."""


def forward(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the layer computes of ``x`` with this weight and bias, contiguous."""
    if x.dtype == torch.float32 and layer.in_channels <= _FEW_CHANNELS and not x.is_cuda:
        x = x.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return y.contiguous()


def input_gradient(layer: nn.Conv2d, x: Tensor, weight: Tensor, g: Tensor) -> Tensor:
    """The gradient by the layer's input, from ``g``, the one by its output."""
    found: Tensor = _backward(
        g, x, weight, None, layer.stride, layer.padding, layer.dilation, False, [0, 0],
        layer.groups, [True, False, False],
    )[0]  # fmt: skip
    return found


def by_groups(layer: nn.Conv2d, x: Tensor, g: Tensor, space: Workspace) -> Tensor:
    """(n, *weight.shape): as the weight gradient of one convolution with n groups."""
    n, (out, *kernel) = len(x), layer.weight.shape
    shape_only = space.get("weights", (n * out, *kernel), x)  # its values are not looked at
    found: Tensor = _backward(
        g.reshape(1, -1, *g.shape[2:]), x.reshape(1, -1, *x.shape[2:]), shape_only, None,
        layer.stride, layer.padding, layer.dilation, False, [0, 0], n * layer.groups,
        [False, True, False],
    )[1]  # fmt: skip
    return found.view(n, out, *kernel)


def patches(
    layer: nn.Conv2d, x: Tensor, space: Workspace | None = None, width: int | None = None
) -> Tensor:
    """(n, positions, height · width · channels of the kernel): what each output is made of.

    For an ungrouped layer without dilation. Channels innermost, so that a kernel's row is one
    piece of memory, and copying it is quick; with ``width``, zeros behind up to so many numbers.
    In ``space`` it stands until the next call.
    """
    space = space or Workspace()
    assert not isinstance(layer.padding, str)
    n, c, h, w = x.shape
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    rows, columns = h + 2 * ph, w + 2 * pw
    # Its edge is 0 for good: whoever asks for this name writes the inside only.
    inside = space.get(("padded", c, h, w, ph, pw), (n, rows, columns, c), x)
    inside[:, ph : ph + h, pw : pw + w] = x.permute(0, 2, 3, 1)
    high, wide = (rows - kh) // sh + 1, (columns - kw) // sw + 1
    line = columns * c
    overlapping = inside.as_strided(
        (n, high, wide, kh, kw * c), (rows * line, sh * line, sw * c, line, 1)
    )
    numbers = kh * kw * c
    if width is None or width == numbers:
        found = space.get("patches", (n, high, wide, kh, kw * c), x)
        return found.copy_(overlapping).view(n, high * wide, numbers)
    wider = space.get(("patches", layer, width), (n, high, wide, width), x)  # likewise its end
    wider[..., :numbers].view(n, high, wide, kh, kw * c).copy_(overlapping)
    return wider.view(n, high * wide, width)


def by_patches(layer: nn.Conv2d, x: Tensor, g: Tensor, space: Workspace) -> Tensor:
    """(n, *weight.shape), channels innermost in memory: as n matrix products."""
    n, (out, c, kh, kw) = len(x), layer.weight.shape
    numbers = kh * kw * c
    # Images' products begin at multiples of 64 bytes: else rounding may depend on an image's place.
    width = numbers if out * numbers % _ALIGNED == 0 else numbers + -numbers % _ALIGNED
    found = space.get(layer, (n, out, width), x)
    step = max(1, _AT_ONCE[x.device.type] // (g[0, 0].numel() * width))
    if n > step:  # pieces of one shape: an image's product may hang on it
        step = max(s for s in range(1, step + 1) if n % s == 0)
    for start in range(0, n, step):
        rows = slice(start, start + step)
        torch.bmm(g[rows].flatten(2), patches(layer, x[rows], space, width), out=found[rows])
    return found[..., :numbers].view(n, out, kh, kw, c).permute(0, 1, 4, 2, 3)


def as_factors(layer: nn.Conv2d, x: Tensor, g: Tensor) -> Factors:
    """The same, not multiplied out."""
    return Factors(g.flatten(2).mT.contiguous(), patches(layer, x), tuple(layer.weight.shape))


_SAVED = 8
"""Times the numbers: then factors are quicker than the gradients, with all that follows."""
_MANY = 400
"""Output positions from which on patches take longer than n groups."""

GROUPS, PATCHES, FACTORS = "groups", "patches", "factors"
"""The ways."""


def best_way(layer: nn.Conv2d, positions: int) -> str:
    """Which way suits the shape of ``layer`` with so many output positions.

    By what took the least time for each of DPResNet's layers, at widths 0.25 and 1, in float32 and
    bfloat16, on one core of a processor with AVX-512 and AMX. On a GPU, always as matrix products
    where they can: its convolutions of many groups are slow.
    """
    out, into = layer.out_channels, layer.weight[0].numel()
    if layer.groups > 1 or layer.dilation != (1, 1):
        return GROUPS
    small = positions <= MOST_POSITIONS and _SAVED * positions * (out + into) < out * into
    if small and not isinstance(layer, StandardisedConv2d):
        return FACTORS
    many = positions >= _MANY and layer.in_channels % 16 == 0
    return GROUPS if many and not layer.weight.is_cuda else PATCHES


def gradients(layer: nn.Conv2d, x: Tensor, g: Tensor, space: Workspace) -> Tensor | Factors:
    """The gradient of each image by ``layer.weight``, in the way that is quickest for its shape.

    ``x`` (n, channels, H, W): the layer's input; ``g`` (n, out, H', W'), contiguous: the gradient
    by its output. Either (n, *weight.shape) in any memory layout and the dtype of ``x``, which may
    stand in ``space`` until the next call for this layer, or :class:`Factors` of it.
    """
    if len(x) == 0:
        return layer.weight.new_zeros((0, *layer.weight.shape))
    way = best_way(layer, g[0, 0].numel())
    if way == FACTORS:
        return as_factors(layer, x, g)
    rows = (by_patches if way == PATCHES else by_groups)(layer, x, g, space)
    return layer.pull_back(full(rows)) if isinstance(layer, StandardisedConv2d) else rows

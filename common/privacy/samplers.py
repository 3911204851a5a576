"""Per-image gradients of layers that Opacus does not know. To import this makes them known."""

from __future__ import annotations

import torch
from opacus.grad_sample import register_grad_sampler
from torch import Tensor
from torch.nn import functional as F

from common.networks import StandardisedConv2d


@register_grad_sampler(StandardisedConv2d)  # type: ignore[untyped-decorator]
def standardised_conv_gradients(
    layer: StandardisedConv2d, activations: list[Tensor], backprops: Tensor
) -> dict[Tensor, Tensor]:
    """The layer's weight → (n, *weight.shape), the gradient of each of n images.

    ``activations``: [the layer's input (n, c_in, H, W)]; ``backprops``: the gradient by its
    output (n, c_out, H', W'). First by the filters as they are used, as for any convolution, then
    through the standardisation: it is the same for all images, so each row goes by itself.
    """
    if not layer.weight.requires_grad:
        return {}
    (x,) = activations
    if len(x) == 0:
        return {layer.weight: layer.weight.new_zeros((0, *layer.weight.shape))}
    assert not isinstance(layer.padding, str)
    patches = F.unfold(
        x.to(backprops.dtype), layer.kernel_size, layer.dilation, layer.padding, layer.stride
    )
    by_filter = torch.einsum("nol,npl->nop", backprops.flatten(2), patches)
    return {layer.weight: layer.pull_back(by_filter.view(len(x), *layer.weight.shape))}

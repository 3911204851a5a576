"""Per-image gradients under Opacus are those of each image alone, for every network."""

from __future__ import annotations

import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional as F

from common.model import ModelSpec, build
from common.networks import StandardisedConv2d
from common.privacy.guard import check_model
from common.privacy.samplers import standardised_conv_gradients

PRIVATE_MODELS = ("dpresnet", "resnet9-gn", "resnet18")


def compared(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    """Largest relative error over images of each parameter's gradient, against one by one."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    alone: list[tuple[torch.Tensor, ...]] = []
    for i in range(len(y)):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        alone.append(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))
    wrapped = GradSampleModule(model, loss_reduction="sum")
    F.cross_entropy(wrapped(x), y, reduction="sum").backward()
    found = [p.grad_sample for p in model.parameters() if p.requires_grad]
    wrapped.remove_hooks()
    errors = {}
    for name, samples, *mine in zip(names, found, *alone, strict=True):
        expected = torch.stack(mine)
        assert samples.shape == expected.shape
        gap = (samples - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        errors[name] = float(gap.max())
    return errors


@pytest.mark.parametrize("residual_norm", [False, True])
@pytest.mark.parametrize("weight_standardisation", [False, True])
@pytest.mark.parametrize("model", PRIVATE_MODELS)
def test_every_network_has_the_gradients_of_each_image_alone(
    model: str, residual_norm: bool, weight_standardisation: bool
) -> None:
    assert GradSampleModule.GRAD_SAMPLERS[StandardisedConv2d] is standardised_conv_gradients
    net = build(
        ModelSpec(model=model, width=0.0625, residual_norm=residual_norm,
                  weight_standardisation=weight_standardisation),
        seed=1,
    )  # fmt: skip
    net.train()
    check_model(net)
    x = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    y = torch.tensor([0, 3, 7, 3])
    # In float32 the errors are those of rounding: 1e-6 to 6e-6, ResNet-18 with both options 1.2e-5.
    for dtype, most in ((torch.float32, 3e-5), (torch.float64, 1e-13)):
        errors = compared(net.to(dtype), x.to(dtype), y)
        assert all(error < most for error in errors.values()), errors


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0)])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_standardised_convolutions_have_them_in_float32_also_where_filters_are_tiny(
    kernel: int, stride: int, padding: int, size: float
) -> None:
    torch.manual_seed(0)
    layer = StandardisedConv2d(5, 4, kernel, stride=stride, padding=padding)
    with torch.no_grad():
        layer.weight[::2] *= size  # below 1e-2 in norm the scale is a fixed 100
        layer.weight[0] += 0.3
    net = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(6, 5, 7, 7), torch.arange(6) % 3
    net(x)
    assert all(error < 1e-5 for error in compared(net, x, y).values())


def test_standardised_filters_have_mean_zero_and_norm_one() -> None:
    layer = StandardisedConv2d(3, 6, 3, stride=1, padding=1)
    impulses = torch.eye(27).view(27, 3, 3, 3)
    used = layer(impulses)[:, :, 1, 1]  # (27, 6): each filter's coefficients
    torch.testing.assert_close(used.mean(0), torch.zeros(6), rtol=0, atol=1e-6)
    torch.testing.assert_close(used.norm(dim=0), torch.ones(6))
    with torch.no_grad():
        layer.weight.mul_(7.0).add_(2.0)
    torch.testing.assert_close(layer(impulses)[:, :, 1, 1], used, rtol=1e-4, atol=1e-5)

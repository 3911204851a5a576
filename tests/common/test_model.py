"""DPResNet is the published network, layer by layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import ModelError
from common.model import (
    DPResNet,
    ModelSpec,
    build,
    check_weights,
    get_weights,
    set_weights,
    weights_digest,
)

# (in, out, stride) of each 3×3 convolution, in order; arXiv 2412.00687.
PUBLISHED_CONVOLUTIONS = [
    (3, 64, 1), (64, 128, 1), (128, 128, 1), (128, 128, 1), (128, 256, 2), (256, 256, 1),
    (256, 512, 2), (512, 512, 1),
]  # fmt: skip


def test_full_width_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in DPResNet().parameters()) == 4_802_120


def test_every_layer_is_as_published() -> None:
    modules = list(DPResNet().modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    assert [
        (c.in_channels, c.out_channels, c.stride[0]) for c in convolutions
    ] == PUBLISHED_CONVOLUTIONS
    assert all(
        c.kernel_size == (3, 3) and c.padding == (1, 1) and c.bias is None for c in convolutions
    )
    norms = [m for m in modules if isinstance(m, nn.GroupNorm)]
    assert [(n.num_groups, n.num_channels) for n in norms] == [
        (32, c[1]) for c in PUBLISHED_CONVOLUTIONS
    ]
    assert not any(isinstance(m, nn.MaxPool2d | nn.modules.batchnorm._BatchNorm) for m in modules)
    assert sum(isinstance(m, nn.ReLU) for m in modules) == 5
    heads = [m for m in modules if isinstance(m, nn.Linear)]
    assert [(h.in_features, h.out_features) for h in heads] == [(512, 8)]


def test_only_the_first_block_adds_its_input() -> None:
    net = DPResNet(width=0.25)
    assert (net.block1.skip, net.block2.skip, net.block3.skip) == (True, False, False)
    x = torch.randn(2, 32, 8, 8)
    for layer in net.block1.body:
        if isinstance(layer, nn.GroupNorm):
            nn.init.zeros_(layer.weight)
    assert torch.equal(net.block1(x), x)


@pytest.mark.parametrize("width", [0.03125, 0.125, 0.25, 0.5, 1.5])
@pytest.mark.parametrize("model", ["dpresnet", "resnet9"])
def test_any_width_classes_and_channels_give_logits(model: str, width: float) -> None:
    net = build(ModelSpec(model=model, width=width, num_classes=5, channels=1))
    assert net(torch.randn(3, 1, 28, 28)).shape == (3, 5)


def test_an_image_is_classified_alike_alone_and_in_a_batch() -> None:
    net = build(ModelSpec(width=0.25), seed=1)
    x = torch.randn(4, 3, 28, 28)
    torch.testing.assert_close(net(x)[:1], net(x[:1]), rtol=1e-4, atol=1e-5)


def test_equal_seeds_give_equal_weights_and_leave_the_callers_randomness_alone() -> None:
    before = torch.random.get_rng_state()
    one, two = (get_weights(build(ModelSpec(width=0.125), seed=3)) for _ in range(2))
    assert weights_digest(one) == weights_digest(two)
    assert weights_digest(one) != weights_digest(get_weights(build(ModelSpec(width=0.125), seed=4)))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_that_do_not_fit_are_named() -> None:
    net = build(ModelSpec(width=0.125))
    good = get_weights(net)
    bad_shape = {**good, "head.bias": np.zeros(9, np.float32)}
    with pytest.raises(ModelError, match=r"head\.bias.*\(9,\)"):
        set_weights(net, bad_shape)
    with pytest.raises(ModelError, match=r"lacks entry 'head\.bias'"):
        set_weights(net, {k: v for k, v in good.items() if k != "head.bias"})
    with pytest.raises(ModelError, match="unexpected entry 'extra'"):
        set_weights(net, {**good, "extra": np.zeros(1)})
    shapes = {k: tuple(v.shape) for k, v in good.items()}
    with pytest.raises(ModelError, match="NaN"):
        check_weights(shapes, {**good, "head.bias": np.full(8, np.nan, np.float32)})


def test_a_set_with_one_class_is_refused() -> None:
    with pytest.raises(ModelError, match="1 class"):
        build(ModelSpec(num_classes=1))

"""DPResNet is the published network, layer by layer; the others are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import ModelError, PrivacyError
from common.model import (
    ModelSpec,
    build,
    check_weights,
    freeze,
    get_weights,
    set_weights,
    state_names,
    trainable_names,
    weights_digest,
)
from common.networks import DPResNet, ResNet18, StandardisedConv2d
from common.privacy.guard import check_model

NETWORKS = ("dpresnet", "resnet9", "resnet9-gn", "resnet18")
"""The convolutional networks of :mod:`common.networks`."""

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
@pytest.mark.parametrize("model", NETWORKS)
def test_any_width_classes_and_channels_give_logits(model: str, width: float) -> None:
    net = build(ModelSpec(model=model, width=width, num_classes=5, channels=1))
    assert net(torch.randn(3, 1, 28, 28)).shape == (3, 5)


@pytest.mark.parametrize("model", NETWORKS)
def test_the_options_give_logits_at_any_width_and_nothing_works_in_place(model: str) -> None:
    for width in (0.03125, 0.25):
        spec = ModelSpec(model=model, width=width, num_classes=5, channels=1, residual_norm=True,
                         weight_standardisation=True)  # fmt: skip
        net = build(spec, seed=0)
        assert net(torch.randn(3, 1, 28, 28)).shape == (3, 5)
        assert not any(getattr(m, "inplace", False) for m in net.modules())
        if model == "resnet9":
            with pytest.raises(PrivacyError, match="mixes the images"):
                check_model(net)
        else:
            check_model(net)


def test_resnet18_has_the_usual_number_of_parameters_and_keeps_small_pictures_large() -> None:
    # So has the usual one for 32×32 pictures and 10 classes, with batch norm's two a channel.
    assert sum(p.numel() for p in ResNet18(num_classes=10).parameters()) == 11_173_962
    net = ResNet18(width=0.0625)
    seen: list[int] = []
    for layer in (net.conv1, net.layer1, net.layer2, net.layer3, net.layer4):
        layer.register_forward_hook(lambda _m, _i, output: seen.append(output.shape[2]))
    net(torch.randn(2, 3, 28, 28))
    assert seen == [28, 28, 14, 7, 4]
    assert not any(isinstance(m, nn.MaxPool2d) for m in net.modules())


def test_resnet9_with_group_norm_is_resnet9_but_for_the_norms() -> None:
    batch, group = (build(ModelSpec(model=m, width=0.5)) for m in ("resnet9", "resnet9-gn"))
    assert [(n, p.shape) for n, p in batch.named_parameters()] == [
        (n, p.shape) for n, p in group.named_parameters()
    ]
    norms = [type(m) for m in group.modules() if isinstance(m, nn.GroupNorm | nn.BatchNorm2d)]
    assert norms == [nn.GroupNorm] * 8


@pytest.mark.parametrize("model", NETWORKS)
def test_residual_norms_come_after_each_addition_and_change_no_other_weight(model: str) -> None:
    plain = build(ModelSpec(model=model, width=0.125), seed=3)
    normed = build(ModelSpec(model=model, width=0.125, residual_norm=True), seed=3)
    old, new = get_weights(plain), get_weights(normed)
    assert all(np.array_equal(old[name], new[name]) for name in old)
    added = {name.rsplit(".", 1)[0] for name in set(new) - set(old)}
    assert len(added) == {"dpresnet": 1, "resnet18": 8}.get(model, 2)
    outputs: list[torch.Tensor] = []
    for name in added:
        normed.get_submodule(name).register_forward_hook(
            lambda _m, _i, y: outputs.append(y.detach())
        )
    normed.train()
    normed(5.0 * torch.randn(4, 3, 28, 28))
    assert len(outputs) == len(added)
    for y in outputs:  # normalised: so it was the last thing that was done to the sum
        assert float(y.mean()) == pytest.approx(0.0, abs=1e-4)
        assert float(y.var()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("model", NETWORKS)
def test_weight_standardisation_is_of_every_convolution_and_changes_no_initial_weight(
    model: str,
) -> None:
    plain = build(ModelSpec(model=model, width=0.125), seed=3)
    net = build(ModelSpec(model=model, width=0.125, weight_standardisation=True), seed=3)
    assert weights_digest(get_weights(plain)) == weights_digest(get_weights(net))
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) >= 8
    assert all(type(m) is StandardisedConv2d for m in convolutions)
    # The size and the mean of a filter are nothing to it.
    x = torch.randn(2, 3, 28, 28)
    net.eval()
    before = net(x)
    with torch.no_grad():
        for m in convolutions:
            m.weight.mul_(3.0).add_(0.1)
    torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-3)


def test_digests_of_specifications_without_the_options_are_as_they_always_were() -> None:
    """Published bases and kept runs name them."""
    assert ModelSpec().digest().hex() == (
        "6f9279a1f378742c45de86a2abfbd5aeca173054c8188a1465b979fd08473072"
    )
    assert ModelSpec(model="resnet9", width=0.25, num_classes=5, channels=1).digest().hex() == (
        "2a595dfc97561910e221d095adac8bb9d8cb199e686038dfa45eac5a4651219c"
    )
    digests = {
        ModelSpec(residual_norm=a, weight_standardisation=b).digest()
        for a in (False, True) for b in (False, True)
    }  # fmt: skip
    assert len(digests) == 4


def test_freezing_takes_what_starts_with_a_prefix_and_names_what_is_left() -> None:
    net = build(ModelSpec(width=0.0625))
    everything = trainable_names(net)
    assert everything == tuple(name for name, _ in net.named_parameters())
    freeze(net, ())
    assert trainable_names(net) == everything
    freeze(net, ["stem.", "block1.body.0"])
    left = trainable_names(net)
    assert left == tuple(
        n for n in everything if not n.startswith("stem.") and n != "block1.body.0.weight"
    )
    freeze(net, ["block"])
    assert trainable_names(net) == ("head.weight", "head.bias")


def test_freezing_nothing_that_there_is_or_all_is_refused_and_changes_nothing() -> None:
    net = build(ModelSpec(width=0.0625))
    everything = trainable_names(net)
    with pytest.raises(ModelError, match=r"'body'.*\n.*stem"):
        freeze(net, ["stem", "body"])
    for all_of_it in ([""], ["stem", "block", "head"]):
        with pytest.raises(ModelError, match="every parameter"):
            freeze(net, all_of_it)
    assert trainable_names(net) == everything
    freeze(net, ["stem", "block"])
    with pytest.raises(ModelError, match="every parameter"):
        freeze(net, ["head"])
    assert trainable_names(net) == ("head.weight", "head.bias")


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


@pytest.mark.parametrize("model", NETWORKS)
def test_models_of_one_specification_share_nothing_that_training_changes(model: str) -> None:
    spec = ModelSpec(model=model, width=0.0625)
    one, other = build(spec), build(spec)
    before = get_weights(other)
    calls: list[int] = []
    one.register_forward_hook(lambda *_: calls.append(1))
    one.train()
    other.eval()
    freeze(one, ["head." if model == "dpresnet" else "conv1."])
    loss = one(torch.randn(4, 3, 28, 28)).square().sum()  # moves batch norm's running means
    loss.backward()
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(1.0)
    other(torch.randn(2, 3, 28, 28))
    assert calls == [1] and not other.training
    assert all(p.grad is None and p.requires_grad for p in other.parameters())
    assert all(np.array_equal(before[k], v) for k, v in get_weights(other).items())
    assert all(np.array_equal(before[k], v) for k, v in get_weights(build(spec)).items())
    assert state_names(spec) == tuple(before)
    kinds = [[type(m) for m in net.modules()] for net in (one, other, build(spec, seed=0))]
    assert kinds[0] == kinds[1] == kinds[2]


def test_weights_are_copied_into_the_model_whatever_array_holds_them() -> None:
    spec = ModelSpec(width=0.0625)
    model, weights = build(spec, seed=1), get_weights(build(spec, seed=2))
    first = next(iter(weights))
    given = dict(weights)
    given[first] = np.asfortranarray(weights[first]).astype(np.float64)
    given["head.bias"] = weights["head.bias"].copy()
    given["head.bias"].flags.writeable = False
    set_weights(model, given)
    given[first][:] = 0
    assert all(np.array_equal(weights[k], v) for k, v in get_weights(model).items())


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

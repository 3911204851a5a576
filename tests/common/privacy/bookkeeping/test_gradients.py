"""Book-keeping finds the gradients that Opacus' hooks find, for every layer and network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.errors import PrivacyError
from common.model import ModelSpec, build, freeze
from common.networks import StandardisedConv2d
from common.privacy.bookkeeping import convolution
from common.privacy.bookkeeping.factors import Factors
from common.privacy.bookkeeping.module import BookKeeping, unknown_layer
from common.privacy.clipping import unit_sums
from tests.common.privacy.bookkeeping.compared import by_books, by_opacus, largest_error, trained

LAYERS = {
    "3×3": (lambda: nn.Conv2d(5, 7, 3, padding=1), (5, 9, 9)),
    "3×3, no bias, 16 channels": (lambda: nn.Conv2d(16, 32, 3, padding=1, bias=False), (16, 8, 8)),
    "stride 2": (lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1), (6, 9, 10)),
    "unpadded": (lambda: nn.Conv2d(3, 8, 5), (3, 9, 7)),
    "oblong": (lambda: nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 2)), (4, 7, 6)),
    "1×1": (lambda: nn.Conv2d(8, 4, 1), (8, 5, 5)),
    "groups": (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), (6, 6, 6)),
    "dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2), (4, 9, 9)),
    "many weights": (lambda: nn.Conv2d(64, 96, 3, padding=1), (64, 3, 3)),
    "standardised": (lambda: StandardisedConv2d(5, 6, 3, stride=2, padding=1), (5, 8, 8)),
    "group norm": (lambda: nn.GroupNorm(4, 12), (12, 5, 5)),
    "group norm of vectors": (lambda: nn.GroupNorm(3, 12), (12,)),
    "linear": (lambda: nn.Linear(12, 5), (12,)),
    "linear, no bias": (lambda: nn.Linear(12, 5, bias=False), (12,)),
    "linear, positions": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "linear, many weights": (lambda: nn.Linear(300, 200), (300,)),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_the_gradients_of_opacus_hooks(name: str, first: bool, images: int) -> None:
    """``first``: its input needs no gradient; else that must be right, too, for the layer below."""
    make, shape = LAYERS[name]
    below = nn.Identity() if first else nn.GroupNorm(1, shape[0])
    model = nn.Sequential(below, make())
    for p in model.parameters():
        nn.init.normal_(p)
    x = 0.5 + torch.randn(images, *shape)
    weights = torch.randn_like(model(x))
    expected = by_opacus(model, x, weights)
    assert largest_error(by_books(model, x, weights), expected) < 1e-5


@pytest.mark.parametrize("way", [convolution.GROUPS, convolution.PATCHES, convolution.FACTORS])
@pytest.mark.parametrize("name", ["3×3", "3×3, no bias, 16 channels", "stride 2", "oblong", "1×1"])
def test_every_way_to_a_convolutions_gradients_leads_to_the_same(
    way: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = LAYERS[name]
    model, x = make(), torch.randn(4, *shape)
    weights = torch.randn_like(model(x))
    expected = by_opacus(model, x, weights)
    monkeypatch.setattr(convolution, "best_way", lambda *_: way)
    assert largest_error(by_books(model, x, weights), expected) < 1e-5


def test_the_way_is_chosen_by_shape() -> None:
    def way(channels: int, out: int, size: int) -> str:
        return convolution.best_way(nn.Conv2d(channels, out, 3, padding=1), size * size)

    assert way(512, 512, 7) == convolution.FACTORS  # 2.4 million weights, 49 positions
    assert way(32, 32, 28) == convolution.GROUPS
    assert way(64, 64, 14) == way(3, 16, 28) == convolution.PATCHES


@pytest.mark.parametrize("options", [{}, {"residual_norm": True, "weight_standardisation": True}])
@pytest.mark.parametrize("model", ["dpresnet", "resnet9-gn", "resnet18"])
def test_every_network_has_the_gradients_of_opacus_hooks(
    model: str, options: dict[str, bool]
) -> None:
    net = build(ModelSpec(model=model, width=0.0625, **options), seed=1).train()
    assert unknown_layer(net) is None
    x, weights = torch.randn(4, 3, 28, 28), torch.randn(4, 8)
    for dtype, most in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        net, x, weights = net.to(dtype), x.to(dtype), weights.to(dtype)
        assert largest_error(by_books(net, x, weights), by_opacus(net, x, weights)) < most


def test_dpresnet_at_the_default_width_has_them_however_many_images() -> None:
    net = build(ModelSpec(width=0.25), seed=1).train()
    for images in (1, 3, 16):
        x, weights = torch.randn(images, 3, 28, 28), torch.randn(images, 8)
        assert largest_error(by_books(net, x, weights), by_opacus(net, x, weights)) < 1e-5


def test_a_batch_without_images_has_none() -> None:
    net = build(ModelSpec(width=0.0625), seed=1).train()
    model = nn.Sequential(net, nn.Linear(8, 300), nn.Linear(300, 200))
    found = by_books(model, torch.randn(0, 3, 28, 28), torch.randn(0, 200))
    assert [g.shape for g in found] == [(0, *p.shape) for p in model.parameters()]


@pytest.mark.parametrize("units", [[0, 0, 1, 2, 2, 2], [2, 0, 1, 0, 2, 0], [3, 1, 0, 2, 5, 4]])
def test_gradients_of_a_units_images_are_summed_as_they_are_made(units: list[int]) -> None:
    net = nn.Sequential(build(ModelSpec(width=0.0625), seed=1), nn.Linear(8, 3000)).train()
    x, weights, of = torch.randn(6, 3, 14, 14), torch.randn(6, 3000), torch.tensor(units)
    # In float64, where rounding hides nothing.
    net, x, weights = net.double(), x.double(), weights.double()
    expected = [unit_sums(g, of) for g in by_opacus(net, x, weights)]
    found = by_books(net, x, weights, of)
    assert len(found[0]) == max(units) + 1
    assert largest_error(found, expected) < 1e-12


def test_frozen_parameters_have_none() -> None:
    net = build(ModelSpec(width=0.0625), seed=1).train()
    freeze(net, ("stem", "block1.body.1.weight", "block2.body.4", "head.bias"))
    x, weights = torch.randn(3, 3, 14, 14), torch.randn(3, 8)
    found, expected = by_books(net, x, weights), by_opacus(net, x, weights)
    assert len(found) == len(trained(net)) < len(list(net.parameters()))
    assert largest_error(found, expected) < 1e-5


def test_a_layer_that_is_used_twice_has_the_gradient_of_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(torch.tanh(self.layer(x)))
            return y

    for layer, shape in ((nn.Linear(6, 6), (6,)), (nn.Linear(300, 300), (300,)),
                         (nn.Conv2d(4, 4, 3, padding=1), (4, 6, 6))):  # fmt: skip
        model, x = Twice(layer), torch.randn(3, *shape)
        weights = torch.randn_like(x)
        assert largest_error(by_books(model, x, weights), by_opacus(model, x, weights)) < 1e-5


def test_the_layout_of_the_images_in_memory_changes_nothing() -> None:
    """Unlike under Opacus' hooks, which read wrong pixels; the guard refuses it all the same."""
    net = build(ModelSpec(width=0.0625), seed=1).train()
    x, weights = torch.randn(4, 3, 14, 14), torch.randn(4, 8)
    expected = by_opacus(net, x, weights)
    for other in (
        x.to(memory_format=torch.channels_last),
        x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    ):
        assert not other.is_contiguous()
        assert largest_error(by_books(net, other, weights), expected) < 1e-5


def test_large_gradients_are_kept_as_factors() -> None:
    model = nn.Sequential(nn.Conv2d(64, 96, 3), nn.Flatten(), nn.Linear(96, 300))
    books = BookKeeping(model)
    books(torch.randn(2, 64, 3, 3)).sum().backward()
    kinds = {n: type(p.grad_sample) for n, p in model.named_parameters()}
    assert kinds["0.weight"] is kinds["2.weight"] is Factors
    assert kinds["0.bias"] is kinds["2.bias"] is torch.Tensor


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(1))


def test_what_book_keeping_cannot_do_is_named() -> None:
    class Own(nn.Linear):
        pass

    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    hooked = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))
    hooked[0].register_forward_hook(lambda *_: None)
    for model, says in (
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), r"'1' \(LayerNorm\)"),
        (nn.Sequential(nn.Linear(3, 4), Own(4, 4)), r"'1' \(Own\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding="same")), r"'0' \(Conv2d\)"),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), r"'0' \(Conv2d\)"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "ParametrizedLinear"),
        (_Scale(), r"'the model' \(_Scale\)"),
        (tied, r"'1' \(Linear\), which shares"),
        (hooked, r"'0' \(ReLU\), which has hooks"),
    ):
        with pytest.raises(PrivacyError, match=says):
            BookKeeping(model)
        model.requires_grad_(False)
        assert unknown_layer(model) is None or model is hooked


def test_the_model_is_plain_again_and_computed_the_same_all_the_time() -> None:
    net = build(ModelSpec(width=0.0625), seed=1).train()
    x = torch.randn(3, 3, 28, 28)
    plain = net(x)
    books = BookKeeping(net)
    torch.testing.assert_close(books(x), plain)
    books.eval()
    torch.testing.assert_close(books(x), plain)
    books.train()
    books.disable_hooks()
    books(x).sum().backward()
    assert all(p.grad is not None and p.grad_sample is None for p in net.parameters())
    books.enable_hooks()
    books.remove_hooks()
    assert not any("forward" in vars(layer) for layer in net.modules())
    assert torch.equal(net(x), plain)


def test_a_layer_that_sees_parts_of_an_image_as_images_is_refused() -> None:
    """Each part would be clipped by itself."""
    books = BookKeeping(nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, 2)))
    with pytest.raises(PrivacyError, match="fed 8 rows, where 2 images"):
        books(torch.randn(2, 4, 3)).sum().backward()


def test_gradients_of_two_passes_are_not_mixed() -> None:
    books = BookKeeping(nn.Linear(3, 2))
    books(torch.randn(2, 3)).sum().backward()
    with pytest.raises(PrivacyError, match="two passes"):
        books(torch.randn(2, 3)).sum().backward()
    books.zero_grad()
    books.expect(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(PrivacyError, match="2 images went through the network, of which 3"):
        books(torch.randn(2, 3)).sum().backward()

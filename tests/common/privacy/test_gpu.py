"""Private training on a GPU keeps what it keeps on the CPU. Skipped where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.devices import device_of
from common.evaluation import evaluate
from common.model import ModelSpec, build, get_weights
from common.networks import StandardisedConv2d
from common.privacy.bookkeeping.factors import dense
from common.privacy.bookkeeping.module import BookKeeping
from common.privacy.clipped_sum import clipped_sum
from common.privacy.clipping import AUTOMATIC, FLAT
from common.privacy.gaussian import GaussianSum
from common.privacy.randomness import SecureRandom
from common.training import PrivateStep, TrainSettings, train
from tests.common.privacy.bookkeeping.compared import (
    by_books,
    by_opacus,
    largest_error,
    trained,
)
from tests.common.privacy.bookkeeping.test_bfloat16 import alone
from tests.common.privacy.bookkeeping.test_gradients import LAYERS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
SPEC = ModelSpec(width=0.25)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    device_of("auto")


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_the_gradients_of_opacus_hooks_on_the_cpu(name: str) -> None:
    make, shape = LAYERS[name]
    model = make()
    x = 0.5 + torch.randn(5, *shape)
    weights = torch.randn_like(model(x))
    expected = by_opacus(model, x, weights)
    found = by_books(model.cuda(), x.cuda(), weights.cuda())
    assert largest_error([g.cpu() for g in found], expected) < 1e-5


@pytest.mark.parametrize("name", ["dpresnet", "resnet9-gn", "resnet18"])
def test_every_network_has_them(name: str) -> None:
    model = build(ModelSpec(model=name, width=0.125), seed=1).train()
    x, weights = torch.randn(4, 3, 28, 28), torch.randn(4, 8)
    expected = by_opacus(model.double(), x.double(), weights.double())
    found = by_books(model.float().cuda(), x.cuda(), weights.cuda())
    assert largest_error([g.cpu() for g in found], expected) < 1e-5


def _booked(books: BookKeeping, x: Tensor, y: Tensor) -> None:
    books.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        logits = books(x)
    F.cross_entropy(logits.float(), y, reduction="sum").backward()


@pytest.mark.parametrize("rule", [FLAT, AUTOMATIC])
def test_no_image_adds_more_than_the_clipping_norm_in_bfloat16(rule: str) -> None:
    net = build(ModelSpec(width=0.5), seed=1).train().cuda()
    books = BookKeeping(net)
    for scale in (0.1, 1.0, 10.0):
        _booked(books, scale * torch.randn(6, 3, 28, 28).cuda(), torch.randint(8, (6,)).cuda())
        gradients = [p.grad_sample.cpu() if isinstance(p.grad_sample, Tensor)
                     else type(p.grad_sample)(p.grad_sample.left.cpu(), p.grad_sample.right.cpu(),
                                              p.grad_sample.shape)
                     for p in trained(net)]  # fmt: skip
        for clip in (1e-3, 0.37):
            adds = [alone(gradients, i, clip, rule) for i in range(6)]
            assert all(float(added.norm()) <= clip for added in adds)
            assert all(float(added.norm()) > 0.98 * clip for added in adds if clip == 1e-3)


def test_an_image_s_gradient_is_the_same_to_the_bit_whatever_others_go_with_it() -> None:
    for spec in (SPEC, ModelSpec(width=1.0)):
        net = build(spec, seed=1).train().cuda()
        books = BookKeeping(net)
        books.together = 48
        x, y = torch.randn(48, 3, 28, 28).cuda(), (torch.arange(48) % 8).cuda()

        def gradients(rows: Tensor) -> Tensor:
            _booked(books, x[rows], y[rows])  # noqa: B023
            return torch.cat([dense(p.grad_sample).float().flatten(1) for p in trained(net)], 1)  # noqa: B023

        everyone = gradients(torch.arange(48))
        for rows in (torch.arange(48), torch.arange(47), torch.arange(1, 48), torch.arange(3)):
            assert torch.equal(gradients(rows), everyone[rows.cuda()])


def test_removing_an_image_moves_the_sum_by_at_most_the_clipping_norm() -> None:
    start, clip = get_weights(build(SPEC, seed=0)), 0.05
    x, y = torch.randn(40, 3, 28, 28), torch.arange(40) % 8
    for precision in ("float32", "bfloat16"):

        def released(kept: Tensor) -> Tensor:
            return clipped_sum(
                build(SPEC), start, x[kept], y[kept], sampling_rate=1.0, clipping_norm=clip,
                random=SecureRandom(), precision=precision, device="cuda",  # noqa: B023
            )  # fmt: skip

        whole = released(torch.arange(40))
        for image in (0, 17, 39):
            moved = float((whole - released(torch.arange(40) != image)).norm())
            assert 0.9 * clip < moved <= clip


def test_patients_and_views_are_units_as_they_are_on_the_cpu() -> None:
    spec = ModelSpec(width=0.0625)  # all fit into one part, so that views are dealt alike
    start = get_weights(build(spec, seed=0))
    x, y, units = torch.randn(24, 3, 28, 28), torch.arange(24) % 8, torch.arange(24) // 5
    sums = [
        clipped_sum(
            build(spec), start, x, y, sampling_rate=0.7, clipping_norm=0.5, views=3,
            random=SecureRandom(key_for_tests=bytes(32)), units=units, device=device,
        )
        for device in ("cpu", "cuda")
    ]  # fmt: skip
    assert float((sums[0] - sums[1]).norm()) < 1e-4 * float(sums[0].norm())


def test_the_noise_on_a_gpu_is_that_of_the_mechanism_and_lies_on_its_grid() -> None:
    mechanism = GaussianSum(2.0, 1.0, 5_000_000)
    found = mechanism.release(torch.zeros(5_000_000, device="cuda"), SecureRandom()).double()
    assert float(found.std()) == pytest.approx(mechanism.std, rel=2e-3)
    assert abs(float(found.mean())) < 4 * mechanism.std / 5_000_000**0.5
    grid = found / mechanism.step
    assert torch.equal(grid, grid.round())
    assert float((found / mechanism.std).pow(4).mean()) == pytest.approx(3.0, abs=0.02)


def test_a_model_trained_privately_on_a_gpu_learns_and_is_measured_there() -> None:
    labels = torch.arange(400) % 4
    x = 0.3 * torch.randn(400, 3, 28, 28) + labels.view(-1, 1, 1, 1) / 2 - 0.75
    model = build(ModelSpec(width=0.125, num_classes=4))
    start = get_weights(build(ModelSpec(width=0.125, num_classes=4), seed=0))
    step = PrivateStep(noise_multiplier=0.3, clipping_norm=1.0, sampling_rate=0.25, steps=60,
                       expected_batch_size=100.0)  # fmt: skip
    for precision in ("float32", "bfloat16"):
        how = TrainSettings(epochs=1, batch_size=1, learning_rate=0.01, optimizer="adam",
                            privacy=step, precision=precision, device="cuda")  # fmt: skip
        update = train(model, start, x, labels, how, seed=0, reuse="here").update
        after = {name: start[name] + update[name] for name in start}
        before = evaluate(model, start, x, labels, device="cuda")
        on_gpu, on_cpu = (evaluate(model, after, x, labels, device=d) for d in ("cuda", "cpu"))
        assert on_gpu.loss_sum < 0.8 * before.loss_sum
        assert on_gpu.loss_sum == pytest.approx(on_cpu.loss_sum, rel=1e-3)


def test_without_privacy_the_same_seed_gives_the_same_weights() -> None:
    x, labels = torch.randn(64, 3, 28, 28), torch.arange(64) % 8
    start = get_weights(build(SPEC, seed=0))
    how = TrainSettings(epochs=2, batch_size=16, learning_rate=1e-3, optimizer="adam",
                        precision="bfloat16", device="cuda", views=2)  # fmt: skip
    one, other = (train(build(SPEC), start, x, labels, how, seed=3).update for _ in range(2))
    assert all((one[name] == other[name]).all() for name in one)


def test_standardised_filters_pull_gradients_back_there() -> None:
    model = nn.Sequential(StandardisedConv2d(3, 8, 3, stride=1, padding=1), nn.ReLU(),
                          nn.Flatten(), nn.Linear(8 * 36, 4))  # fmt: skip
    x, weights = torch.randn(5, 3, 6, 6), torch.randn(5, 4)
    expected = by_opacus(model, x, weights)
    found = by_books(model.cuda(), x.cuda(), weights.cuda())
    assert largest_error([g.cpu() for g in found], expected) < 1e-5

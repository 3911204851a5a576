"""Private training keeps books where it can, and memory flat; where it cannot, the log says so."""

from __future__ import annotations

import logging

import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn import functional as F

from common.model import ModelSpec, build, get_weights
from common.privacy import engine as engine_module
from common.privacy.batches import PoissonBatches
from common.privacy.bookkeeping import memory
from common.privacy.bookkeeping.factors import Factors
from common.privacy.bookkeeping.memory import images_together, numbers_per_image
from common.privacy.bookkeeping.module import BookKeeping
from common.privacy.clipped_sum import clipped_sum
from common.privacy.engine import SecureDPOptimizer, make_private
from common.privacy.randomness import SecureRandom
from common.training import PrivateStep, TrainSettings, train

SPEC = ModelSpec(width=0.0625)
IMAGES, LABELS = torch.randn(24, 3, 28, 28), torch.arange(24) % 8


def private(
    model: nn.Module, *, views: int = 0, units: torch.Tensor | None = None
) -> tuple[nn.Module, SecureDPOptimizer, PoissonBatches]:
    batches = PoissonBatches(
        IMAGES, LABELS, sampling_rate=1.0, steps=1, expected_batch_size=24.0,
        random=SecureRandom(), units=units, views=views,
    )  # fmt: skip
    wrapped, optimizer, _ = make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batches,
        noise_multiplier=1.0, clipping_norm=1.0,
    )  # fmt: skip
    return wrapped, optimizer, batches


def test_known_networks_are_booked_and_others_hooked_with_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING, logger="consilium.privacy")
    for model in ("dpresnet", "resnet9-gn", "resnet18"):
        wrapped, optimizer, _ = private(build(ModelSpec(model=model, width=0.0625)))
        assert type(wrapped) is BookKeeping and optimizer.books is wrapped
    assert not caplog.records
    other = nn.Sequential(nn.Flatten(), nn.LayerNorm(3 * 28 * 28), nn.Linear(3 * 28 * 28, 8))
    wrapped, optimizer, _ = private(other)
    assert type(wrapped) is GradSampleModule and optimizer.books is None
    (record,) = caplog.records
    assert "Opacus' hooks" in record.getMessage() and "'1' (LayerNorm)" in record.getMessage()


def test_the_clipped_sum_is_that_of_opacus_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    start = get_weights(build(SPEC, seed=0))
    for clip in (0.05, 1e3):
        sums = []
        for unknown in (None, "all of it"):
            with monkeypatch.context() as patch:
                if unknown:
                    patch.setattr(engine_module, "unknown_layer", lambda _: "all of it")
                sums.append(
                    clipped_sum(build(SPEC), start, IMAGES, LABELS, sampling_rate=1.0,
                                clipping_norm=clip, random=SecureRandom())
                )  # fmt: skip
        assert float((sums[0] - sums[1]).norm()) < 1e-5 * float(sums[1].norm())


def test_a_private_training_through_either_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisson batches, some of them empty, the same noise."""
    start = get_weights(build(SPEC, seed=0))
    step = PrivateStep(
        noise_multiplier=1.0, clipping_norm=0.5, sampling_rate=0.1, steps=6, expected_batch_size=2.4
    )
    how = TrainSettings(epochs=0, batch_size=0, learning_rate=0.01, optimizer="sgd", privacy=step)
    key = bytes(range(32))

    def update() -> torch.Tensor:
        found = train(
            build(SPEC), start, IMAGES, LABELS, how, seed=0,
            random=SecureRandom(key_for_tests=key),
        ).update  # fmt: skip
        return torch.cat([torch.from_numpy(u).flatten() for u in found.values()])

    booked = update()
    monkeypatch.setattr(engine_module, "unknown_layer", lambda _: "all of it")
    hooked = update()
    assert float((booked - hooked).norm()) < 1e-4 * float(hooked.norm())


def test_steps_with_gradients_that_are_kept_as_factors_are_taken_and_accounted_for() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 300), nn.ReLU(), nn.Linear(300, 8))
    before = [p.detach().clone() for p in model.parameters()]
    batches = PoissonBatches(
        IMAGES, LABELS, sampling_rate=0.5, steps=3, expected_batch_size=12.0,
        random=SecureRandom(), most_images=5,
    )  # fmt: skip
    wrapped, optimizer, engine = make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), batches,
        noise_multiplier=1.5, clipping_norm=1.0,
    )  # fmt: skip
    for part in batches:
        optimizer.zero_grad()
        optimizer.expect(part)
        if len(part.labels):
            F.cross_entropy(wrapped(part.images), part.labels, reduction="sum").backward()
            assert isinstance(model[1].weight.grad_sample, Factors)
        optimizer.step()
    assert engine.accountant.history == [(1.5, 0.5, 3)]
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("patients", [False, True])
def test_views_and_pictures_of_a_unit_take_the_memory_of_one(patients: bool) -> None:
    units = torch.arange(24) // 4 if patients else None
    model = build(SPEC)
    wrapped, optimizer, batches = private(model, views=4, units=units)
    batches.most_images = 32
    for part in batches:
        optimizer.zero_grad()
        optimizer.expect(part)
        F.cross_entropy(wrapped(part.images), part.labels, reduction="sum").backward()
        assert part.units is not None
        count = int(part.units.max()) + 1
        assert count <= len(part.labels) / (16 if patients else 4)
        for p in model.parameters():
            assert p.grad_sample.shape == (count, *p.shape)
        optimizer.step()


def test_told_before_or_after_the_backward_pass_units_have_the_same_sum() -> None:
    units = torch.arange(24) % 5
    sums = []
    for before in (True, False):
        model = build(SPEC, seed=0)
        wrapped, optimizer, batches = private(model, units=units)
        (part,) = batches
        if before:
            optimizer.expect(part)
        F.cross_entropy(wrapped(part.images), part.labels, reduction="sum").backward()
        if not before:
            optimizer.expect(part)
        optimizer.clip_and_accumulate()
        sums.append(torch.cat([p.summed_grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-4, atol=1e-6)


def test_parts_are_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    small = images_together(build(ModelSpec(width=0.25)), IMAGES, most=1000)
    large = images_together(build(ModelSpec(width=1.0)), IMAGES, most=1000)
    assert 1 <= large < small < 100 and small % 16 == 0
    assert images_together(build(SPEC), IMAGES, most=5) == 5
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 8))
    assert images_together(head, IMAGES, most=1000) == 1000 // 16 * 16
    monkeypatch.setattr(memory, "_NUMBERS", {"cpu": 1})
    assert images_together(build(SPEC), IMAGES, most=1000) == 1


def test_numbers_of_an_image_are_those_that_are_kept() -> None:
    """Its gradients, multiplied out or not, and each layer's output."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 256, 3, stride=5),
        nn.GroupNorm(4, 256), nn.Conv2d(256, 256, 3), nn.Flatten(), nn.Linear(256 * 4 * 4, 16),
    )  # fmt: skip
    books = BookKeeping(model)
    books(IMAGES[:1]).sum().backward()
    kept = 0
    for p in model.parameters():
        g = p.grad_sample
        kept += g.left.numel() + g.right.numel() if isinstance(g, Factors) else g.numel()
    outputs = 2 * 8 * 784 + 2 * 256 * 36 + 2 * 256 * 16 + 16
    books.remove_hooks()
    # Biases of layers that are kept as factors are counted in neither.
    assert 0 <= kept + outputs - numbers_per_image(model, IMAGES) <= 2 * 256 + 16

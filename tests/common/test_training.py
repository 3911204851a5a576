"""The trainer: reproducible without privacy, DP-SGD with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from common.model import ModelSpec, build, get_weights, weights_digest
from common.privacy.engine import PoissonBatches, make_private
from common.privacy.randomness import SecureRandom
from common.training import (
    PrivateStep,
    TrainingError,
    TrainSettings,
    evaluate,
    steps_per_epoch,
    to_tensor,
    train,
)

SPEC = ModelSpec(width=0.0625)
PLAIN = TrainSettings(epochs=2, batch_size=16, learning_rate=1e-3, optimizer="adam")


def private(sigma: float, clip: float = 1.0, **changes: object) -> TrainSettings:
    settings = {**PLAIN.__dict__, **changes}
    settings["privacy"] = PrivateStep(noise_multiplier=sigma, clipping_norm=clip)
    return TrainSettings(**settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Noise whose brightness tells the class (48 images, 8 classes in turn)."""
    rng = np.random.default_rng(0)
    brightness = (np.arange(48) % 8 * 24).reshape(48, 1, 1, 1)
    return to_tensor((rng.integers(0, 64, (48, 28, 28, 3)) + brightness).astype(np.uint8))


@pytest.fixture(scope="module")
def labels() -> torch.Tensor:
    return torch.arange(48) % 8


def test_pixels_are_normalised_by_mean_and_deviation_one_half() -> None:
    x = to_tensor(np.array([[[[0, 255, 128]]]], dtype=np.uint8))
    assert x.shape == (1, 3, 1, 1)
    torch.testing.assert_close(x.flatten(), (torch.tensor([0, 255, 128]) / 255 - 0.5) / 0.5)
    assert x.is_contiguous()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_without_privacy_equal_seeds_give_equal_updates(
    optimizer: str, images: torch.Tensor, labels: torch.Tensor
) -> None:
    settings = TrainSettings(**{**PLAIN.__dict__, "optimizer": optimizer})
    start = get_weights(build(SPEC, seed=0))
    digests = [
        weights_digest(train(build(SPEC), start, images, labels, settings, seed=s).update)
        for s in (1, 1, 2)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_training_learns(images: torch.Tensor, labels: torch.Tensor) -> None:
    start = get_weights(build(SPEC, seed=0))
    settings = TrainSettings(**{**PLAIN.__dict__, "epochs": 15, "learning_rate": 5e-3})
    result = train(build(SPEC), start, images, labels, settings, seed=0)
    end = {k: start[k] + result.update[k] for k in start}
    before = evaluate(build(SPEC), start, images, labels)
    after = evaluate(build(SPEC), end, images, labels)
    assert after.loss_sum < 0.8 * before.loss_sum
    assert result.examples == 48
    assert result.steps == 15 * 3


def test_with_privacy_no_seed_decides_anything(images: torch.Tensor, labels: torch.Tensor) -> None:
    start = get_weights(build(SPEC, seed=0))
    updates = []
    for _ in range(2):
        torch.manual_seed(0)
        updates.append(train(build(SPEC), start, images, labels, private(1.0), seed=1).update)
    assert weights_digest(updates[0]) != weights_digest(updates[1])


def test_two_hospitals_in_one_process_get_different_noise(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    """Without clipped signal (C tiny against σC) the updates are noise: they must not correlate."""
    start = get_weights(build(SPEC, seed=0))
    settings = private(1000.0, clip=1e-3, optimizer="sgd", epochs=1, learning_rate=1.0)
    flat = [
        np.concatenate(
            [
                u.ravel()
                for u in train(build(SPEC), start, images, labels, settings, seed=0).update.values()
            ]
        )
        for _ in range(2)
    ]
    assert abs(np.corrcoef(flat[0], flat[1])[0, 1]) < 0.05


def test_a_step_is_the_clipped_sum_plus_noise_over_the_expected_batch() -> None:
    """One step of SGD against per-image gradients by hand; the noise has deviation σ·C / batch."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(10, 3, 2, 2), torch.arange(10) % 3
    clip, sigma = 0.5, 1e-9
    expected = torch.zeros(3, 12)
    for i in range(10):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        grads = [p.grad for p in model.parameters()]
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        expected += grads[0] * min(1.0, clip / float(norm + 1e-6))
    model.zero_grad()
    batches = PoissonBatches(x, y, 1, SecureRandom())  # q = 1: every image is in
    before = model[1].weight.detach().clone()
    wrapped, optimizer, engine = make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), batches,
        noise_multiplier=sigma, clipping_norm=clip,
    )  # fmt: skip
    for bx, by in batches:
        nn.functional.cross_entropy(wrapped(bx), by).backward()
        optimizer.step()
    torch.testing.assert_close(
        before - model[1].weight.detach(), expected / 10, rtol=1e-4, atol=1e-6
    )
    assert engine.accountant.history == [(sigma, 1.0, 1)]


def test_noise_added_has_the_claimed_deviation(images: torch.Tensor, labels: torch.Tensor) -> None:
    start = get_weights(build(SPEC, seed=0))
    sigma, clip = 50.0, 0.01
    settings = private(
        sigma, clip=clip, optimizer="sgd", epochs=1, batch_size=48, learning_rate=1.0
    )
    update = train(build(SPEC), start, images, labels, settings, seed=0).update
    flat = np.concatenate([u.ravel() for u in update.values()])
    # One step at q = 1: (clipped sum + N(0, σC)) / 48, the sum's norm is at most 48·C.
    assert flat.std() == pytest.approx(sigma * clip / 48, rel=0.03)


def test_poisson_batches_have_the_claimed_rate_and_may_be_empty() -> None:
    batches = PoissonBatches(torch.zeros(40, 1), torch.arange(40), 20, SecureRandom())
    seen = [y for _ in range(200) for _, y in batches]
    sizes = np.array([len(y) for y in seen])
    assert len(seen) == 4000
    assert (sizes == 0).any()
    assert sizes.mean() == pytest.approx(2.0, abs=0.15)
    assert sizes.var() == pytest.approx(40 * 0.05 * 0.95, rel=0.15)
    counts = np.bincount(torch.cat(seen).numpy(), minlength=40)
    assert counts.min() > 120
    assert all(len(np.unique(y)) == len(y) for y in seen)


def test_empty_batches_train_to_the_end(images: torch.Tensor, labels: torch.Tensor) -> None:
    start = get_weights(build(SPEC, seed=0))
    settings = private(1.0, epochs=8, batch_size=1)
    result = train(build(SPEC), start, images[:2], labels[:2], settings, seed=0)
    assert result.steps == 16
    assert all(np.isfinite(u).all() for u in result.update.values())


def test_the_model_is_plain_again_after_private_training(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    model = build(SPEC)
    start = get_weights(build(SPEC, seed=0))
    train(model, start, images, labels, private(1.0, epochs=1), seed=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    train(model, start, images, labels, PLAIN, seed=0)


def test_divergence_is_an_error_not_a_result(images: torch.Tensor, labels: torch.Tensor) -> None:
    start = get_weights(build(SPEC, seed=0))
    settings = TrainSettings(**{**PLAIN.__dict__, "learning_rate": 1e30, "optimizer": "sgd"})
    with pytest.raises(TrainingError, match="learning rate"):
        train(build(SPEC), start, images, labels, settings, seed=0)


@pytest.mark.parametrize(
    ("images_", "batch", "steps"), [(1, 32, 1), (32, 32, 1), (33, 32, 2), (956, 32, 30)]
)
def test_steps_cover_every_image(images_: int, batch: int, steps: int) -> None:
    assert steps_per_epoch(images_, batch) == steps

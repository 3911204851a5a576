"""The trainer: reproducible without privacy, DP-SGD with it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import common.training as training
from common.errors import ModelError, PrivacyError
from common.evaluation import evaluate
from common.model import ModelSpec, build, get_weights, set_weights, weights_digest
from common.privacy.engine import PoissonBatches, make_private
from common.privacy.gaussian import GaussianSum
from common.privacy.randomness import SecureRandom
from common.privacy.views import apply_views, dihedral
from common.schedule import SCHEDULES, learning_rate_factor
from common.training import (
    PrivateStep,
    TrainingError,
    TrainSettings,
    steps_per_epoch,
    to_tensor,
    train,
)

SPEC = ModelSpec(width=0.0625)
PLAIN = TrainSettings(epochs=2, batch_size=16, learning_rate=1e-3, optimizer="adam")


def private(
    sigma: float,
    clip: float = 1.0,
    *,
    rate: float = 1 / 3,
    steps: int = 3,
    expected: float = 16.0,
    **changes: object,
) -> TrainSettings:
    settings = {**PLAIN.__dict__, **changes}
    settings["privacy"] = PrivateStep(
        noise_multiplier=sigma,
        clipping_norm=clip,
        sampling_rate=rate,
        steps=steps,
        expected_batch_size=expected,
    )
    return TrainSettings(**settings)  # type: ignore[arg-type]


def flat(update: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([u.ravel() for u in update.values()])


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


def test_without_privacy_each_pass_sees_other_views_of_every_picture_with_its_own_label(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    every = torch.cartesian_prod(torch.arange(8), torch.arange(-2, 3), torch.arange(-2, 3))
    orbits = [
        {view.numpy().tobytes() for view in apply_views(one.expand(len(every), 3, 28, 28), every)}
        for one in images
    ]
    model, start = build(SPEC), get_weights(build(SPEC, seed=0))
    settings = dataclasses.replace(PLAIN, views=3)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watched(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen[-1] = (seen[-1][0], y)
        return F.cross_entropy(logits, y)

    handle = model.register_forward_pre_hook(lambda _, x: seen.append((x[0].clone(), x[0])))
    first = train(model, start, images, labels, settings, seed=1, criterion=watched)
    handle.remove()
    assert [len(y) for _, y in seen] == [48, 48, 48] * 2
    passes: list[dict[int, list[bytes]]] = [{}, {}]
    for number, (x, y) in enumerate(seen):
        for row, label in zip(x, y, strict=True):
            pixels = row.numpy().tobytes()
            (image,) = [i for i, orbit in enumerate(orbits) if pixels in orbit]
            assert label == labels[image]
            passes[number // 3].setdefault(image, []).append(pixels)
    for views in passes:
        assert sorted(views) == list(range(48)) and {len(v) for v in views.values()} == {3}
    assert sum(passes[0][i] != passes[1][i] for i in range(48)) > 40
    again, plain = (
        train(model, start, images, labels, s, seed=1).update for s in (settings, PLAIN)
    )
    assert weights_digest(first.update) == weights_digest(again) != weights_digest(plain)


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


def test_bfloat16_learns_the_same_with_float32_weights_with_privacy_and_without(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    start = get_weights(build(SPEC, seed=0))
    how = dataclasses.replace(PLAIN, epochs=15, learning_rate=5e-3)
    half = dataclasses.replace(how, precision="bfloat16")
    exact, first, again = (
        train(build(SPEC), start, images, labels, s, seed=0) for s in (how, half, half)
    )
    assert weights_digest(first.update) == weights_digest(again.update)
    assert weights_digest(first.update) != weights_digest(exact.update)
    assert all(u.dtype == np.float32 for u in first.update.values())
    assert first.loss == pytest.approx(exact.loss, rel=0.1)
    # So little noise, and so large a norm, that both runs go the same way but for rounding.
    quiet = dataclasses.replace(private(1e-6, 1e3, rate=1.0, expected=48.0), optimizer="sgd")
    exact, half_private = (
        train(build(SPEC), start, images, labels, s, seed=0)
        for s in (quiet, dataclasses.replace(quiet, precision="bfloat16"))
    )
    one, other = flat(dict(exact.update)), flat(dict(half_private.update))
    assert 0 < np.linalg.norm(one - other) < 0.1 * np.linalg.norm(one)


@pytest.mark.parametrize("settings", [PLAIN, private(1.0)], ids=["plain", "private"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_of_each_step_is_the_schedules(
    schedule: str,
    settings: TrainSettings,
    images: torch.Tensor,
    labels: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rates: list[float] = []
    for kind in (torch.optim.Adam, torch.optim.SGD):
        step = kind.step
        monkeypatch.setattr(
            kind, "step",
            lambda self, *a, step=step: (rates.append(self.param_groups[0]["lr"]), step(self, *a)),
        )  # fmt: skip
    start = get_weights(build(SPEC, seed=0))
    how = dataclasses.replace(settings, schedule=schedule)
    steps = train(build(SPEC), start, images, labels, how, seed=0).steps
    expected = [how.learning_rate * learning_rate_factor(schedule, i / steps) for i in range(steps)]
    assert rates == pytest.approx(expected)
    assert (rates[-1] < rates[0]) == (schedule != "constant")


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
    settings = private(1000.0, clip=1e-3, optimizer="sgd", learning_rate=1.0)
    one, two = (
        flat(train(build(SPEC), start, images, labels, settings, seed=0).update) for _ in range(2)
    )
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.05


def test_a_step_is_the_clipped_sum_plus_noise_over_the_announced_batch() -> None:
    """One step of SGD against per-image gradients by hand; σ is too small to be seen."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(10, 3, 2, 2), torch.arange(10) % 3
    clip, sigma, announced = 0.5, 1e-9, 12.5
    expected = torch.zeros(3, 12)
    for i in range(10):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        grads = [p.grad for p in model.parameters()]
        norm = torch.sqrt(sum((g**2).sum() for g in grads))
        expected += grads[0] * min(1.0, clip / float(norm))
    start = get_weights(model)
    settings = private(
        sigma, clip, rate=1.0, steps=1, expected=announced, optimizer="sgd", learning_rate=1.0
    )
    update = train(model, start, x, y, settings, seed=0).update
    np.testing.assert_allclose(-update["1.weight"], expected / announced, rtol=1e-4, atol=1e-6)


def test_the_accountant_is_told_the_public_rate() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(10, 3, 2, 2), torch.arange(10) % 3
    batches = PoissonBatches(
        x, y, sampling_rate=0.3, steps=4, expected_batch_size=3.0, random=SecureRandom()
    )
    wrapped, optimizer, engine = make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), batches,
        noise_multiplier=1.5, clipping_norm=0.5,
    )  # fmt: skip
    for part in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(part.images), part.labels, reduction="sum").backward()
        optimizer.expect(part)
        optimizer.step()
    assert engine.accountant.history == [(1.5, 0.3, 4)]


def test_noise_added_has_the_claimed_deviation(images: torch.Tensor, labels: torch.Tensor) -> None:
    """One step at q = 1: (clipped sum + N(0, σ(C + γ√d))) / 48, the sum's norm at most 48·C."""
    start = get_weights(build(SPEC, seed=0))
    sigma, clip = 50.0, 0.01
    settings = private(
        sigma, clip, rate=1.0, steps=1, expected=48.0, optimizer="sgd", learning_rate=1.0
    )
    noise = 48.0 * flat(train(build(SPEC), start, images, labels, settings, seed=0).update)
    mechanism = GaussianSum(sigma, clip, len(noise))
    # 20,000 values: the estimate of the deviation errs by 0.5 %.
    assert noise.std() == pytest.approx(mechanism.std, rel=0.025)


def test_neither_rate_nor_divisor_depend_on_the_number_of_images(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    start = get_weights(build(SPEC, seed=0))
    settings = private(
        50.0, 0.01, rate=0.5, steps=1, expected=1000.0, optimizer="sgd", learning_rate=1.0
    )
    for n in (48, 7):
        update = train(build(SPEC), start, images[:n], labels[:n], settings, seed=0).update
        assert flat(update).std() == pytest.approx(50.0 * 0.01 / 1000, rel=0.03)


def test_poisson_batches_have_the_claimed_rate_and_may_be_empty() -> None:
    batches = PoissonBatches(
        torch.zeros(40, 1), torch.arange(40), sampling_rate=0.05, steps=4000,
        expected_batch_size=2.0, random=SecureRandom(),
    )  # fmt: skip
    parts = list(batches)
    seen = [part.labels for part in parts]
    sizes = np.array([len(y) for y in seen])
    assert len(seen) == 4000 and all(part.last for part in parts)
    assert (sizes == 0).any()
    assert sizes.mean() == pytest.approx(2.0, abs=0.15)
    assert sizes.var() == pytest.approx(40 * 0.05 * 0.95, rel=0.15)
    counts = np.bincount(torch.cat(seen).numpy(), minlength=40)
    assert counts.min() > 120
    assert all(len(np.unique(y)) == len(y) for y in seen)


def test_a_batch_taken_in_parts_is_the_same_step() -> None:
    """A Poisson batch too large for the memory goes through the network in parts."""
    x, y = torch.randn(30, 3, 2, 2), torch.arange(30) % 3
    after = []
    for most in (1024, 7):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        set_weights(model, {"1.weight": np.ones((3, 12)), "1.bias": np.zeros(3)})
        batches = PoissonBatches(
            x, y, sampling_rate=0.8, steps=3, expected_batch_size=24.0, most_images=most,
            random=SecureRandom(key_for_tests=bytes(32)),
        )  # fmt: skip
        wrapped, optimizer, engine = make_private(
            model, torch.optim.SGD(model.parameters(), lr=1.0), batches,
            noise_multiplier=0.1, clipping_norm=0.5,
        )  # fmt: skip
        for part in batches:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(part.images), part.labels, reduction="sum").backward()
            optimizer.expect(part)
            optimizer.step()
        assert engine.accountant.history == [(0.1, 0.8, 3)]
        after.append(get_weights(model)["1.weight"])
    np.testing.assert_allclose(after[0], after[1], rtol=1e-5, atol=1e-6)


def test_empty_batches_train_to_the_end(images: torch.Tensor, labels: torch.Tensor) -> None:
    start = get_weights(build(SPEC, seed=0))
    settings = private(1.0, rate=0.1, steps=16, expected=1.0)
    result = train(build(SPEC), start, images[:2], labels[:2], settings, seed=0)
    assert result.steps == 16
    assert all(np.isfinite(u).all() for u in result.update.values())


@pytest.mark.parametrize(
    "bad",
    [
        {"noise_multiplier": 0.0},
        {"clipping_norm": float("inf")},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.01},
        {"steps": 0},
        {"expected_batch_size": float("nan")},
        {"views": -1},
        {"clipping": "adaptive"},
    ],
)
def test_a_step_that_cannot_be_accounted_for_is_refused(bad: dict[str, object]) -> None:
    good = private(1.0).privacy
    with pytest.raises(PrivacyError, match="no private training"):
        PrivateStep(**{**good.__dict__, **bad})  # type: ignore[union-attr]


def test_the_model_is_plain_again_after_private_training(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    model = build(SPEC)
    start = get_weights(build(SPEC, seed=0))
    train(model, start, images, labels, private(1.0), seed=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    train(model, start, images, labels, PLAIN, seed=0)


def test_in_bfloat16_figures_are_nearly_those_of_float32_and_no_less_fine(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    weights = get_weights(build(SPEC, seed=0))
    exact, half = (
        evaluate(build(SPEC), weights, images, labels, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    assert not np.array_equal(exact.probabilities, half.probabilities)
    np.testing.assert_allclose(half.probabilities, exact.probabilities, atol=0.01)
    assert half.probabilities.dtype == np.float32
    np.testing.assert_allclose(half.probabilities.sum(1), 1.0, atol=1e-5)


def test_divergence_is_an_error_not_a_result(images: torch.Tensor, labels: torch.Tensor) -> None:
    start = get_weights(build(SPEC, seed=0))
    settings = TrainSettings(**{**PLAIN.__dict__, "learning_rate": 1e30, "optimizer": "sgd"})
    with pytest.raises(TrainingError, match="learning rate"):
        train(build(SPEC), start, images, labels, settings, seed=0)


def test_dihedral_answers_do_not_depend_on_how_a_picture_lies(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    model, weights = build(SPEC), get_weights(build(SPEC, seed=0))
    views = list(dihedral(images))
    single = [evaluate(model, weights, x, labels) for x in views]
    averaged = [evaluate(model, weights, x, labels, views="dihedral", batch_size=7) for x in views]
    mean = np.mean([s.probabilities for s in single], axis=0)
    assert max(np.abs(s.probabilities - single[0].probabilities).max() for s in single) > 1e-3
    for found in averaged:
        np.testing.assert_allclose(found.probabilities, mean, atol=1e-6)
        assert found.loss_sum == pytest.approx(-np.log(mean[range(48), labels]).sum(), rel=1e-5)
        assert found.correct == (found.probabilities.argmax(1) == labels.numpy()).sum()
        assert found.probabilities.dtype == np.float32
    tall = images[..., :20]  # turned, it is wide
    assert evaluate(model, weights, tall, labels, views="dihedral").examples == 48
    with pytest.raises(ModelError, match="'random' views"):
        evaluate(model, weights, images, labels, views="random")


@pytest.mark.parametrize(
    ("images_", "batch", "steps"), [(1, 32, 1), (32, 32, 1), (33, 32, 2), (956, 32, 30)]
)
def test_steps_cover_every_image(images_: int, batch: int, steps: int) -> None:
    assert steps_per_epoch(images_, batch) == steps


@pytest.mark.parametrize("steps", [1, 3, 4, 11])
def test_so_many_steps_are_taken_whatever_the_passes(steps: int) -> None:
    images, labels = torch.randn(50, 3, 28, 28), torch.arange(50) % 8
    settings = TrainSettings(
        epochs=1, batch_size=16, learning_rate=1e-3, optimizer="sgd", steps=steps
    )
    result = train(build(SPEC), get_weights(build(SPEC, seed=0)), images, labels, settings, seed=0)
    assert result.steps == steps
    batches = [len(b.labels) for b in training._shuffled(images, labels, settings, 0)]
    assert batches == ([16, 16, 16, 2] * 3)[:steps]

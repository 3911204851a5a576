"""Frozen parameters take no part: not in norms, not in memory, not in the noise, not in updates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.errors import PrivacyError
from common.model import ModelSpec, build, freeze, get_weights, set_weights, trainable_names
from common.privacy.clipped_sum import clipped_sum
from common.privacy.engine import PoissonBatches, images_at_once, make_private
from common.privacy.gaussian import GaussianSum
from common.privacy.randomness import SecureRandom
from common.training import PrivateStep, TrainSettings, train

SPEC = ModelSpec(width=0.0625)
START = get_weights(build(SPEC, seed=0))
IMAGES = torch.randn(16, 3, 14, 14, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 8
PLAIN = TrainSettings(epochs=2, batch_size=8, learning_rate=0.05, optimizer="adam")
PRIVATE = dataclasses.replace(
    PLAIN,
    privacy=PrivateStep(
        noise_multiplier=1.0, clipping_norm=0.5, sampling_rate=0.5, steps=3, expected_batch_size=8.0
    ),
)  # fmt: skip
FROZEN = {
    "stem and first blocks": ("stem", "block1", "block2"),
    "all norms in the middle": ("block1.body.1", "block2.body.4", "block3.body.4.weight"),
    "the head": ("head",),
}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("settings", [PLAIN, PRIVATE], ids=["plain", "private"])
@pytest.mark.parametrize("which", FROZEN)
def test_updates_are_exactly_zero_where_frozen_and_nowhere_else(
    which: str, settings: TrainSettings, optimizer: str
) -> None:
    model = build(SPEC)
    freeze(model, FROZEN[which])
    how = dataclasses.replace(settings, optimizer=optimizer)
    update = train(model, START, IMAGES, LABELS, how, seed=0).update
    trained = set(trainable_names(model))
    assert set(update) == set(START) and 0 < len(trained) < len(START)
    for name, values in update.items():
        assert values.any() == (name in trained), name


@pytest.mark.parametrize("which", FROZEN)
def test_the_clipped_sum_is_that_of_the_trained_parameters_alone(which: str) -> None:
    model = build(SPEC)
    freeze(model, FROZEN[which])
    found = clipped_sum(
        model, START, IMAGES, LABELS, sampling_rate=1.0, clipping_norm=0.5, random=SecureRandom()
    ).numpy()
    other = build(SPEC)
    set_weights(other, START)
    trained = [dict(other.named_parameters())[name] for name in trainable_names(model)]
    expected = np.zeros(sum(p.numel() for p in trained))
    for i in range(16):
        loss = F.cross_entropy(other(IMAGES[i : i + 1]), LABELS[i : i + 1])
        grads = torch.autograd.grad(loss, trained)
        g = torch.cat([x.reshape(-1) for x in grads]).double().numpy()
        expected += g * min(1.0, 0.5 / float(np.linalg.norm(g)))
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_noise_is_that_of_the_mechanism_over_the_trained_parameters() -> None:
    model = build(SPEC)
    freeze(model, ("stem", "block"))
    step = PrivateStep(
        noise_multiplier=2.0, clipping_norm=0.5, sampling_rate=1e-12, steps=1,
        expected_batch_size=1.0,
    )  # fmt: skip
    how = dataclasses.replace(PLAIN, learning_rate=1.0, optimizer="sgd", privacy=step)
    draws = [train(model, START, IMAGES, LABELS, how, seed=0).update for _ in range(20)]
    noise = np.concatenate([u[n].ravel() for u in draws for n in ("head.weight", "head.bias")])
    d = 32 * 8 + 8
    assert (
        len(noise) == 20 * d == 20 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    )
    # 5,280 draws: the estimate of the deviation errs by 1 %.
    assert noise.std() == pytest.approx(GaussianSum(2.0, 0.5, d).std, rel=0.05)


def test_more_images_fit_when_fewer_parameters_have_gradients() -> None:
    model = build(SPEC)
    before = images_at_once(model)
    freeze(model, ("stem", "block"))
    assert images_at_once(model) == (1 << 28) // (32 * 8 + 8) > before
    assert before == (1 << 28) // sum(p.numel() for p in model.parameters())


def test_a_model_without_anything_to_train_is_refused() -> None:
    """Opacus would take the step without noise."""
    model = build(SPEC).requires_grad_(False)
    batches = PoissonBatches(
        IMAGES, LABELS, sampling_rate=0.5, steps=1, expected_batch_size=8.0, random=SecureRandom()
    )
    with pytest.raises(PrivacyError, match="no parameter to train"):
        make_private(model, torch.optim.SGD(model.parameters(), lr=1.0), batches,
                     noise_multiplier=1.0, clipping_norm=1.0)  # fmt: skip
    with pytest.raises(PrivacyError, match="no parameter to train"):
        clipped_sum(model, START, IMAGES, LABELS, sampling_rate=1.0, clipping_norm=1.0,
                    random=SecureRandom())  # fmt: skip

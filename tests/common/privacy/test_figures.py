"""Validation figures under privacy: near the truth on average, and never exact."""

from __future__ import annotations

import math

import numpy as np
import pytest

from common.privacy.figures import LOSS_CLIP, noised


def case(n: int = 400, classes: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p.astype(np.float32), rng.integers(0, classes, n)


def exact(p: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    loss = np.minimum(-np.log(p[np.arange(len(y)), y]), LOSS_CLIP)
    return float((p.argmax(1) == y).sum()), float(loss.sum())


def test_the_noise_has_mean_zero_and_the_stated_deviation() -> None:
    p, y = case()
    correct, loss = exact(p, y)
    sigma = 3.0
    draws = [
        noised(p, y, np.arange(len(y)), count=len(y), noise_multiplier=sigma) for _ in range(600)
    ]
    errors = np.array([[d.correct - correct, (d.loss_sum - loss) / LOSS_CLIP] for d in draws])
    std = sigma * math.sqrt(0.5)
    assert np.abs(errors.mean(0)).max() < 4 * std / math.sqrt(600)
    assert errors.std(0) == pytest.approx([std, std], rel=0.12)


@pytest.mark.parametrize("lost", [0, 5])
def test_one_unit_moves_the_sum_by_at_most_its_norm(lost: int) -> None:
    """With next to no noise: a patient more or less, however many pictures, however bad."""
    p, y = case(60)
    units = np.arange(60) // 10  # six patients of ten pictures
    p[10 * lost : 10 * lost + 10] = 1e-12  # a loss far beyond the clip
    keep = units != lost
    renumbered = np.unique(units[keep], return_inverse=True)[1]

    def told(rows: np.ndarray, u: np.ndarray) -> np.ndarray:
        f = noised(p[rows], y[rows], u, count=6, noise_multiplier=1e-6)
        return np.array([f.correct, f.loss_sum / LOSS_CLIP])

    moved = told(np.ones(60, bool), units) - told(keep, renumbered)
    assert np.linalg.norm(moved) <= math.sqrt(0.5) + 1e-4


def test_the_number_of_images_told_is_the_released_one() -> None:
    p, y = case(50)
    assert noised(p, y, np.arange(50), count=57, noise_multiplier=1.0).examples == 57


def test_an_image_on_which_the_model_gives_nan_counts_as_wrong_and_is_no_error() -> None:
    p, y = case(10)
    p[:, :] = 0.0
    p[np.arange(10), y] = 1.0
    p[3] = np.nan
    figures = noised(p, y, np.arange(10), count=10, noise_multiplier=1e-6)
    assert figures.correct == pytest.approx(9, abs=1e-4)
    assert figures.loss_sum == pytest.approx(LOSS_CLIP, abs=1e-3)


def test_a_hospital_without_validation_images_tells_noise_around_nothing() -> None:
    p, y = np.zeros((0, 8), np.float32), np.zeros(0, np.int64)
    told = [noised(p, y, y, count=3, noise_multiplier=1.0) for _ in range(200)]
    assert {figures.examples for figures in told} == {3}
    assert abs(np.mean([figures.correct for figures in told]) - 1.5) < 5 * math.sqrt(0.5 / 200)

"""A model that is worse is found, one that wavers is not."""

from __future__ import annotations

import numpy as np
import pytest

from server_app.defence.figures import Validated, of_sums, worse

GOOD = [Validated(0.8, 0.5, 500.0), Validated(0.82, 0.45, 500.0)]


def test_a_collapse_is_found_by_accuracy_or_by_loss() -> None:
    assert worse(Validated(0.1, 2.0, 500.0), GOOD, 0.1) is not None
    assert worse(Validated(0.8, 3.0, 500.0), GOOD, 0.1) is not None
    assert worse(Validated(0.75, 0.7, 500.0), GOOD, 0.1) is None


def test_a_slow_decline_is_compared_with_the_best_and_not_with_the_last() -> None:
    before = [Validated(0.9, 0.3, 1000.0)]
    for accuracy in np.arange(0.86, 0.0, -0.04):
        found = Validated(float(accuracy), 0.4, 1000.0)
        if worse(found, before, 0.1):
            assert accuracy > 0.7
            return
        before.append(found)
    pytest.fail("it went down to nothing")


def test_nothing_is_worse_than_nothing() -> None:
    assert worse(Validated(0.0, 20.0, 10.0), [], 0.0) is None


@pytest.mark.parametrize("seed", range(5))
def test_chance_alone_rolls_nothing_back(seed: int) -> None:
    """Few images, or much noise: the same model, validated again and again."""
    rng = np.random.default_rng(seed)
    for n, noise in ((60, 0.0), (2000, 8.0)):
        before: list[Validated] = []
        for _ in range(100):
            right = rng.binomial(n, 0.7) + rng.normal(0, noise * np.sqrt(0.5 * 10))
            loss = 0.8 * n + 6 * rng.normal(0, noise * np.sqrt(0.5 * 10))
            found = of_sums(
                {"val-examples": n, "val-correct": right, "val-loss-sum": loss},
                noise=noise, hospitals=10,
            )  # fmt: skip
            assert isinstance(found, Validated)
            assert worse(found, before, 0.05) is None
            before.append(found)


@pytest.mark.parametrize(
    ("examples", "correct", "loss"),
    [(100, 16_000, 50.0), (100, -16_000, 50.0), (-5, 0, 0.0), (100, 50, -1000.0)],
)
def test_sums_that_no_images_can_have_are_no_figures(
    examples: float, correct: float, loss: float
) -> None:
    sums = {"val-examples": examples, "val-correct": correct, "val-loss-sum": loss}
    assert isinstance(of_sums(sums, noise=0.0, hospitals=10), str)


def test_nobody_validated() -> None:
    assert of_sums({"val-examples": 0.0}, noise=0.0, hospitals=10) is None
    assert of_sums({}, noise=0.0, hospitals=10) is None

"""The sum that a hospital's share of the noise covers is that of clipped gradients, no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.errors import PrivacyError
from common.model import ModelSpec, build, get_weights, set_weights
from common.privacy import clipped_sum as module
from common.privacy.clipped_sum import clipped_sum
from common.privacy.randomness import SecureRandom

SPEC = ModelSpec(width=0.03125, num_classes=8, channels=3)
START = get_weights(build(SPEC, seed=0))
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(24, 3, 28, 28, generator=GENERATOR)
LABELS = torch.arange(24) % 8


def by_hand(groups: list[list[int]], clip: float) -> np.ndarray:
    """The same sum, one unit after the other, with autograd alone."""
    model, total = build(SPEC), 0.0
    set_weights(model, START)
    for group in groups:
        model.zero_grad()
        F.cross_entropy(model(IMAGES[group]), LABELS[group], reduction="sum").backward()
        g = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double().numpy()
        total = total + g * min(1.0, clip / np.linalg.norm(g))
    return np.asarray(total)


@pytest.mark.parametrize("clip", [0.5, 1e3])
@pytest.mark.parametrize("most", [1024, 5])
@pytest.mark.parametrize("patients", [False, True])
def test_every_unit_counts_with_its_clipped_gradient(
    clip: float, most: int, patients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "images_at_once", lambda _: most)
    units = torch.arange(24) // 3 if patients else None
    groups = [[i] for i in range(24)] if units is None else [[3 * u, 3 * u + 1, 3 * u + 2]
                                                            for u in range(8)]  # fmt: skip
    found = clipped_sum(
        build(SPEC), START, IMAGES, LABELS, sampling_rate=1.0, clipping_norm=clip,
        random=SecureRandom(), units=units,
    ).numpy()  # fmt: skip
    expected = by_hand(groups, clip)
    assert found.dtype == np.float64
    assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)
    assert np.linalg.norm(found) <= len(groups) * clip


def test_batches_are_poisson_and_an_empty_one_is_zero() -> None:
    sums = [
        clipped_sum(build(SPEC), START, IMAGES, LABELS, sampling_rate=1e-9, clipping_norm=1.0,
                    random=SecureRandom())
        for _ in range(2)
    ]  # fmt: skip
    assert all(not s.any() for s in sums)
    some = {
        float(clipped_sum(build(SPEC), START, IMAGES, LABELS, sampling_rate=0.5,
                          clipping_norm=1.0, random=SecureRandom()).norm())
        for _ in range(4)
    }  # fmt: skip
    assert len(some) == 4


def test_what_breaks_clipping_is_refused_and_the_model_is_plain_again() -> None:
    model = build(SPEC)
    with pytest.raises(PrivacyError):
        clipped_sum(model, START, IMAGES.to(memory_format=torch.channels_last), LABELS,
                    sampling_rate=1.0, clipping_norm=1.0, random=SecureRandom())  # fmt: skip
    clipped_sum(model, START, IMAGES, LABELS, sampling_rate=1.0, clipping_norm=1.0,
                random=SecureRandom())  # fmt: skip
    F.cross_entropy(model(IMAGES), LABELS).backward()
    assert all(p.grad is not None for p in model.parameters())

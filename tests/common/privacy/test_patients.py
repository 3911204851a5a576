"""Patient-level DP-SGD: what one patient adds is bounded, however many pictures there are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from common.errors import PrivacyError
from common.model import ModelSpec, build, get_weights, weights_digest
from common.privacy.engine import Part, PoissonBatches, make_private
from common.privacy.gaussian import GaussianSum
from common.privacy.randomness import SecureRandom
from common.training import PrivateStep, TrainSettings, train

CLIP = 0.5
SPEC = ModelSpec(width=0.0625)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


def one_step(sigma: float, *, rate: float = 1.0, steps: int = 1) -> TrainSettings:
    """SGD at rate 1 and divisor 1: the update is minus the released sum."""
    privacy = PrivateStep(
        noise_multiplier=sigma, clipping_norm=CLIP, sampling_rate=rate, steps=steps,
        expected_batch_size=1.0,
    )  # fmt: skip
    return TrainSettings(
        epochs=0, batch_size=0, learning_rate=1.0, optimizer="sgd", privacy=privacy
    )


def released(
    x: torch.Tensor, y: torch.Tensor, units: torch.Tensor | None, sigma: float = 1e-9
) -> np.ndarray:
    model = small()
    update = train(model, get_weights(model), x, y, one_step(sigma), seed=0, units=units).update
    return -np.concatenate([u.ravel() for u in update.values()]).astype(np.float64)


@pytest.fixture
def pictures() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """60 pictures; patient 7 has 30 of them, much alike, the others two each."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(60, 3, 2, 2, generator=rng)
    x[:30] = x[0] + 0.1 * torch.randn(30, 3, 2, 2, generator=rng)
    y = torch.arange(60) % 3
    y[:30] = 1
    units = torch.cat([torch.full((30,), 7), 100 - torch.arange(30) // 2])
    mixed = torch.randperm(60, generator=rng)
    return x[mixed], y[mixed], units[mixed]


def test_removing_a_patient_moves_the_sum_by_at_most_the_clipping_norm(
    pictures: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    x, y, units = pictures
    whole = released(x, y, units)
    for patient in units.unique():
        kept = units != patient
        moved = np.linalg.norm(whole - released(x[kept], y[kept], units[kept]))
        assert moved <= CLIP * (1 + 1e-6)  # the weights, from which it is read, are float32
    assert moved > 0.2 * CLIP  # and it is no idle bound
    # With images for units the same patient moves it by many times that.
    kept = units != 7
    moved = np.linalg.norm(released(x, y, None) - released(x[kept], y[kept], None))
    assert moved > 5 * CLIP


def test_a_patients_gradients_are_summed_before_they_are_clipped(
    pictures: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    x, y, units = pictures
    expected = np.zeros(12 * 8 + 8 + 8 * 3 + 3)
    model = small()
    for patient in units.unique():
        mine = units == patient
        model.zero_grad()
        F.cross_entropy(model(x[mine]), y[mine], reduction="sum").backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()]).double().numpy()  # type: ignore[union-attr]
        expected += g * min(1.0, CLIP / np.linalg.norm(g))
    np.testing.assert_allclose(released(x, y, units), expected, rtol=1e-3, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=15),
    most=st.integers(1, 10),
    rate=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_images_of_a_patient_are_always_sampled_together(
    sizes: list[int], most: int, rate: float
) -> None:
    number = 3 * torch.randperm(len(sizes)) - 5
    units = torch.repeat_interleave(number, torch.tensor(sizes))[torch.randperm(sum(sizes))]
    names = torch.arange(len(units))
    batches = PoissonBatches(
        names, names, sampling_rate=rate, steps=5, expected_batch_size=1.0,
        random=SecureRandom(), units=units, most_images=most,
    )  # fmt: skip
    batch: list[Part] = []
    seen = 0
    for part in batches:
        batch.append(part)
        assert len(part.labels) <= most
        if not part.last:
            continue
        inside = torch.cat([p.labels for p in batch])
        assert len(inside.unique()) == len(inside)
        assert sorted(inside.tolist()) == names[torch.isin(units, units[inside])].tolist()
        check_units_of_parts(batch, units)
        batch, seen = [], seen + 1
    assert seen == 5 and not batch


def check_units_of_parts(batch: list[Part], units: torch.Tensor) -> None:
    """Parts number their patients rightly; only a patient alone in parts goes on in the next."""
    ended: set[int] = set()
    going_on = None
    for part in batch:
        assert part.units is not None
        mine = units[part.labels]
        assert len({*zip(mine.tolist(), part.units.tolist(), strict=True)}) == len(mine.unique())
        assert sorted(part.units.unique().tolist()) == list(range(len(mine.unique())))
        if going_on is not None or not part.finished:
            assert len(mine.unique()) == 1
            assert going_on in (None, int(mine[0]))
        going_on = None if part.finished else int(mine[0])
        assert ended.isdisjoint(mine.tolist())
        ended |= set(mine.tolist()) if part.finished else set()
    assert going_on is None


def labels_of_batches(batches: PoissonBatches) -> Iterator[np.ndarray]:
    """A batch's labels: patients of one image and of several come in parts of their own."""
    together: list[np.ndarray] = []
    for part in batches:
        together.append(part.labels.numpy())
        if part.last:
            yield np.concatenate(together)
            together = []


def test_the_rate_of_patients_is_the_sampling_rate_whatever_their_size() -> None:
    units = torch.repeat_interleave(torch.arange(20), torch.arange(20) % 5 + 1)
    batches = PoissonBatches(
        torch.zeros(len(units), 1), units, sampling_rate=0.15, steps=4000,
        expected_batch_size=3.0, random=SecureRandom(), units=units,
    )  # fmt: skip
    present = np.array([np.isin(np.arange(20), batch) for batch in labels_of_batches(batches)])
    # 4000 draws each: the rate's standard error is 0.0056.
    assert np.abs(present.mean(0) - 0.15).max() < 0.03
    assert present.sum(1).var() == pytest.approx(20 * 0.15 * 0.85, rel=0.15)
    assert (present.sum(1) == 0).any()


def test_patients_with_one_image_each_are_image_level_training_bit_for_bit() -> None:
    start = get_weights(build(SPEC, seed=0))
    x, y = torch.randn(24, 3, 28, 28), torch.arange(24) % 8
    privacy = PrivateStep(
        noise_multiplier=1.0, clipping_norm=CLIP, sampling_rate=0.4, steps=4,
        expected_batch_size=9.6,
    )  # fmt: skip
    how = TrainSettings(
        epochs=0, batch_size=0, learning_rate=1e-3, optimizer="adam", privacy=privacy
    )
    digests = [
        weights_digest(
            train(
                build(SPEC), start, x, y, how, seed=0, units=units,
                random=SecureRandom(key_for_tests=bytes(32)),
            ).update
        )
        for units in (None, torch.randperm(24) * 7)
    ]  # fmt: skip
    assert digests[0] == digests[1]


def test_a_patient_too_large_for_the_memory_adds_the_same(
    pictures: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    x, y, units = pictures
    after = []
    for most in (1024, 4):
        model = small()
        batches = PoissonBatches(
            x, y, sampling_rate=1.0, steps=2, expected_batch_size=10.0, units=units,
            random=SecureRandom(key_for_tests=bytes(32)), most_images=most,
        )  # fmt: skip
        wrapped, optimizer, engine = make_private(
            model, torch.optim.SGD(model.parameters(), lr=1.0), batches,
            noise_multiplier=0.01, clipping_norm=CLIP,
        )  # fmt: skip
        for part in batches:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(part.images), part.labels, reduction="sum").backward()
            optimizer.expect(part)
            optimizer.step()
        assert engine.accountant.history == [(0.01, 1.0, 2)]
        after.append(np.concatenate([w.ravel() for w in get_weights(model).values()]))
    np.testing.assert_allclose(after[0], after[1], rtol=1e-4, atol=1e-5)


def test_the_noise_of_a_step_is_that_of_the_mechanism_over_all_parameters() -> None:
    """Variance (σ·(C + γ√d))² over many releases of an empty batch: nothing but noise."""
    model = small()
    d = sum(p.numel() for p in model.parameters())
    m = GaussianSum(2.0, CLIP, d)
    x, y = torch.zeros(2, 3, 2, 2), torch.tensor([0, 1])
    steps = one_step(2.0, rate=1e-12, steps=1)
    draws = [
        train(model, get_weights(model), x, y, steps, seed=0, units=torch.tensor([5, 5])).update
        for _ in range(60)
    ]
    noise = np.concatenate([u.ravel() for update in draws for u in update.values()])
    assert len(noise) == 60 * d
    assert noise.var() == pytest.approx(m.std**2, rel=6 * np.sqrt(2 / len(noise)))


def test_empty_batches_and_patients_of_all_sizes_train_to_the_end() -> None:
    sizes = torch.tensor([1, 40, 1, 2, 7])
    units = torch.repeat_interleave(torch.arange(5), sizes)
    x, y = torch.randn(len(units), 3, 28, 28), torch.arange(len(units)) % 8
    start = get_weights(build(SPEC, seed=0))
    settings_ = one_step(1.0, rate=0.15, steps=12)
    result = train(build(SPEC), start, x, y, settings_, seed=0, units=units)
    assert result.steps == 12 and result.examples == 51
    assert all(np.isfinite(u).all() for u in result.update.values())


def test_without_privacy_units_change_nothing() -> None:
    model, settings_ = (
        small(),
        TrainSettings(epochs=2, batch_size=4, learning_rate=0.1, optimizer="sgd"),
    )
    x, y, start = torch.randn(10, 3, 2, 2), torch.arange(10) % 3, get_weights(small())
    one, two = (
        weights_digest(train(model, start, x, y, settings_, seed=1, units=u).update)
        for u in (None, torch.zeros(10, dtype=torch.int64))
    )
    assert one == two


def test_units_that_do_not_number_the_images_are_refused_before_training() -> None:
    model = small()
    for units in (torch.zeros(9, dtype=torch.int64), torch.zeros(10)):
        with pytest.raises(PrivacyError, match="privacy units"):
            train(
                model, get_weights(model), torch.randn(10, 3, 2, 2), torch.arange(10) % 3,
                one_step(1.0), seed=0, units=units,
            )  # fmt: skip


def test_a_step_that_is_not_told_whose_the_images_are_is_refused() -> None:
    model = small()
    batches = PoissonBatches(
        torch.randn(4, 3, 2, 2), torch.arange(4) % 3, sampling_rate=1.0, steps=1,
        expected_batch_size=2.0, random=SecureRandom(), units=torch.tensor([0, 0, 1, 1]),
    )  # fmt: skip
    wrapped, optimizer, _ = make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), batches,
        noise_multiplier=1.0, clipping_norm=CLIP,
    )  # fmt: skip
    (part,) = batches
    F.cross_entropy(wrapped(part.images), part.labels, reduction="sum").backward()
    with pytest.raises(PrivacyError, match="whose they are"):
        optimizer.step()
    optimizer.expect(part)
    optimizer.step()
    optimizer.expect(part)
    with pytest.raises(PrivacyError, match="twice"):
        optimizer.step()

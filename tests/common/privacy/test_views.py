"""Views move pixels and nothing else; averaged before clipping, they leave each unit's bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from common.errors import PrivacyError
from common.model import ModelSpec, build, get_weights, set_weights
from common.privacy import batches as batches_module
from common.privacy import clipped_sum as module
from common.privacy.batches import PoissonBatches
from common.privacy.clipped_sum import clipped_sum
from common.privacy.engine import make_private
from common.privacy.randomness import SecureRandom
from common.privacy.views import LARGEST_SHIFT, apply_views, dihedral, draw_views
from common.training import PrivateStep, TrainSettings, train

SPEC = ModelSpec(width=0.03125)
START = get_weights(build(SPEC, seed=0))
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(12, 3, 14, 14, generator=GENERATOR)
LABELS = torch.arange(12) % 8
PATIENTS = torch.arange(12) // 3


def test_a_view_is_the_picture_turned_mirrored_and_shifted_with_its_edge_repeated() -> None:
    picture = torch.randn(1, 2, 6, 6, generator=GENERATOR)
    turned = list(dihedral(picture))
    seen = set()
    for turn in range(8):
        plain = apply_views(picture, torch.tensor([[turn, 0, 0]]))
        (same,) = [i for i, other in enumerate(turned) if torch.equal(other, plain)]
        seen.add(same)
        for down in range(-2, 3):
            for right in range(-2, 3):
                padded = F.pad(plain, (2, 2, 2, 2), mode="replicate")
                expected = padded[..., 2 - down : 8 - down, 2 - right : 8 - right]
                found = apply_views(picture, torch.tensor([[turn, down, right]]))
                assert torch.equal(found, expected)
                assert found.is_contiguous()
    assert seen == set(range(8))


def test_the_dihedral_views_are_eight_and_the_picture_is_the_first() -> None:
    picture = torch.randn(2, 3, 4, 5, generator=GENERATOR)
    found = list(dihedral(picture))
    assert len(found) == 8 and torch.equal(found[0], picture)
    assert all(view.is_contiguous() for view in found)
    square = list(dihedral(picture[..., :4]))
    assert not any(torch.equal(square[i], square[j]) for i in range(8) for j in range(i))


def test_eight_views_hold_each_turn_once_and_shifts_are_uniform() -> None:
    views = draw_views(400, 8, SecureRandom(key_for_tests=bytes(32)))
    assert views.shape == (400, 8, 3) and views.dtype == torch.int64
    assert torch.equal(views[:, :, 0].sort(1).values, torch.arange(8).expand(400, 8))
    first = np.bincount(views[:, 0, 0].numpy(), minlength=8)
    assert first.min() > 25  # 50 each, deviation 6.6
    shifts = views[:, :, 1:] + LARGEST_SHIFT
    counts = np.bincount((5 * shifts[..., 0] + shifts[..., 1]).flatten().numpy(), minlength=25)
    assert len(counts) == 25 and 80 < counts.min() <= counts.max() < 180  # 128 each, 11.1
    assert draw_views(3, 11, SecureRandom()).shape == (3, 11, 3)


def test_pictures_that_are_not_square_and_no_views_at_all_are_refused() -> None:
    rest = {"sampling_rate": 1.0, "steps": 1, "expected_batch_size": 1.0}
    wide = torch.zeros(2, 3, 4, 5)
    with pytest.raises(PrivacyError, match="quarter turns"):
        apply_views(wide, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(PrivacyError, match="quarter turns"):
        PoissonBatches(wide, torch.zeros(2), random=SecureRandom(), views=2, **rest)  # type: ignore[arg-type]
    with pytest.raises(PrivacyError, match="-1 views"):
        PoissonBatches(wide, torch.zeros(2), random=SecureRandom(), views=-1, **rest)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    most=st.integers(1, 20),
    views=st.integers(1, 9),
    patients=st.booleans(),
    rate=st.sampled_from([0.2, 1.0]),
)
def test_every_sampled_picture_comes_with_all_its_views_and_no_part_is_too_large(
    sizes: list[int], most: int, views: int, patients: bool, rate: float
) -> None:
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    names = torch.arange(len(owner))
    parts = list(
        PoissonBatches(
            names.float().view(-1, 1, 1, 1).expand(-1, 1, 2, 2), names,
            sampling_rate=rate, steps=3, expected_batch_size=1.0, random=SecureRandom(),
            units=owner if patients else None, most_images=most, views=views,
        )
    )  # fmt: skip
    batch: list[int] = []
    going_on: int | None = None
    ends = 0
    for part in parts:
        assert len(part.labels) <= most and part.views == views
        assert torch.equal(part.images[:, 0, 0, 0], part.labels.float())
        assert part.units is not None
        mine = owner[part.labels] if patients else part.labels
        pairs = {*zip(mine.tolist(), part.units.tolist(), strict=True)}
        assert len(pairs) == len(mine.unique()) == len(part.units.unique())
        if going_on is not None or not part.finished:
            assert going_on in (None, int(mine[0])) and len(mine.unique()) == 1
        going_on = None if part.finished else int(mine[0])
        batch += part.labels.tolist()
        if part.last:
            assert going_on is None
            counts = np.bincount(batch, minlength=len(owner))
            assert set(counts) <= {0, views}
            assert rate < 1 or counts.all()
            batch, ends = [], ends + 1
    assert ends == 3


@pytest.mark.parametrize("most", [1024, 5, 3])
@pytest.mark.parametrize("patients", [False, True])
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_views_of_pictures_without_structure_change_nothing(
    most: int, patients: bool, clipping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "images_at_once", lambda _: most)
    plain = IMAGES[:, :, :1, :1].expand(-1, -1, 14, 14).contiguous()
    one, four = (
        clipped_sum(
            build(SPEC), START, plain, LABELS, sampling_rate=1.0, clipping_norm=0.5,
            random=SecureRandom(), units=PATIENTS if patients else None, views=views,
            clipping=clipping,
        )
        for views in (1, 4)
    )  # fmt: skip
    assert float(one.norm()) > 0.1
    assert float((one - four).norm()) < 1e-5 * float(one.norm())


def by_hand(views: torch.Tensor, groups: list[list[int]], clip: float) -> np.ndarray:
    """The clipped sum of the mean gradients over (images, K, 3) ``views``, by autograd alone."""
    model, total = build(SPEC), np.zeros(0)
    set_weights(model, START)
    for group in groups:
        model.zero_grad()
        for i in group:
            for view in views[i]:
                seen = apply_views(IMAGES[i : i + 1], view.unsqueeze(0))
                loss = F.cross_entropy(model(seen), LABELS[i : i + 1]) / views.shape[1]
                loss.backward()
        g = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double().numpy()  # type: ignore[union-attr]
        g *= min(1.0, clip / float(np.linalg.norm(g)))
        total = g if not len(total) else total + g
    return total


@pytest.mark.parametrize("clip", [0.5, 1e3])
@pytest.mark.parametrize(("most", "views"), [(1024, 3), (7, 3), (2, 3)])
@pytest.mark.parametrize("patients", [False, True])
def test_a_units_gradient_is_the_sum_over_pictures_of_the_mean_over_views_then_clipped(
    clip: float, most: int, views: int, patients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "images_at_once", lambda _: most)
    drawn: list[torch.Tensor] = []

    def remembered(n: int, k: int, random: SecureRandom) -> torch.Tensor:
        drawn.append(draw_views(n, k, random))
        return drawn[-1]

    monkeypatch.setattr(batches_module, "draw_views", remembered)
    found = clipped_sum(
        build(SPEC), START, IMAGES, LABELS, sampling_rate=1.0, clipping_norm=clip,
        random=SecureRandom(), units=PATIENTS if patients else None, views=views,
    ).numpy()  # fmt: skip
    groups = [[i] for i in range(12)]
    if patients:
        groups = [[3 * u, 3 * u + 1, 3 * u + 2] for u in range(4)]
    expected = by_hand(torch.cat(drawn), groups, clip)
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    assert np.linalg.norm(found) <= len(groups) * clip


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_no_unit_adds_more_than_the_clipping_norm_however_many_views(clipping: str) -> None:
    for views in (1, 2, 16):
        for mine in (slice(0, 1), slice(0, 5)):
            n = len(LABELS[mine])
            alone = clipped_sum(
                build(SPEC), START, 3.0 * IMAGES[mine], LABELS[mine], sampling_rate=1.0,
                clipping_norm=1e-3, random=SecureRandom(), views=views, clipping=clipping,
                units=torch.zeros(n, dtype=torch.int64),
            )  # fmt: skip
            assert 0.9e-3 < float(alone.norm()) < 1e-3


@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_the_trainer_takes_the_step_of_the_clipped_sum(clipping: str) -> None:
    step = PrivateStep(
        noise_multiplier=1e-9, clipping_norm=0.5, sampling_rate=0.7, steps=1,
        expected_batch_size=4.0, views=3, clipping=clipping,
    )  # fmt: skip
    how = TrainSettings(epochs=0, batch_size=0, learning_rate=1.0, optimizer="sgd", privacy=step)
    key = bytes(range(32))
    update = train(
        build(SPEC), START, IMAGES, LABELS, how, seed=0, units=PATIENTS,
        random=SecureRandom(key_for_tests=key),
    ).update  # fmt: skip
    total = clipped_sum(
        build(SPEC), START, IMAGES, LABELS, sampling_rate=0.7, clipping_norm=0.5, units=PATIENTS,
        random=SecureRandom(key_for_tests=key), views=3, clipping=clipping,
    ).numpy()  # fmt: skip
    moved = np.concatenate([u.ravel() for u in update.values()])
    np.testing.assert_allclose(-4.0 * moved, total, rtol=1e-3, atol=1e-5)
    assert np.linalg.norm(total) > 0.1


def test_a_step_that_is_not_told_whose_the_views_are_is_refused() -> None:
    model = build(SPEC)
    found = PoissonBatches(
        IMAGES, LABELS, sampling_rate=1.0, steps=1, expected_batch_size=1.0,
        random=SecureRandom(), views=2,
    )  # fmt: skip
    wrapped, optimizer, _ = make_private(
        model, torch.optim.SGD(model.parameters(), lr=1.0), found,
        noise_multiplier=1.0, clipping_norm=1.0,
    )  # fmt: skip
    part = next(iter(found))
    F.cross_entropy(wrapped(part.images), part.labels, reduction="sum").backward()
    with pytest.raises(PrivacyError, match="whose they are"):
        optimizer.step()

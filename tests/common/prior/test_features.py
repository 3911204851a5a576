from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import ModelError
from common.prior.drawing import draw_cells
from common.prior.features import PriorFeatures, PriorSpec, magnified
from common.prior.handcrafted import statistics
from common.prior.pretext import to_unit, train_network
from common.prior.rings import dihedral_views, ring_weights
from common.prior.train import PriorBudget, load_prior, make_prior, prior_digest, save_prior

_SPEC = PriorSpec(widths=(8,), dimension=24, size=20)
_BUDGET = PriorBudget(pictures=128, steps=2, whitening=128, ridge=0.0)


@pytest.fixture(scope="module")
def prior() -> PriorFeatures:
    return make_prior(_SPEC, seed=1, budget=_BUDGET)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return to_unit(draw_cells(16, seed=9, size=20).pictures)


def test_features_have_norm_one_and_ask_for_no_gradient(
    prior: PriorFeatures, pictures: Tensor
) -> None:
    out = prior(pictures.requires_grad_())
    assert out.shape == (16, 24) and out.dtype == torch.float32 and not out.requires_grad
    torch.testing.assert_close(out.norm(dim=1), torch.ones(16))
    assert not any(p.requires_grad for p in prior.parameters())
    assert len(prior(pictures[:0])) == 0


def test_a_turned_or_mirrored_picture_has_the_same_features(
    prior: PriorFeatures, pictures: Tensor
) -> None:
    some = pictures[:5]
    features, figures = prior(some), statistics(some)
    for view in dihedral_views(some):
        torch.testing.assert_close(prior(view), features, atol=1e-3, rtol=0)
        torch.testing.assert_close(statistics(view), figures, atol=1e-3, rtol=1e-3)


def test_a_picture_has_the_same_features_in_any_batch(
    prior: PriorFeatures, pictures: Tensor
) -> None:
    alone = torch.cat([prior(p[None]) for p in pictures[:5]])
    torch.testing.assert_close(alone, prior(pictures)[:5], atol=1e-4, rtol=0)


def test_extreme_pictures_have_finite_features(prior: PriorFeatures) -> None:
    for value in (-1.0, 0.0, 1.0):
        assert torch.isfinite(prior(torch.full((2, 3, 20, 20), value))).all()


def test_whitening_evens_out_drawn_pictures(prior: PriorFeatures) -> None:
    drawn = to_unit(draw_cells(128, seed=1999, size=20).pictures)
    white = (prior.standard(prior.raw(drawn)) - prior.middle) @ prior.projection
    values = torch.linalg.eigvalsh(white.T @ white / len(white))
    torch.testing.assert_close(values, torch.ones(24), atol=0.02, rtol=0)


def test_a_saved_prior_comes_back_the_same(
    prior: PriorFeatures, pictures: Tensor, tmp_path: Path
) -> None:
    path = tmp_path / "prior.safetensors"
    digest = save_prior(prior, path, made_by="a test")
    back = load_prior(path, digest=digest)
    assert back.spec == prior.spec and prior_digest(back) == digest
    assert torch.equal(back(pictures), prior(pictures))


def test_a_damaged_file_or_another_prior_is_refused(prior: PriorFeatures, tmp_path: Path) -> None:
    path = tmp_path / "prior.safetensors"
    save_prior(prior, path)
    with pytest.raises(ModelError, match="holds the prior"):
        load_prior(path, digest="0" * 64)
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    with pytest.raises(ModelError, match="holds the prior"):
        load_prior(path)
    path.write_bytes(content[:50])
    with pytest.raises(ModelError, match="cannot be read"):
        load_prior(path)
    with pytest.raises(ModelError, match="cannot be read"):
        load_prior(tmp_path / "none")


def test_pictures_of_another_shape_and_impossible_specs_are_refused(prior: PriorFeatures) -> None:
    with pytest.raises(ModelError, match="shape"):
        prior(torch.zeros(2, 3, 28, 28))
    with pytest.raises(ModelError):
        PriorSpec(size=21)
    with pytest.raises(ModelError):
        PriorFeatures(PriorSpec(widths=(), dimension=100_000))
    for zooms in ((), (1.0, 0.0), (3.0,), (float("nan"),)):
        with pytest.raises(ModelError, match="zooms"):
            PriorSpec(zooms=zooms)


def test_a_magnified_picture_shows_its_middle_and_commutes_with_turning(pictures: Tensor) -> None:
    assert magnified(pictures, 1.0) is pictures
    axis = torch.linspace(-1, 1, 20)
    ramp = axis.expand(1, 3, 20, 20)  # grows to the right
    seen = magnified(ramp, 1.25)
    torch.testing.assert_close(seen[0, 0, 10, 3:-3], axis[3:-3] / 1.25, atol=1e-2, rtol=0)
    assert seen.abs().max() < 0.9, "the edge is out of sight"
    for turned, of in zip(
        dihedral_views(magnified(pictures, 1.4)), dihedral_views(pictures), strict=True
    ):
        torch.testing.assert_close(magnified(of, 1.4), turned, atol=1e-4, rtol=0)
    for zoom in (0.5, 2.0):
        assert magnified(pictures, zoom).abs().max() <= 1


def test_each_zoom_adds_features_of_its_own(pictures: Tensor) -> None:
    near, far, both = (
        PriorFeatures(PriorSpec(widths=(8,), dimension=24, size=20, zooms=zooms))
        for zooms in ((1.0,), (1.4,), (1.0, 1.4))
    )
    far.networks.load_state_dict(near.networks.state_dict())
    both.networks.load_state_dict(near.networks.state_dict())
    seen = torch.cat([near.raw(pictures), far.raw(pictures)], 1)
    torch.testing.assert_close(both.raw(pictures), seen)
    assert not torch.allclose(near.raw(pictures), far.raw(pictures), atol=0.1)


@pytest.mark.slow  # a hundred steps: 45 s of a processor
def test_training_a_network_lowers_its_loss() -> None:
    cells, losses = draw_cells(256, seed=3, size=12), list[float]()
    train_network(cells, width=8, steps=100, seed=0, report=lambda _, loss: losses.append(loss))
    assert losses[-1] < 0.96 * losses[0]


def test_rings_share_out_a_picture() -> None:
    weights = ring_weights(14, (0.4, 0.8))
    assert weights.shape == (3, 196)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    assert weights[0, 7 * 14 + 7] > 0 and weights[0, 0] == 0 and weights[2, 0] > 0

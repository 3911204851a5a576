"""The classifier on a prior: its short cut is exact, its features are kept for their owner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import ModelError
from common.model import ModelSpec, build, get_weights, trainable_names
from common.prior import kept as prior_kept
from common.prior.features import PriorFeatures, PriorSpec
from common.prior.kept import centred_features, features_of, head_alone
from common.prior.model import PriorHead, on_prior, with_mean, with_whitening
from common.privacy.plan import MEAN, SECOND_MOMENT
from common.privacy.statistics import statistic_sum

pytestmark = pytest.mark.usefixtures("small_prior")

SPEC = ModelSpec(model="prior-head", width=0.25)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(40, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior_kept, "_kept", type(prior_kept._kept)())
    monkeypatch.setattr(prior_kept, "_rows", type(prior_kept._rows)())


def test_only_the_head_is_trained() -> None:
    assert trainable_names(build(SPEC)) == ("head.weight",)


DEEP = replace(SPEC, hidden_units=5)


def test_a_hidden_layer_is_trained_with_the_head() -> None:
    assert trainable_names(build(DEEP)) == ("hidden.weight", "hidden.bias", "head.weight")
    assert DEEP.digest() != SPEC.digest()


@pytest.mark.parametrize("spec", [SPEC, DEEP])
def test_the_head_alone_gives_the_classifiers_own_logits(
    spec: ModelSpec, pictures: torch.Tensor
) -> None:
    model = build(spec, seed=1)
    weights = get_weights(model)
    rng = np.random.default_rng(0)
    for name in ("mean", "matrix", *trainable_names(model)):
        weights[name] = rng.normal(size=weights[name].shape).astype(np.float32)
    network, own, inputs = head_alone(model, weights, pictures)
    network.load_state_dict({k: torch.from_numpy(v) for k, v in own.items()})
    whole = build(spec)
    whole.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    torch.testing.assert_close(network(inputs), whole(pictures))


def test_other_models_are_given_back_as_they_came(pictures: torch.Tensor) -> None:
    model = build(ModelSpec(width=0.03125))
    assert head_alone(model, {}, pictures) == (model, {}, pictures)


def test_kept_features_are_the_owners_only_and_a_damaged_file_is_made_anew(
    pictures: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(SPEC, seed=1)
    assert isinstance(model, PriorHead)
    found = features_of(model, pictures, tmp_path / "features")
    (path,) = (tmp_path / "features").iterdir()
    assert path.stat().st_mode & 0o077 == 0
    path.write_bytes(path.read_bytes()[:100])
    _nothing = type(prior_kept._kept)()
    monkeypatch.setattr(prior_kept, "_kept", _nothing)  # another process
    torch.testing.assert_close(features_of(model, pictures, tmp_path / "features"), found)
    assert len(path.read_bytes()) > 100
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_a_picture_in_another_set_is_not_computed_again_but_under_another_prior_it_is(
    pictures: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = build(SPEC, seed=1), build(SPEC, seed=2)
    assert isinstance(model, PriorHead) and isinstance(other, PriorHead)
    seen: list[int] = []
    forward = PriorFeatures.forward
    features_of(model, pictures[20:21])  # the shape of passes is measured once in a process

    def counted(self: PriorFeatures, some: torch.Tensor) -> torch.Tensor:
        seen.append(int(some.flatten(1).any(1).sum()))  # passes are filled up with empty ones
        return forward(self, some)

    monkeypatch.setattr(PriorFeatures, "forward", counted)
    first = features_of(model, pictures[:10])
    again = features_of(model, pictures[[12, 3, 9, 11]])
    assert seen == [10, 2]
    assert torch.equal(again[[1, 2]], first[[3, 9]])
    torch.testing.assert_close(again, model.features(pictures[[12, 3, 9, 11]]))
    seen.clear()
    features_of(other, pictures[:10])
    assert seen == [10]
    assert len(features_of(model, pictures[:0])) == 0
    monkeypatch.setattr(prior_kept._Rows, "MOST", 12)  # no more are kept, all are right
    monkeypatch.setattr(prior_kept, "_rows", prior_kept._Rows())
    many = features_of(model, pictures[:15])
    seen.clear()
    torch.testing.assert_close(features_of(model, pictures[5:15].clone()), many[5:])
    assert seen == [10]


def test_exact_statistics_whiten_features(pictures: torch.Tensor) -> None:
    model = build(SPEC, seed=1)
    assert isinstance(model, PriorHead)
    weights = get_weights(model)
    x = features_of(model, pictures)
    weights = with_mean(weights, statistic_sum(MEAN, x).numpy(), len(x))
    np.testing.assert_allclose(weights["mean"], x.mean(0), atol=1e-4)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    centred = model.map.centred(x)
    weights = with_whitening(weights, statistic_sum(SECOND_MOMENT, centred).numpy(), len(x))
    model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})

    def spread(y: torch.Tensor) -> float:
        values = torch.linalg.eigvalsh(y.double().T @ y.double())[-20:]
        return float(values[-1] / values[0])

    assert spread(model.map(x)[:, :-1]) < 0.7 * spread(centred)


def test_a_prior_of_another_shape_is_refused() -> None:
    other = PriorFeatures(PriorSpec(widths=(8,), dimension=16))
    zoomed = PriorFeatures(PriorSpec(zooms=(1.0, 1.2, 1.5)))  # of the same shapes
    with pytest.raises(ModelError, match="kind"):
        on_prior(get_weights(build(SPEC)), zoomed)
    with pytest.raises(ModelError, match="prior"):
        on_prior(get_weights(build(SPEC)), other)


def test_grey_pictures_are_refused() -> None:
    with pytest.raises(ModelError, match="colour"):
        build(ModelSpec(model="prior-head", channels=1))


def test_a_crafted_prior_makes_no_round_fail_on_one_picture(pictures: torch.Tensor) -> None:
    """Whether it overflows would hang on single pictures; such a picture counts as zeros."""
    model = build(SPEC, seed=1)
    assert isinstance(model, PriorHead)
    weights = get_weights(model)
    weights["matrix"] = np.full_like(weights["matrix"], 3e38)
    for name in weights:
        if name.startswith("features.networks"):
            weights[name] = weights[name] * np.float32(1e30)
    _, _, inputs = head_alone(model, weights, pictures)
    assert bool(torch.isfinite(inputs).all())
    assert bool(torch.isfinite(features_of(model, pictures)).all())
    assert bool(torch.isfinite(centred_features(model, pictures)).all())


def test_a_hospital_keeps_few_files_of_features(pictures: torch.Tensor, tmp_path: Path) -> None:
    for seed in range(6):
        model = build(SPEC, seed=seed)
        assert isinstance(model, PriorHead)
        features_of(model, pictures[:2], tmp_path)
    assert len(list(tmp_path.iterdir())) == 4


def test_what_the_head_sees_follows_prior_pictures_mean_and_whitening(
    pictures: torch.Tensor,
) -> None:
    """Each of them is kept from round to round, and none after it has changed."""
    weights, shown = get_weights(build(SPEC, seed=1)), pictures[:6].clone()

    def seen(values: dict[str, np.ndarray]) -> torch.Tensor:
        _, _, inputs = head_alone(build(SPEC), values, shown)
        whole = build(SPEC)
        assert isinstance(whole, PriorHead)
        whole.load_state_dict({k: torch.from_numpy(v) for k, v in values.items()})
        torch.testing.assert_close(inputs, whole.map(whole.features(shown)))
        return inputs

    first = seen(weights)
    assert seen(dict(weights)) is first
    rng = np.random.default_rng(0)
    for name in ("mean", "matrix", "features.centre"):
        changed = weights | {name: rng.normal(size=weights[name].shape).astype(np.float32)}
        assert not torch.equal(seen(changed), first)
    torch.testing.assert_close(seen(weights), first)
    shown.mul_(0.5)  # in place: the same tensor, other pictures
    assert not torch.equal(seen(weights), first)

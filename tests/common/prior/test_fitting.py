"""A head fitted to public pictures: the minimum of its loss, and a base like any other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.errors import ModelError
from common.model import ModelSpec, build, get_weights, set_weights, weights_digest
from common.prior.fitting import DECAYS, fit_head, fit_prior
from common.prior.model import PriorHead

pytestmark = pytest.mark.usefixtures("small_prior")

SPEC = ModelSpec(model="prior-head", width=0.25, num_classes=3)


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, with more red, green or blue."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.rand(count, 3, 28, 28, generator=generator) - 0.7
    return noise + 0.5 * F.one_hot(labels, 3)[:, :, None, None], labels


def test_the_head_is_where_its_loss_has_no_slope() -> None:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 7, generator=generator), torch.arange(60) % 4
    for decay in (1e-1, 1e-3):
        w = fit_head(x, labels, 4, decay).double().requires_grad_()
        loss = F.cross_entropy(x.double() @ w.T, labels) + decay / 2 * w.square().sum()
        (slope,) = torch.autograd.grad(loss, w)
        assert slope.norm() < 1e-4
        assert loss < np.log(4)


def test_what_is_fitted_tells_pictures_apart_that_it_has_not_seen() -> None:
    model, start = build(SPEC, seed=0), get_weights(build(SPEC, seed=0))
    assert isinstance(model, PriorHead)
    fitted, decay = fit_prior(model, start, *pictures(90, seed=1))
    assert decay in DECAYS
    again, _ = fit_prior(model, start, *pictures(90, seed=1))
    assert weights_digest(fitted) == weights_digest(again)
    changed = {name for name in start if not np.array_equal(start[name], fitted[name])}
    assert changed == {"mean", "matrix", "head.weight"}
    assert {n: (a.shape, a.dtype) for n, a in fitted.items()} == {
        n: (a.shape, a.dtype) for n, a in start.items()
    }
    whole = build(SPEC)
    set_weights(whole, fitted)
    seen, labels = pictures(60, seed=2)
    with torch.no_grad():
        assert (whole(seen).argmax(1) == labels).float().mean() > 0.9


def test_too_few_pictures_are_refused() -> None:
    model, start = build(SPEC, seed=0), get_weights(build(SPEC, seed=0))
    assert isinstance(model, PriorHead)
    with pytest.raises(ModelError, match="too few"):
        fit_prior(model, start, *pictures(9, seed=0))

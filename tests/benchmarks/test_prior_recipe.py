"""The recipe of a private head: what it spends, and that all goes through the noise."""

from __future__ import annotations

import math

import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from torch import Tensor

from benchmarks.prior.recipe import DISTRIBUTED, LOCAL, HeadPlan, fit_head, largest_mu, total_mu
from common.errors import PrivacyError
from common.prior.whitening import unit


@pytest.mark.parametrize("mu", [0.3, 1.49, 5.0])
def test_a_smaller_budget_is_shared_out_alike_and_kept(mu: float) -> None:
    plan = DISTRIBUTED.at(mu, 1.49)
    assert total_mu(plan.multipliers(mu)) == pytest.approx(mu)
    share = DISTRIBUTED.moment_noise**-2 / 1.49**2
    assert plan.moment_noise**-2 / mu**2 == pytest.approx(share)


def test_a_plan_spends_exactly_its_mu() -> None:
    for plan in (DISTRIBUTED, LOCAL):
        multipliers = plan.multipliers(1.47)
        assert len(multipliers) == plan.steps + 2
        assert total_mu(multipliers) == pytest.approx(1.47)


def test_a_plan_whose_moments_cost_too_much_is_refused() -> None:
    with pytest.raises(PrivacyError):
        HeadPlan(moment_noise=0.5).gradient_noise(1.47)


def test_mu_agrees_with_an_independent_accountant() -> None:
    plan = HeadPlan(steps=40)
    mu = largest_mu(6.0, 1.9e-4)
    accountant = PLDAccountant()
    for sigma in plan.multipliers(mu):
        accountant.compose(dp_event.GaussianDpEvent(sigma))
    assert accountant.get_epsilon(1.9e-4) == pytest.approx(6.0, abs=0.01)


def test_a_smaller_epsilon_or_delta_allows_less_mu() -> None:
    assert largest_mu(1.0, 1e-5) < largest_mu(6.0, 1e-5) < largest_mu(6.0, 1e-3)
    for epsilon, delta in ((0.0, 1e-5), (math.nan, 1e-5), (1.0, 0.0), (1.0, 1.0)):
        with pytest.raises(PrivacyError):
            largest_mu(epsilon, delta)


def test_the_recipe_learns_and_sends_everything_through_the_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2000) % 4
    features = unit(torch.eye(10)[labels] + 0.25 * torch.randn(2000, 10, generator=generator))
    seen: list[float] = []

    def add_noise(total: Tensor, deviation: float) -> Tensor:
        seen.append(deviation)
        return total + deviation * torch.randn(total.shape, generator=generator)

    plan = HeadPlan(steps=30)
    made = fit_head(features, labels, classes=4, plan=plan, mu=1.5, count=1900, add_noise=add_noise)
    assert float((made.logits(features).argmax(1) == labels).float().mean()) > 0.9
    sigma = plan.gradient_noise(1.5)
    assert seen == [plan.mean_noise, plan.moment_noise, *[sigma * plan.clip] * 30]
    with_none = fit_head(
        features, labels, classes=4, plan=plan, mu=1.5, count=1900, add_noise=lambda t, _: 0 * t
    )
    # With the totals withheld, nothing of the pictures reaches the head.
    assert not with_none.weights.any() and not with_none.whitening.mean.any()

"""The Rényi filter: against two other accountants, exact integrals, and what a filter must be."""

from __future__ import annotations

import math
import warnings

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.rdp import compute_rdp

from common.privacy.accounting import Event, epsilon_of
from common.privacy.filter import ORDERS, best_order, epsilon_at, renyi

orders = st.sampled_from(ORDERS)
deltas = st.floats(1e-10, 1e-2)
events = st.builds(
    Event,
    st.floats(0.3, 50.0),
    st.one_of(st.floats(1e-3, 1.0), st.just(1.0)),
    st.integers(0, 2000),
)


def opacus_rdp(event: Event, order: float) -> float:
    with np.errstate(all="ignore"):
        return float(
            compute_rdp(
                q=event.sampling_rate,
                noise_multiplier=event.noise_multiplier,
                steps=event.steps,
                orders=[order],
            )[0]
        )


def integrated(event: Event, order: float) -> float:
    """D_α of one step, (1 - q) N(0, σ²) + q N(1, σ²) against N(0, σ²), by the trapezoidal rule."""
    sigma, q = event.noise_multiplier, event.sampling_rate
    x = np.linspace(-30 * sigma - 1, 30 * sigma + order + 2, 200_001)
    shifted = math.log(q) + (2 * x - 1) / (2 * sigma**2)
    ratio = np.logaddexp(math.log1p(-q), shifted) if q < 1 else shifted
    log = order * ratio - x**2 / (2 * sigma**2) - 0.5 * math.log(2 * math.pi * sigma**2)
    top = float(log.max())
    return (top + math.log(float(np.trapezoid(np.exp(log - top), x)))) / (order - 1)


@settings(max_examples=60, deadline=None)
@given(event=events, order=orders)
def test_divergences_are_those_of_opacus_accountant_at_the_same_order(
    event: Event, order: float
) -> None:
    assert renyi([event], order) == pytest.approx(opacus_rdp(event, order), rel=1e-9, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    sigma=st.floats(0.3, 20.0),
    rate=st.one_of(st.floats(1e-3, 1.0), st.just(1.0)),
    order=st.sampled_from([a for a in ORDERS if a <= 64]),
)
def test_divergences_are_the_integrals_that_define_them(
    sigma: float, rate: float, order: float
) -> None:
    event = Event(sigma, rate, 1)
    assert renyi([event], order) == pytest.approx(integrated(event, order), rel=1e-4, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(first=events, second=events, order=orders, pure=st.floats(0.0, 3.0))
def test_divergences_add_up_in_any_order(
    first: Event, second: Event, order: float, pure: float
) -> None:
    together = renyi([first, second], order, pure=pure)
    assert together == pytest.approx(renyi([second, first], order, pure=pure))
    apart = renyi([first], order) + renyi([second], order) + renyi([], order, pure=pure)
    assert together == pytest.approx(apart)


@settings(max_examples=60, deadline=None)
@given(event=events, order=orders, more=st.integers(0, 100), less=st.floats(0.5, 1.0))
def test_more_steps_less_noise_or_a_higher_rate_never_cost_less(
    event: Event, order: float, more: int, less: float
) -> None:
    cost = renyi([event], order)
    slack = 1e-9 * (1.0 + cost)
    sigma, rate, steps = event.noise_multiplier, event.sampling_rate, event.steps
    assert renyi([Event(sigma, rate, steps + more)], order) >= cost - slack
    assert renyi([Event(sigma * less, rate, steps)], order) >= cost - slack
    assert renyi([Event(sigma, min(1.0, rate / less), steps)], order) >= cost - slack


@settings(max_examples=100)
@given(order=orders, pure=st.floats(0.0, 20.0), parts=st.integers(1, 5))
def test_pure_mechanisms_cost_at_least_their_exact_divergence(
    order: float, pure: float, parts: int
) -> None:
    """Randomised response is the worst mechanism of pure ε (Kairouz, Oh, Viswanath 2015)."""
    each = pure / parts
    truth = -math.log1p(math.exp(-each))  # log p of the truth; log(1 - p) is ``lie``
    lie = truth - each
    terms = order * truth + (1 - order) * lie, order * lie + (1 - order) * truth
    exact = parts * float(np.logaddexp(*terms)) / (order - 1)
    assert exact <= renyi([], order, pure=pure) + 1e-9
    assert renyi([], order, pure=pure) <= pure


@settings(max_examples=200)
@given(divergence=st.floats(1e-6, 100.0), order=orders, delta=deltas)
def test_the_conversion_is_that_of_the_other_accountant(
    divergence: float, order: float, delta: float
) -> None:
    """dp-accounting's, of the same divergence; where it says 0 it bounds by the KL divergence."""
    theirs = float(compute_epsilon([order], [divergence], delta)[0])
    ours = epsilon_at(divergence, order, delta)
    assert ours >= theirs * (1 - 1e-9)
    assert theirs == 0.0 or ours == pytest.approx(theirs)


@settings(max_examples=40, deadline=None)
@given(event=events, order=st.sampled_from((2, 3, 5, 8, 16, 64, 256)), delta=deltas)
def test_epsilon_is_that_of_the_other_accountant(event: Event, order: int, delta: float) -> None:
    """Whole orders only: its series for fractional ones stops early, up to 0.3 % above."""
    assume(event.steps > 0)
    theirs = RdpAccountant(orders=[order])
    gaussian = dp_accounting.GaussianDpEvent(event.noise_multiplier)
    step = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, gaussian)
    theirs.compose(dp_accounting.SelfComposedDpEvent(step, event.steps))
    epsilon = float(theirs.get_epsilon(delta))
    assume(epsilon > 0.0)
    ours = epsilon_at(renyi([event], order), order, delta)
    assert ours == pytest.approx(epsilon, rel=1e-6)


def test_the_conversion_of_nothing_is_nothing_and_of_everything_is_infinite() -> None:
    for order in ORDERS:
        assert epsilon_at(0.0, order, 1e-5) == 0.0
        assert epsilon_at(math.inf, order, 1e-5) == math.inf
        assert epsilon_at(1e-9, order, 0.5) >= 0.0


@pytest.mark.parametrize(
    ("sigma", "rate", "steps", "total", "delta"),
    [
        (4.0, 1.0, 3, 8.0, 1e-4),
        (4.0, 1.0, 3, 2.0, 1e-5),
        (20.0, 1.0, 100, 8.0, 2e-4),
        (1.5, 0.2, 10, 8.0, 2e-4),
        (5.0, 1.0, 1, 1.0, 1e-5),
    ],
)
def test_a_used_up_total_is_above_what_it_exactly_costs_and_by_little(
    sigma: float, rate: float, steps: int, total: float, delta: float
) -> None:
    """As many equal runs as fit: the filter gives away no more than 15 % of ε."""
    run = Event(sigma, rate, steps)
    order = best_order([run], total, delta)
    each = renyi([run], order)
    fit = next(n for n in range(1, 1000) if epsilon_at((n + 1) * each, order, delta) > total)
    by_filter = epsilon_at(fit * each, order, delta)
    exact = epsilon_of([Event(sigma, rate, fit * steps)], delta).value
    assert exact <= by_filter <= 1.15 * exact


@settings(max_examples=30, deadline=None)
@given(event=events, delta=st.floats(1e-8, 1e-3), order=orders)
def test_the_filter_is_never_below_the_exact_figure(
    event: Event, delta: float, order: float
) -> None:
    """At any order: which one was fixed is a question of economy, never of soundness."""
    small = Event(event.noise_multiplier, event.sampling_rate, min(event.steps, 50))
    found = epsilon_at(renyi([small], order), order, delta)
    assume(0 < found < 30)
    exact = epsilon_of([small], delta)
    # Both accountants are upper bounds with an error of their own, so the smaller is compared.
    assert found >= min(exact.prv, exact.pld) - 0.02 - 0.01 * found


@settings(max_examples=30, deadline=None)
@given(event=events, total=st.floats(0.5, 20.0), delta=st.floats(1e-8, 1e-3))
def test_the_best_order_lets_the_most_runs_in(event: Event, total: float, delta: float) -> None:
    assume(event.steps > 0)
    best = best_order([event], total, delta)
    assert best in ORDERS

    def runs(order: float) -> float:
        """How many runs fit; the conversion alone is what epsilon_at adds to a divergence."""
        conversion = epsilon_at(1e6, order, delta) - 1e6
        return (total - conversion) / renyi([event], order)

    assert runs(best) >= max(runs(order) for order in ORDERS) * (1 - 1e-6)


def test_without_a_total_the_best_order_is_that_of_the_smallest_epsilon() -> None:
    run = Event(2.0, 0.1, 200)
    best = best_order([run], math.inf, 1e-5)
    costs = {order: epsilon_at(renyi([run], order), order, 1e-5) for order in ORDERS}
    assert costs[best] == min(costs.values())


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "sigma", [1e-300, 1e-155, 1e-30, 1e-3, 0.05, 1e3, 1e6, 1e8, 1e30, 1e155, 1e300]
)
def test_extreme_noise_gives_a_number_or_infinity_and_never_nan(sigma: float) -> None:
    """Sampling only helps: no more than the Gaussian without it, α / (2 σ²), and no less than 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate in (1e-6, 0.1, 0.5, 0.999999, 1.0):
            for order in (1.1, 2.0, 2.7, 3.3, 10.9, 64.0, 512.0):
                cost = renyi([Event(sigma, rate, 1)], order)
                assert 0.0 <= cost <= order / 2 / sigma / sigma * (1 + 1e-9)
                if sigma <= 0.05 and rate >= 0.1:
                    assert cost > 100
                assert renyi([Event(sigma, rate, 0)], order) == 0.0
                assert renyi([Event(sigma, rate, 10**9)], order) == pytest.approx(cost * 1e9)

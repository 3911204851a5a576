"""Where every unit is in every batch, the steps of a run are one Gaussian step, and exact."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_ndtr

from common.privacy import Event, calibrate, epsilon_of
from common.privacy.accounting import _PRV_ERROR, _key, _pld, _prv

DELTAS = st.sampled_from([1e-6, 1.9e-4])


def exact(mu: float, delta: float) -> float:
    """ε of a Gaussian step of multiplier 1/μ: Balle and Wang 2018, Theorem 8."""

    def excess(epsilon: float) -> float:
        first = log_ndtr(mu / 2 - epsilon / mu)
        second = epsilon + log_ndtr(-mu / 2 - epsilon / mu)
        return math.exp(first) - math.exp(second) - delta

    return float(brentq(excess, 0.0, 500.0, xtol=1e-12)) if excess(0.0) > 0 else 0.0


def mu_of(events: list[Event]) -> float:
    """Dong, Roth and Su 2019, Corollary 3.3."""
    return math.sqrt(sum(e.steps / e.noise_multiplier**2 for e in events))


def full(sigma: float, steps: int) -> Event:
    return Event(sigma, 1.0, steps)


full_batches = st.lists(
    st.builds(full, st.floats(1.0, 60.0), st.integers(1, 200)), min_size=1, max_size=3
)


@settings(max_examples=60, deadline=None)
@given(events=full_batches, delta=DELTAS)
def test_both_figures_are_at_or_above_the_exact_one_and_close_to_it(
    events: list[Event], delta: float
) -> None:
    mu = mu_of(events)
    assume(0.05 <= mu <= 8.0)
    truth, found = exact(mu, delta), epsilon_of(events, delta)
    assert truth - 1e-6 <= found.pld <= truth * 1.0005 + 1e-4
    assert truth - 1e-6 <= found.prv <= truth + 1.5 * _PRV_ERROR
    assert found.agree
    assert not found.by_rdp


@settings(max_examples=15, deadline=None)
@given(events=full_batches, delta=DELTAS)
def test_taken_as_one_step_they_cost_what_the_accountants_composition_costs(
    events: list[Event], delta: float
) -> None:
    """The accountants' own convolutions, of each kind of step with itself and the others."""
    assume(0.1 <= mu_of(events) <= 6.0)
    composed = tuple((e.noise_multiplier, e.sampling_rate, e.steps) for e in events)
    found = epsilon_of(events, delta)
    assert found.pld == pytest.approx(_pld(composed, delta), rel=1e-3, abs=1e-3)
    assert found.prv == pytest.approx(_prv(composed, delta), rel=1e-3, abs=0.5 * _PRV_ERROR)


@settings(max_examples=200)
@example(events=[full(0.35, 1)])
@given(events=st.lists(st.builds(full, st.floats(1e-150, 1e150), st.integers(1, 10**6)),
                       min_size=1, max_size=6))  # fmt: skip
def test_rounding_never_adds_noise(events: list[Event]) -> None:
    ((sigma, rate, steps),) = _key(events)
    assert (rate, steps) == (1.0, 1)
    assert 0 < sigma <= min(e.noise_multiplier for e in events)
    # Exactly: of what floating point makes of 1/σ, the last digit may be on either side.
    mu_squared = sum(e.steps / Fraction(e.noise_multiplier) ** 2 for e in events)
    assert (1 - Fraction(1, 10**12)) ** 2 < Fraction(sigma) ** 2 * mu_squared <= 1


@given(sigma=st.floats(1.0, 50.0), steps=st.integers(2, 200), first=st.integers(1, 199))
@settings(max_examples=25, deadline=None)
def test_how_the_steps_are_told_changes_nothing(sigma: float, steps: int, first: int) -> None:
    """A ledger's many entries cost to the bit what the plan that they are of was calibrated to."""
    first = min(first, steps)
    whole, other = full(sigma, steps), full(2.5 * sigma, 1)
    parts = [full(sigma, first), other, full(sigma, steps - first)]
    assert epsilon_of([whole, other], 1e-5) == epsilon_of(parts, 1e-5)


def test_a_step_by_itself_and_sampled_steps_are_asked_about_as_they_are() -> None:
    assert _key([full(3.0, 1)]) == ((3.0, 1.0, 1),)
    mixed = [full(3.0, 2), Event(2.0, 0.5, 7), full(3.0, 1)]
    assert _key(mixed) == ((2.0, 0.5, 7), (3.0, 1.0, 3))
    assert _key([full(3.0, 0)]) == ()


@settings(max_examples=10, deadline=None)
@given(
    epsilon=st.floats(0.3, 9.0), steps=st.integers(1, 200), delta=DELTAS,
    beside=st.lists(st.floats(30.0, 100.0), max_size=2),
)  # fmt: skip
def test_a_calibrated_run_of_full_batches_keeps_its_promise_exactly(
    epsilon: float, steps: int, delta: float, beside: list[float]
) -> None:
    """By both accountants at the end and after any part of it, and by the exact formula."""
    others = [full(sigma, 1) for sigma in beside]
    assume(exact(mu_of(others), delta) < epsilon / 2 if others else True)
    sigma = calibrate(
        epsilon=epsilon, delta=delta, sampling_rate=1.0, steps=steps, beside=tuple(others)
    )
    events = [full(sigma, steps), *others]
    assert epsilon_of(events, delta).value <= epsilon
    assert epsilon_of([full(sigma, (steps + 1) // 2), *others], delta).value <= epsilon
    # Not wasted either: PRV's own error and the calibration's 0.1 % are all that is left.
    assert epsilon - 0.02 - 0.005 * epsilon <= exact(mu_of(events), delta) <= epsilon


@pytest.mark.parametrize("sigma", [1e-100, 1e-3])
def test_where_there_is_next_to_no_noise_the_figure_is_large(sigma: float) -> None:
    assert epsilon_of([full(sigma, 5)], 1e-5).value > 1000

"""Two accountants, golden values, and a calibration that keeps its promise."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.privacy import Epsilon, Event, calibrate, epsilon_of


def test_golden_value_of_the_tensorflow_privacy_tutorial() -> None:
    """MNIST tutorial: N 60,000, batch 250, σ 1.3, 15 epochs, δ 1e-5: RDP says 1.18."""
    e = epsilon_of([Event(1.3, 250 / 60_000, 15 * 240)], 1e-5)
    assert 0.85 < e.pld <= e.prv < 1.18


def test_golden_value_of_a_single_full_batch_gaussian_step() -> None:
    """Balle & Wang 2018, analytic Gaussian mechanism: σ = 1, δ = 1e-5 gives ε = 4.3766."""
    e = epsilon_of([Event(1.0, 1.0, 1)], 1e-5)
    assert e.pld == pytest.approx(4.3766, abs=0.01)
    assert e.prv == pytest.approx(4.3766, abs=0.03)


def test_per_round_calibration_is_no_promise_for_the_run() -> None:
    """FACTS: 20 rounds, each calibrated alone to ε = 6 (5 steps, q = 0.2), are far above 6."""
    sigma = calibrate(epsilon=6.0, delta=1.9e-4, sampling_rate=0.2, steps=5)
    assert epsilon_of([Event(sigma, 0.2, 100)], 1.9e-4).value > 20


def test_measured_noise_multiplier_of_twenty_rounds() -> None:
    """FACTS: 20 rounds × 5 steps at q = 0.2, ε = 6, δ = 1.9e-4 need σ = 1.54."""
    assert calibrate(epsilon=6.0, delta=1.9e-4, sampling_rate=0.2, steps=100) == pytest.approx(
        1.54, abs=0.02
    )


@settings(max_examples=8, deadline=None)
@given(
    epsilon=st.floats(0.5, 10.0), rate=st.sampled_from([0.02, 0.1, 0.3, 1.0]),
    steps=st.integers(1, 300),
)  # fmt: skip
def test_calibrated_noise_keeps_both_accountants_at_or_below_the_target(
    epsilon: float, rate: float, steps: int
) -> None:
    sigma = calibrate(epsilon=epsilon, delta=1e-4, sampling_rate=rate, steps=steps)
    spent = epsilon_of([Event(sigma, rate, steps)], 1e-4)
    assert spent.value <= epsilon
    assert spent.agree
    # And the noise is not wasted: a little less would not do.
    assert epsilon_of([Event(sigma / 1.01, rate, steps)], 1e-4).value > epsilon * 0.985


def test_composition_ignores_order_and_empty_events() -> None:
    a, b, nothing = Event(1.0, 0.1, 20), Event(2.0, 0.3, 10), Event(1.0, 0.1, 0)
    assert epsilon_of([a, b], 1e-5) == epsilon_of([b, nothing, a], 1e-5)
    assert epsilon_of([nothing], 1e-5) == Epsilon(0.0, 0.0)


def test_more_steps_never_cost_less() -> None:
    costs = [epsilon_of([Event(1.2, 0.1, n)], 1e-4).value for n in (1, 10, 50, 100, 400)]
    assert costs == sorted(costs)


def test_disagreement_is_told() -> None:
    assert not Epsilon(6.0, 5.0).agree
    assert Epsilon(6.0, 5.95).agree
    assert Epsilon(6.0, 5.0).value == 6.0


@pytest.mark.parametrize(
    "bad", [(0.0, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, -1), (float("inf"), 0.1, 1)]
)
def test_what_cannot_be_accounted_for_is_refused(bad: tuple[float, float, int]) -> None:
    with pytest.raises(PrivacyError):
        Event(*bad)


def test_where_the_accountants_overflow_the_figure_is_large_not_small() -> None:
    assert epsilon_of([Event(0.01, 0.5, 1000)], 1e-5).value > 1000
    assert epsilon_of([Event(0.3, 0.5, 1000)], 1e-5).value > 100


def test_an_unreachable_target_is_refused() -> None:
    with pytest.raises(PrivacyError, match="no noise multiplier"):
        calibrate(epsilon=0.001, delta=1e-5, sampling_rate=0.5, steps=1000)

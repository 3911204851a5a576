"""From an attack's hits and misses to a lower bound on ε. Numbers in, numbers out.

Two ways, for two kinds of evidence:

* Many runs with and without one canary. The attack's true and false positive rates, with
  Clopper–Pearson limits, contradict every ε that is too small: :func:`dp_bound` for any
  mechanism at all, :func:`gdp_bound` for one whose trade-off curve is a Gaussian's.
* One run with many canaries, each put in by a coin: :func:`one_run_bound`.

Every bound holds with the stated confidence: a mechanism that keeps (ε, δ) gets a bound above ε
in at most that share of audits. A low bound proves nothing: the attack may be weak.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import beta, binom, norm

Floats = npt.NDArray[np.float64]
Counts = int | npt.NDArray[np.int64]

LARGEST = 100.0
"""No ε above this is told apart."""


def upper_limit(successes: Counts, trials: int, error: float) -> Floats:
    """One-sided Clopper–Pearson limit: at most ``error`` of all samples put it below the rate."""
    k = np.asarray(successes)
    with np.errstate(invalid="ignore"):
        limit = beta.ppf(1.0 - error, k + 1, trials - k)
    return np.asarray(np.where(k >= trials, 1.0, limit), dtype=np.float64)


def interval(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Two-sided Clopper–Pearson interval of a rate."""
    error = (1.0 - confidence) / 2
    low = 1.0 - float(upper_limit(trials - successes, trials, error))
    return low, float(upper_limit(successes, trials, error))


@dataclass(frozen=True)
class Outcomes:
    """An attack with a fixed threshold, on runs that did not choose it."""

    with_canary: int
    """Runs that had the canary."""
    missed: int
    """Of these, how many the attack says had none."""
    without_canary: int
    """Runs that had not."""
    alarms: int
    """Of these, how many the attack says had one."""

    def limits(self, confidence: float) -> tuple[Floats, Floats]:
        """(largest miss rate, largest false alarm rate), both true with ``confidence``."""
        error = (1.0 - confidence) / 2  # shared between the two (Bonferroni)
        return (
            upper_limit(self.missed, self.with_canary, error),
            upper_limit(self.alarms, self.without_canary, error),
        )


def dp_bound(outcomes: Outcomes, delta: float, confidence: float) -> float:
    """Lower bound on ε at ``delta``, whatever the mechanism (Nasr et al. 2021, §2; 2023, §4).

    Of an (ε, δ)-DP mechanism every attack has 1 − miss ≤ e^ε·alarm + δ, and the same with the
    two swapped (Kairouz et al. 2015). Assumed: the runs are independent, and the threshold does
    not depend on them. With n judged runs of a kind it never exceeds about log(n / 4).
    """
    return float(_dp(*outcomes.limits(confidence), delta))


def _dp(miss: Floats, alarm: Floats, delta: float) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.log(np.maximum(1.0 - miss - delta, 0.0) / alarm)
        other = np.log(np.maximum(1.0 - alarm - delta, 0.0) / miss)
    return np.clip(np.fmax(one, other), 0.0, LARGEST)


def gdp_bound(outcomes: Outcomes, confidence: float) -> float:
    """Lower bound on μ: no μ'-GDP mechanism with μ' < μ lets an attack be this good.

    Of a μ-GDP mechanism every attack has Φ⁻¹(1 − miss) − Φ⁻¹(alarm) ≤ μ (Dong et al. 2019,
    §2.1–2.2; Nasr et al. 2023, §5). T full-batch Gaussian steps of noise multiplier σ are
    √T/σ-GDP exactly, so for a trainer that *claims* to be these, a bound above √T/σ refutes the
    claim. Beyond :func:`dp_bound`'s assumptions: read as an ε (:func:`epsilon_of_mu`), it is
    that of a Gaussian mechanism. A mechanism of another kind may have a smaller one.
    """
    return float(_gdp(*outcomes.limits(confidence)))


def _gdp(miss: Floats, alarm: Floats) -> Floats:
    return np.maximum(np.asarray(norm.isf(miss) - norm.ppf(alarm), dtype=np.float64), 0.0)


def delta_of_mu(mu: float, epsilon: float) -> float:
    """δ(ε) of a μ-GDP mechanism (Dong et al. 2019, Corollary 2.13); 0 for μ = 0."""
    if mu <= 0:
        return 0.0
    tail = math.exp(epsilon + float(norm.logcdf(-epsilon / mu - mu / 2)))
    return max(0.0, float(norm.cdf(-epsilon / mu + mu / 2)) - tail)


def epsilon_of_mu(mu: float, delta: float) -> float:
    """The smallest ε at which a μ-GDP mechanism is (ε, ``delta``)-DP; at most ``LARGEST``."""
    if delta_of_mu(mu, 0.0) <= delta:
        return 0.0
    if delta_of_mu(mu, LARGEST) > delta:
        return LARGEST
    return float(brentq(lambda e: delta_of_mu(mu, e) - delta, 0.0, LARGEST, xtol=1e-9))


@dataclass(frozen=True)
class Audit:
    """What the scores of many runs say about ε at ``delta``, each with ``confidence``."""

    epsilon: float
    """By :func:`dp_bound`: no assumption about the mechanism."""
    mu: float
    """By :func:`gdp_bound`."""
    epsilon_gdp: float
    """μ as an ε: for a Gaussian mechanism."""
    delta: float
    confidence: float
    runs: int
    """Runs of each kind, those that chose the thresholds included."""


def audit(without: Floats, with_canary: Floats, *, delta: float, confidence: float) -> Audit:
    """Bounds from scores that are larger, if anything, where the canary was in.

    The first half of each kind chooses a threshold for each bound, the second half is judged by
    it: a threshold that has seen its own runs would promise too much.
    """
    a, b = len(without) // 2, len(with_canary) // 2

    def judged(bound: Callable[[Floats, Floats], Floats]) -> Outcomes:
        threshold = _best(without[:a], with_canary[:b], bound, confidence)
        return _outcomes(without[a:], with_canary[b:], threshold)

    mu = gdp_bound(judged(_gdp), confidence)
    return Audit(
        epsilon=dp_bound(judged(lambda m, f: _dp(m, f, delta)), delta, confidence),
        mu=mu,
        epsilon_gdp=epsilon_of_mu(mu, delta),
        delta=delta,
        confidence=confidence,
        runs=min(len(without), len(with_canary)),
    )


def _outcomes(without: Floats, with_canary: Floats, threshold: float) -> Outcomes:
    return Outcomes(
        with_canary=len(with_canary),
        missed=int((with_canary < threshold).sum()),
        without_canary=len(without),
        alarms=int((without >= threshold).sum()),
    )


def _best(
    without: Floats,
    with_canary: Floats,
    bound: Callable[[Floats, Floats], Floats],
    confidence: float,
) -> float:
    """The threshold with the largest bound; the middle one where several are equal."""
    seen = np.unique(np.concatenate([without, with_canary]))
    candidates = np.concatenate([seen, (seen[1:] + seen[:-1]) / 2])
    candidates.sort()
    miss = np.searchsorted(np.sort(with_canary), candidates)
    alarm = len(without) - np.searchsorted(np.sort(without), candidates)
    error = (1.0 - confidence) / 2
    values = bound(
        upper_limit(miss, len(with_canary), error), upper_limit(alarm, len(without), error)
    )
    equal = candidates[values >= values.max() - 1e-12]
    # Midway between the two kinds of score where they do not overlap, not at the edge of one.
    return float(equal[0] + equal[-1]) / 2 if len(equal) > 1 else float(equal[0])


def one_run_p_value(
    canaries: int, guesses: int, correct: int, epsilon: float, delta: float
) -> float:
    """At most how likely ``correct`` or more guesses are right under an (ε, δ)-DP mechanism.

    Steinke, Nasr, Jagielski 2023, Theorem 5.2 (and the code of appendix D): of ``canaries``
    examples each is in or out by a fair coin of its own, one output is seen, ``guesses`` of the
    coins are guessed and the others passed over. Assumed: the number of guesses was fixed
    beforehand, and the examples differ in nothing but their coins.
    """
    right = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    if correct == 0 or delta == 0:
        return min(1.0, tail)
    # P[v > W ≥ v − i] for i = 1 … v, W ~ Binomial(guesses, right).
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, right))
    worst = float((2.0 * below / np.arange(1, correct + 1)).max())
    return min(1.0, tail + worst * canaries * delta)


def one_run_bound(
    canaries: int, guesses: int, correct: int, *, delta: float, confidence: float
) -> float:
    """The largest ε that ``correct`` right ones of ``guesses`` refute; 0 if they refute none."""
    error = 1.0 - confidence

    def excess(epsilon: float) -> float:
        return one_run_p_value(canaries, guesses, correct, epsilon, delta) - error

    if excess(0.0) >= 0:
        return 0.0
    low, high = 0.0, LARGEST
    if excess(high) < 0:
        return LARGEST
    while high - low > 1e-6:  # p grows with ε
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return low


def advantage_limit(epsilon: float, delta: float) -> float:
    """The largest TPR − FPR of any membership attack on (ε, δ)-DP: (e^ε − 1 + 2δ)/(e^ε + 1).

    Humphries et al. 2020, Theorem 3.1 with δ; from Kairouz et al. 2015.
    """
    small = math.exp(-epsilon)  # e^ε itself may be too large
    return min(1.0, (1.0 - small + 2.0 * delta * small) / (1.0 + small))


def largest_tpr(epsilon: float, delta: float, fpr: Floats) -> Floats:
    """The largest TPR at each FPR of any attack on (ε, δ)-DP (Kairouz et al. 2015)."""
    if epsilon > 700:  # e^ε is beyond float64
        return np.ones_like(fpr)
    one = math.exp(epsilon) * fpr + delta
    other = 1.0 - math.exp(-epsilon) * (1.0 - delta - fpr)
    return cast(Floats, np.minimum(1.0, np.minimum(one, other)))

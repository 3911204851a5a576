"""What a data set has spent over many runs, and whether one more fits: a Rényi privacy filter.

Later runs are chosen by people who have seen the models of earlier ones. The accountants of
:mod:`common.privacy.accounting` compose mechanisms whose parameters were fixed beforehand; for
parameters that depend on earlier outputs they prove nothing. A Rényi filter does: at one order α
fixed in advance, Rényi divergences add up under fully adaptive composition, and stopping before
the sum passes a bound keeps the (ε, δ) that belongs to it (Feldman and Zrnic, *Individual Privacy
Accounting via a Rényi Filter*, 2021, Theorem 3.1; Lécuyer 2021). The price against the numerical
accountants is about a tenth of ε near the total, for which the order is chosen, and more where
little is spent: whatever two runs cost, the conversion from α to ε adds its constant (3.1 for a
total of 8 at δ = 1e-4).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from common.privacy.accounting import Event

ORDERS: tuple[float, ...] = (
    *(1.0 + k / 10 for k in range(1, 100)), *range(11, 65), 96, 128, 256, 512
)  # fmt: skip
"""The orders among which a ledger fixes one."""


def renyi(events: Sequence[Event], order: float, *, pure: float = 0.0) -> float:
    """Rényi divergence of ``order`` of all ``events``, and of mechanisms of ``pure`` ε in all.

    A mechanism of pure ε has at most min(ε, α ε² / 2) (Bun and Steinke 2016, Proposition 3.3).
    """
    total = sum(
        _step(e.noise_multiplier, e.sampling_rate, order) * e.steps for e in events if e.steps
    )
    return total + min(pure, order * pure**2 / 2)


def epsilon_at(divergence: float, order: float, delta: float) -> float:
    """ε at ``delta`` of a Rényi divergence of ``order``; 0 where nothing was spent.

    Canonne, Kamath and Steinke 2020, Proposition 12; infinite for an infinite divergence.
    """
    if divergence == 0.0:
        return 0.0
    return max(0.0, divergence + _conversion(order, delta))


def best_order(events: Sequence[Event], epsilon: float, delta: float) -> float:
    """The order at which most runs like ``events`` fit into (``epsilon``, ``delta``).

    To be fixed before the first of them: a filter's order may not follow what was seen. For
    DP-SGD the order of a plain Gaussian costs a few per cent more than the run's own best.
    """
    if math.isinf(epsilon):
        return min(ORDERS, key=lambda a: renyi(events, a) + _conversion(a, delta))
    return max(
        ORDERS, key=lambda a: (epsilon - _conversion(a, delta)) / max(renyi(events, a), 1e-12)
    )


def _conversion(order: float, delta: float) -> float:
    return math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


@lru_cache(maxsize=65_536)
def _step(sigma: float, rate: float, order: float) -> float:
    from opacus.accountants.analysis.rdp import compute_rdp

    unsampled = order / 2 / sigma / sigma  # of the Gaussian alone: sampling only helps
    if rate == 1.0 or not 0.01 <= sigma <= 1e4:  # beyond, Opacus's series may not end
        return unsampled
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=[order])
        sampled = float(np.asarray(value).reshape(-1)[0])
    except (ArithmeticError, ValueError):  # noise beyond what its series can compute
        return unsampled
    return unsampled if math.isnan(sampled) else min(max(sampled, 0.0), unsampled)

"""ε of a composition of Poisson-subsampled Gaussian steps, by two accountants that must agree.

1. Opacus PRV (Gopi, Lee, Wutschitz, *Numerical Composition of Differential Privacy*, 2021):
   its upper bound.
2. dp-accounting PLD (Doroshenko et al., *Connect the Dots*, 2022): pessimistic discretisation.

Both are upper bounds for add-or-remove-one neighbouring data sets; the larger is shown.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from common.errors import PrivacyError

AGREEMENT = 0.02
"""Largest relative difference of the accountants at which a figure is shown without a warning."""

LARGE = 100.0
"""Above this ε (by RDP) only RDP's bound is computed."""

_Key = tuple[tuple[float, float, int], ...]

_PRV_ERROR = 0.01
"""Additive error of PRV's ε; its upper bound includes it, so small targets get a finer mesh."""


@dataclass(frozen=True)
class Event:
    """``steps`` Gaussian steps of ``noise_multiplier`` σ on Poisson batches at ``sampling_rate`` q.

    σ is the noise's standard deviation divided by the clipping norm.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        ok = (
            self.noise_multiplier > 0
            and math.isfinite(self.noise_multiplier)
            and 0 < self.sampling_rate <= 1
            and self.steps >= 0
        )
        if not ok:
            raise PrivacyError(
                f"{self} cannot be accounted for",
                "use a noise multiplier > 0, a sampling rate in (0, 1] and steps ≥ 0",
            )


@dataclass(frozen=True)
class Epsilon:
    """ε by both accountants."""

    prv: float
    pld: float

    @property
    def value(self) -> float:
        """The larger of the two: the figure to show and to hold against a budget."""
        return max(self.prv, self.pld)

    @property
    def agree(self) -> bool:
        """Whether the two differ by no more than 2 % (or by PRV's own additive error)."""
        allowed = max(AGREEMENT * self.value, 1.5 * _PRV_ERROR)
        return abs(self.prv - self.pld) <= allowed


def epsilon_of(events: Sequence[Event], delta: float) -> Epsilon:
    """ε of all ``events`` together at ``delta``; 0 when there are no steps."""
    key = tuple(sorted((e.noise_multiplier, e.sampling_rate, e.steps) for e in events if e.steps))
    return _epsilon(key, delta) if key else Epsilon(0.0, 0.0)


@lru_cache(maxsize=4096)
def _epsilon(key: _Key, delta: float) -> Epsilon:
    rough = _rdp(key, delta)
    if not rough <= LARGE:
        # Here the numerical accountants need gigabytes or overflow. RDP's bound is loose, but a
        # bound, and an ε of hundreds promises nothing anyway.
        return Epsilon(prv=rough, pld=rough)
    return Epsilon(prv=_prv(key, delta), pld=_pld(key, delta))


def _rdp(key: _Key, delta: float) -> float:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = list(key)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(accountant.get_epsilon(delta))
    return math.inf if math.isnan(value) else value


def _prv(key: _Key, delta: float) -> float:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = list(key)
    with np.errstate(all="ignore"):  # it takes logarithms of zero on purpose
        return float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))


def _pld(key: _Key, delta: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(value_discretization_interval=1e-3)
    for sigma, rate, steps in key:
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        step = gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=1024)
def calibrate(*, epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The smallest noise multiplier (to 0.1 %) whose ``steps`` steps cost at most ``epsilon``.

    Both accountants' figures are at most ``epsilon`` for what is returned: the promise is for
    the whole training, so ``steps`` counts every step of every round.

    Raises :class:`~common.errors.PrivacyError` if no noise multiplier up to 10,000 suffices.
    """
    if steps < 1 or not 0 < sampling_rate <= 1 or epsilon <= 0 or not 0 < delta < 1:
        raise PrivacyError(
            f"cannot calibrate ε={epsilon}, δ={delta} for {steps} steps at q={sampling_rate}",
            "use ε > 0, 0 < δ < 1, 0 < q ≤ 1 and at least one step",
        )

    def by(accountant: Callable[[_Key, float], float]) -> Callable[[float], float]:
        return lambda sigma: accountant(((sigma, sampling_rate, steps),), delta)

    # RDP takes no time and is above the truth, PLD is quick and close to it, PRV is slow where ε
    # is large: each narrows the range for the next.
    high = 0.1
    while by(_rdp)(high) > epsilon:
        high *= 2
        if high > 10_000:
            raise _unreachable(epsilon, delta)
    low, high = _bisect(by(_rdp), epsilon, high / 2, high)
    low = 0.7 * high
    while by(_pld)(low) <= epsilon:
        low *= 0.7
    low, high = _bisect(by(_pld), epsilon, low, high)

    def both(sigma: float) -> float:
        return epsilon_of([Event(sigma, sampling_rate, steps)], delta).value

    for _ in range(40):
        if both(high) <= epsilon:
            return _bisect(both, epsilon, low, high)[1]
        low, high = high, 1.01 * high
    raise _unreachable(epsilon, delta)


def _bisect(
    cost: Callable[[float], float], epsilon: float, low: float, high: float
) -> tuple[float, float]:
    """Narrow [low, high], whose high end costs at most ``epsilon``, to 0.1 %."""
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= epsilon else (middle, high)
    return low, high


def _unreachable(epsilon: float, delta: float) -> PrivacyError:
    return PrivacyError(
        f"no noise multiplier reaches ε={epsilon} at δ={delta}",
        "raise epsilon; ε below about 0.02 is finer than the accountants' own error",
    )

"""ε of a composition of Poisson-subsampled Gaussian steps, by two accountants that must agree.

1. Opacus PRV (Gopi, Lee, Wutschitz, *Numerical Composition of Differential Privacy*, 2021):
   its upper bound.
2. dp-accounting PLD (Doroshenko et al., *Connect the Dots*, 2022): pessimistic discretisation.

Both are upper bounds for add-or-remove-one neighbouring data sets; the larger is shown. They
compose mechanisms whose parameters were fixed before the first of them ran, as those of one
run's plan are. For runs that follow one another see :mod:`common.privacy.filter`.

Where every unit is in every batch (q = 1) the composition is known exactly: n_i Gaussian steps of
noise multipliers σ_i are one Gaussian step of multiplier 1/μ, μ² = Σ n_i/σ_i² (Dong, Roth, Su,
*Gaussian Differential Privacy*, 2019, Corollary 3.3: G_μ1 ⊗ G_μ2 = G_√(μ1²+μ2²)). Both accountants
are then asked about that one step: the same promise, for a few milliseconds instead of a
convolution for each kind of step, and with less of their own error. Its exact ε is known, too
(Balle and Wang 2018, Theorem 8); the tests hold both figures against it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import PrivacyError
from common.privacy.subsampled import divergences

AGREEMENT = 0.02
"""Largest relative difference of the accountants at which a figure is shown without a warning."""

LARGE = 100.0
"""Above this ε (by RDP) only RDP's bound is computed."""

_Key = tuple[tuple[float, float, int], ...]

_DOMAIN_ORDERS: tuple[float, ...] = (*(1 + x / 10 for x in range(1, 100)), *range(12, 64))
"""Opacus's own."""

_WHOLE_ORDERS: tuple[float, ...] = (*range(2, 64), 80, 128, 256, 512)

_MOST_NOISE = 10_000.0
"""The largest noise multiplier that is tried."""

_WITHIN = 1.001
"""How close a calibrated noise multiplier is to the smallest."""

_ROUNDED = 1 - 1e-14
"""Of the noise of steps that are taken as one, so that rounding (some 2^-53 an operation) never
makes it larger than it is."""

_MESH = 1e-3
"""PLD's mesh of privacy losses; it rounds so that ε is never below the truth."""

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


def group_event(event: Event, size: int) -> Event:
    """What ``event``, a promise for one image, costs somebody with ``size`` images.

    Together they shift a step's sum by at most ``size`` clipping norms, and only when at least
    one of them is in the batch: no worse than one sample at ``size`` times the sensitivity,
    sampled at 1 - (1 - q)^size.
    """
    rate = min(
        1.0,
        -math.expm1(size * math.log1p(-event.sampling_rate)) if event.sampling_rate < 1 else 1.0,
    )
    return Event(event.noise_multiplier / size, rate, event.steps)


@dataclass(frozen=True)
class Epsilon:
    """ε by both accountants; where it is too large for them, RDP's bound as both."""

    prv: float
    pld: float
    by_rdp: bool = False

    @property
    def value(self) -> float:
        """The larger of the two: the figure to show and to hold against a budget."""
        return max(self.prv, self.pld)

    @property
    def accountant(self) -> str:
        """Which accountant gave :attr:`value`: ``prv``, ``pld`` or ``rdp``."""
        return "rdp" if self.by_rdp else "prv" if self.prv >= self.pld else "pld"

    @property
    def agree(self) -> bool:
        """Whether the two differ by no more than 2 % (or by PRV's own additive error)."""
        allowed = max(AGREEMENT * self.value, 1.5 * _PRV_ERROR)
        return abs(self.prv - self.pld) <= allowed


def epsilon_of(events: Sequence[Event], delta: float, *, pure: float = 0.0) -> Epsilon:
    """ε of all ``events`` together at ``delta``; 0 when there are no steps.

    ``pure``: summed ε of mechanisms with δ = 0 beside them. It is added as it is (basic
    composition), so the events' parameters may depend on those mechanisms' outputs.
    """
    key = _key(events)
    of_events = _epsilon(key, delta) if key else Epsilon(0.0, 0.0)
    return replace(of_events, prv=of_events.prv + pure, pld=of_events.pld + pure)


def _key(events: Sequence[Event]) -> _Key:
    """What both accountants are asked about: each mechanism once, and Gaussians alone as one."""
    steps: dict[tuple[float, float], int] = {}
    for e in events:
        if e.steps:
            mechanism = (e.noise_multiplier, e.sampling_rate)
            steps[mechanism] = steps.get(mechanism, 0) + e.steps
    key = tuple(sorted((sigma, rate, n) for (sigma, rate), n in steps.items()))
    if all(rate == 1 for _, rate, _ in key) and sum(n for _, _, n in key) > 1:
        least = key[0][0]  # in whose multiples no square overflows
        mu = math.sqrt(math.fsum(n * (least / sigma) ** 2 for sigma, _, n in key))
        return ((_ROUNDED * least / mu, 1.0, 1),)
    return key


@lru_cache(maxsize=4096)
def _epsilon(key: _Key, delta: float) -> Epsilon:
    rough = _rough(key, delta)
    if not rough <= LARGE:
        # Here the numerical accountants need gigabytes or overflow. RDP's bound is loose, but a
        # bound, and an ε of hundreds promises nothing anyway.
        return Epsilon(prv=rough, pld=rough, by_rdp=True)
    return Epsilon(prv=_prv(key, delta), pld=_pld(key, delta))


def _rough(key: _Key, delta: float) -> float:
    """RDP's bound by whole orders only, which are quick to compute."""
    return _rdp(key, delta, _WHOLE_ORDERS)


def _rdp(key: _Key, delta: float, orders: tuple[float, ...]) -> float:
    """RDP's bound (Balle et al. 2020, Theorem 21); infinite where no order can be computed."""
    a = np.asarray(orders, dtype=np.float64)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = [steps * _divergences(sigma, rate, orders) for sigma, rate, steps in key]
        found = sum(each) - (math.log(delta) + np.log(a)) / (a - 1) + np.log1p(-1 / a)
        return math.inf if np.isnan(found).all() else float(np.nanmin(found))


@lru_cache(maxsize=1024)
def _divergences(sigma: float, rate: float, orders: tuple[float, ...]) -> NDArray[np.float64]:
    return divergences(sigma, rate, orders)


@lru_cache(maxsize=4096)
def _prv(key: _Key, delta: float) -> float:
    accountant = _quick_prv()()
    accountant.history = list(key)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes logarithms of zero on purpose, and few orders
        try:
            return float(accountant.get_epsilon(delta, eps_error=_PRV_ERROR))
        except ValueError:
            raise PrivacyError(
                f"δ={delta} is too small for the accountants",
                "use a larger delta: somewhat below 1 / images is small enough",
            ) from None


@lru_cache(maxsize=1)
def _quick_prv() -> Any:
    """Opacus's accountant, as a class; its bound on the domain, the same, by a quicker series."""
    from opacus.accountants import PRVAccountant
    from opacus.accountants.analysis.prv import Domain

    class Quick(PRVAccountant):  # type: ignore[misc]
        def _get_domain(
            self, prvs: Any, num_self_compositions: list[int], eps_error: float, delta_error: float
        ) -> Any:
            """Remark 5.6 of Gopi et al., and the mesh of Opacus."""
            steps = sum(num_self_compositions)
            reach = _rdp(tuple(self.history), delta_error / 4, _DOMAIN_ORDERS)
            for sigma, rate, _ in self.history:
                once = _rdp(((sigma, rate, 1),), delta_error / (8 * steps), _DOMAIN_ORDERS)
                reach = max(reach, once)
            reach = max(reach, eps_error) + 3
            mesh = eps_error / np.sqrt(steps * np.log(12 / delta_error) / 2)
            return Domain.create_aligned(-reach, reach, mesh)

    return Quick


def _pld(key: _Key, delta: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    mesh = _MESH
    if len(key) == 1 and key[0][1:] == (1.0, 1):
        # One Gaussian step: its losses spread over some μ = 1/σ, and nothing adds up their errors.
        mesh = min(max(1 / key[0][0] / 150, _MESH), 20 * _MESH)
    accountant = PLDAccountant(value_discretization_interval=mesh)
    for sigma, rate, steps in key:
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        step = gaussian if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, gaussian)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps))
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=1024)
def calibrate(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    beside: tuple[Event, ...] = (),
) -> float:
    """The smallest noise multiplier (to 0.1 %) whose ``steps`` steps cost at most ``epsilon``.

    Both accountants' figures are at most ``epsilon`` for what is returned: the promise is for
    the whole training, so ``steps`` counts every step of every round. ``beside``: what else the
    same images are used for within ``epsilon``, its noise fixed already.

    Raises :class:`~common.errors.PrivacyError` if no noise multiplier up to 10,000 suffices.
    """
    if steps < 1 or not 0 < sampling_rate <= 1 or epsilon <= 0 or not 0 < delta < 1:
        raise PrivacyError(
            f"cannot calibrate ε={epsilon}, δ={delta} for {steps} steps at q={sampling_rate}",
            "use ε > 0, 0 < δ < 1, 0 < q ≤ 1 and at least one step",
        )

    def key(sigma: float) -> _Key:
        return _key([Event(sigma, sampling_rate, steps), *beside])

    def rough(sigma: float) -> float:
        return _rough(key(sigma), delta)

    def prv(sigma: float) -> float:
        return bound if (bound := rough(sigma)) > LARGE else _prv(key(sigma), delta)

    # RDP takes no time and is above the truth; PRV is the larger of the other two nearly always,
    # and the quicker one. What it finds is held against both.
    high = 0.1
    while rough(high) > epsilon:
        high *= 2
        if high > _MOST_NOISE:
            raise _unreachable(epsilon, delta)
    near = _smallest(rough, epsilon, high, within=1.02)
    found = _smallest(prv, epsilon, near, within=_WITHIN, slope=_slope(rough, near))

    def both(sigma: float) -> float:
        return _epsilon(key(sigma), delta).value

    if found < math.inf and both(found) > epsilon:
        found = _smallest(both, epsilon, found, within=_WITHIN)
    if found == math.inf:
        raise _unreachable(epsilon, delta)
    return found


def _smallest(
    cost: Callable[[float], float],
    epsilon: float,
    start: float,
    *,
    within: float,
    slope: float = -1.0,
) -> float:
    """The smallest σ, to a ratio of ``within``, at which ``cost`` is at most ``epsilon``.

    Infinite where it is not at most ``epsilon`` up to ``_MOST_NOISE``.
    Log ε is nearly linear in log σ: a secant lands close, and a point just beyond it on the other
    side closes the bracket. Every sixth point is the middle, so that it always ends. ``slope``: of
    log ε over log σ, as far as it is known before.
    """
    low, high = -math.inf, math.inf  # log σ: too little, enough
    points: list[tuple[float, float]] = []  # (log σ, log ε)
    x, beyond, most = math.log(start), 0.4 * math.log(within), math.log(_MOST_NOISE)
    for turn in range(1, 200):
        value = cost(math.exp(x))
        enough = value <= epsilon
        low, high = (low, x) if enough else (x, high)
        if high - low <= math.log(within) or low >= most:
            break
        if 0 < value < math.inf:
            points = [*points[-1:], (x, math.log(value))]
        if turn % 6 == 0 and math.isfinite(high - low):
            x = (low + high) / 2
            continue
        root = _root(points, math.log(epsilon), slope) if points else x + (-0.7 if enough else 0.7)
        guess = root - beyond if enough else root + beyond
        if low < guess < high:
            x = guess
        elif math.isfinite(high - low):
            x = (low + high) / 2
        else:
            x += -8 * beyond if enough else 8 * beyond
        x = min(x, most)
    return math.exp(high)


def _slope(cost: Callable[[float], float], sigma: float) -> float:
    """Of log ``cost`` over log σ just below ``sigma``; −1 where there is no finite one."""
    here, below = cost(sigma), cost(0.9 * sigma)
    return math.log(here / below) / -math.log(0.9) if 0 < here < below < math.inf else -1.0


def _root(points: Sequence[tuple[float, float]], y: float, slope: float) -> float:
    """Where the line through the last points is at ``y``; of ``slope`` where there is one only."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    through = (y1 - y0) / (x1 - x0) if x1 != x0 else slope
    return x1 + (y - y1) / min(through, -0.1)


def _unreachable(epsilon: float, delta: float) -> PrivacyError:
    return PrivacyError(
        f"no noise multiplier reaches ε={epsilon} at δ={delta}",
        "raise epsilon; ε below about 0.02 is finer than the accountants' own error",
    )

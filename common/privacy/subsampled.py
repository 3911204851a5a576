"""Rényi divergences of one Gaussian step on a Poisson batch, for many orders at once.

The series of Mironov, Talwar, Zhang, *Rényi Differential Privacy of the Sampled Gaussian
Mechanism*, 2019, section 3.3, the same as in ``opacus.accountants.analysis.rdp``: that one adds
term by term in Python (up to 16,000 of them for an order near 1, most of the time of a small
private run), this one adds arrays. It bounds where the accountants look; what the ledger sums is
Opacus's own. The tests hold the two against each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, gammasgn, log_ndtr

_END = -30.0
"""Log of the terms at which the series of a fractional order ends, as in Opacus."""
_FIRST, _MOST = 256, 1 << 17
"""Terms that are computed at first, and at most."""


def divergences(sigma: float, rate: float, orders: Sequence[float]) -> NDArray[np.float64]:
    """Rényi divergence of each of ``orders`` (> 1) of one step, as float64 (len(orders),).

    The step: Gaussian noise of ``sigma`` > 0 clipping norms on a Poisson batch at ``rate`` in
    (0, 1]. nan where the series cannot be computed in float64; a caller takes another bound then.
    """
    if rate == 1.0:
        return np.asarray(orders, dtype=np.float64) / 2 / sigma / sigma
    with np.errstate(all="ignore"):
        return np.array([_log_moment(sigma, rate, a) / (a - 1) for a in orders])


def _log_moment(sigma: float, rate: float, order: float) -> float:
    """log A of ``order``: of a sum of binomial terms, or of the two parts of an integral."""
    if float(order).is_integer():
        i = np.arange(order + 1)
        log_terms = _log_binomial(order, i) + i * math.log(rate) + (order - i) * math.log1p(-rate)
        return _log_sum(log_terms + (i * i - i) / (2 * sigma * sigma))
    count = _FIRST
    while count <= _MOST:
        i = np.arange(count, dtype=np.float64)
        below, above = _parts(sigma, rate, order, i)
        ended = np.flatnonzero(np.maximum(below, above) < _END)
        if len(ended):
            last = ended[0] + 1
            sign = gammasgn(order - i[:last] + 1)
            both = _log_sum(below[:last], sign), _log_sum(above[:last], sign)
            return float(np.logaddexp(*both))
        count *= 4
    return math.nan


def _parts(
    sigma: float, rate: float, order: float, i: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logarithms of the terms of the integrals below and above z0, without their signs."""
    j = order - i
    z0 = sigma * sigma * math.log(1 / rate - 1) + 0.5
    coefficient = _log_binomial(order, i)
    p, q = math.log(rate), math.log1p(-rate)
    tail0 = log_ndtr((z0 - i) / sigma)
    tail1 = log_ndtr((j - z0) / sigma)
    wide = 2 * sigma * sigma
    below = coefficient + i * p + j * q + (i * i - i) / wide + tail0
    above = coefficient + j * p + i * q + (j * j - j) / wide + tail1
    return below, above


def _log_binomial(order: float, i: NDArray[np.float64]) -> NDArray[np.float64]:
    value: NDArray[np.float64] = gammaln(order + 1) - gammaln(i + 1) - gammaln(order - i + 1)
    return value


def _log_sum(logs: NDArray[np.float64], sign: NDArray[np.float64] | float = 1.0) -> float:
    """log Σ sign · exp(logs); nan where the sum is not above 0."""
    top = float(np.max(logs))
    if not math.isfinite(top):
        return math.nan if math.isnan(top) or top > 0 else -math.inf
    total = float(np.sum(sign * np.exp(logs - top)))
    return top + math.log(total) if total > 0 else math.nan

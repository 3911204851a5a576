"""The quick series of Rényi divergences against Opacus's own, term by term."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.rdp import compute_rdp

from common.privacy import accounting
from common.privacy.filter import ORDERS
from common.privacy.subsampled import divergences

SOME = (*ORDERS[::7], 2.0, 12.0, 256.0)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3, 0.9, 1.0])
def test_divergences_are_those_of_opacus(sigma: float, rate: float) -> None:
    found = divergences(sigma, rate, SOME)
    for order, value in zip(SOME, found, strict=True):
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs = float(
                    compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=[order])[0]
                )
            except ValueError:  # its series fell below zero
                theirs = math.nan
        if not math.isnan(theirs):  # both end their series at terms of e^-30, near order 1
            assert value == pytest.approx(theirs, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(1.0, 0.05, 300), (0.8, 0.3, 12), (2.0, 0.01, 1000), (4.0, 1.0, 1)]
)
def test_the_prv_accountants_figure_is_opacus_own(sigma: float, rate: float, steps: int) -> None:
    theirs = PRVAccountant()
    theirs.history = [(sigma, rate, steps)]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = theirs.get_epsilon(1e-5, eps_error=accounting._PRV_ERROR)
    assert accounting._prv(((sigma, rate, steps),), 1e-5) == pytest.approx(expected, rel=1e-6)


def test_noise_beyond_all_measure_gives_no_number_that_is_too_small() -> None:
    for sigma in (1e-3, 1e3):
        found = divergences(sigma, 0.01, ORDERS)
        assert all(math.isnan(v) or v >= -1e-9 for v in found)

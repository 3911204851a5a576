"""Against whom which ε holds, where noise is shared among hospitals.

One mechanism, three observers of a training image's run (:mod:`common.privacy.distributed`):

* ``outside``: server, coordinator and everybody who sees models. They know nobody's noise, so
  every share in a sum counts: min-cohort of them at least.
* ``colluders``: the same with up to ``tolerated-colluders`` hospitals, each of which knows its own
  share. A curious hospital by itself is one. This is the ε that the ledger charges.
* ``broken``: whoever sees one hospital's vector by itself, which secure aggregation is there to
  prevent. Only that hospital's share of the noise is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.privacy.accounting import Event, epsilon_of
from common.privacy.plan import COUNT_EPSILON, Promise, shares_of, statistic_noise, step_noise


@dataclass(frozen=True)
class Against:
    """ε at the promise's δ, for an image that trains, over all rounds of the plan."""

    outside: float
    colluders: float
    broken: float


def against(promise: Promise) -> Against:
    """Who sees how much in a run of server steps, its spare rounds and announced counts included.

    Without shared noise the three are one. Where ε is beyond 100 it is RDP's bound.
    """
    sigma = step_noise(promise)
    shares = shares_of(promise, sigma, 1)

    def epsilon(noise_multiplier: float) -> float:
        share = noise_multiplier / sigma
        events = [Event(noise_multiplier, promise.sampling_rate, promise.steps)]
        events += [Event(share * statistic_noise(promise, n), 1.0, 1) for n in promise.statistics]
        return epsilon_of(events, promise.delta, pure=COUNT_EPSILON).value

    return Against(
        outside=epsilon(shares.in_sum(promise.min_cohort)),
        colluders=epsilon(shares.in_sum(promise.min_cohort, promise.colluders)),
        broken=epsilon(shares.against_a_break()),
    )

"""Federated evaluation at a hospital: is the candidate better than the base, on its own images?

The answer is two counts, and they leave in a sum over ``min-cohort`` hospitals or more, by the
same secure aggregation as an update would (:mod:`client_app.secagg`): also in a run that says
``secagg=false``, which is about the vectors. There is no answer in the clear.

Imports no torch until it is clear that there is something to compute.
"""

from __future__ import annotations

import numpy as np
from flwr.app import Context, RecordDict

from client_app import secagg
from client_app.admission import admit, check_size
from client_app.cohorts import Cohorts, JudgingRefusal
from client_app.hospital import Hospital
from common.aggregation import GAINED, JUDGE, LOST, terms_for
from common.errors import ConfigError
from common.messages import Comparison, Envelope


def answer_comparison(asked: Comparison, hospital: Hospital, context: Context) -> RecordDict:
    """This round's public keys; the two counts stay at the node, to be masked.

    Before anything is computed: ConfigError for a run that does not say that hospitals judge,
    VectorsRefusal where the policy does not allow it, JudgingRefusal for a request in the clear,
    a base that is not of this run, or too many candidates; Refusal for what secure aggregation
    refuses (another run, round, layout, parameters that are weaker than the policy, no roster).
    """
    c = hospital.config
    if c.mode != "vectors" or c.judged_by != "hospitals":
        raise ConfigError(
            "the server asked for a comparison of models in a run whose hospitals do not judge",
            "ask the coordinator for mode=vectors and judged-by=hospitals",
        )
    hospital.policy.vectors.check_evaluate()
    if not asked.invitation:
        raise JudgingRefusal(
            "judging-clear",
            "the server asked for this hospital's counts in the clear",
            "treat the server as hostile until this is explained: counts leave in sums only",
        )
    check_size(hospital, asked.current, asked.candidate)
    binding = admit(asked, hospital, context, purpose=JUDGE)
    assert binding is not None  # there is an invitation
    secagg.check_vector(
        binding, hospital, length=0, model_hash=asked.models, terms=terms_for(hospital.config)
    )
    Cohorts(hospital, asked.run, asked.base).check(asked.models)
    from client_app.tuning import compare

    gained, lost = compare(asked, hospital)
    most = c.max_examples
    message = secagg.advertise(
        context,
        hospital,
        binding,
        {GAINED: np.array([min(gained, most)]), LOST: np.array([min(lost, most)])},
        weight=1,
        model_hash=asked.models,
        subjects=(f"comparison {asked.models.hex()}",),
        base=asked.base,
    )
    return Envelope(message).to_record()

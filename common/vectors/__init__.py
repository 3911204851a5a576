"""Task vectors: what a hospital's fine-tuning changed, and how many of them make one model.

Pure: numpy only, no Flower, no torch, no clock but the time in a new vector, no state.

:class:`Base` is what is fine-tuned; :class:`TaskVector` what comes back, :class:`SignedVector`
and :class:`Withdrawal` how it travels; :class:`Limits` and :func:`check_fit` what is accepted;
:class:`Rule`, :class:`Contribution` and :func:`candidate` how vectors make a model,
:func:`merge_refusal` when they should not and :func:`ensemble` what then; :func:`choose_scale`,
:func:`evaluation_gate` and :func:`leave_one_out` what validation data say of it. The durable
store of bases and vectors is :mod:`server_app.registry`.
"""

from common.vectors.base import Base, apply_update, base_id
from common.vectors.candidate import FEWEST_SKEWED, candidate, ensemble, merge_refusal
from common.vectors.checks import Limits, Place, check_fit, newest
from common.vectors.envelope import SignedVector, Withdrawal
from common.vectors.errors import VectorError
from common.vectors.influence import Influence, InfluenceTable, leave_one_out
from common.vectors.rules import RULES, Contribution, Rule, server_step
from common.vectors.scale import (
    SCALES,
    Gate,
    GateResult,
    ScaleChoice,
    choose_scale,
    evaluation_gate,
    judge,
    margin,
    no_gate,
    pick_scale,
)
from common.vectors.vector import TaskVector, bucket_of, difference, new_serial, norm_of

__all__ = [
    "FEWEST_SKEWED",
    "RULES",
    "SCALES",
    "Base",
    "Contribution",
    "Gate",
    "GateResult",
    "Influence",
    "InfluenceTable",
    "Limits",
    "Place",
    "Rule",
    "ScaleChoice",
    "SignedVector",
    "TaskVector",
    "VectorError",
    "Withdrawal",
    "apply_update",
    "base_id",
    "bucket_of",
    "candidate",
    "check_fit",
    "choose_scale",
    "difference",
    "ensemble",
    "evaluation_gate",
    "judge",
    "leave_one_out",
    "margin",
    "merge_refusal",
    "new_serial",
    "newest",
    "no_gate",
    "norm_of",
    "pick_scale",
    "server_step",
]

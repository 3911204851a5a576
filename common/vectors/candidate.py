"""The model that a base and its vectors make, and when not to make one.

    θ' = θ + merge({j : k_j = 0}) + Σ_{j : k_j ≥ 1} 0.3 (1 + k_j)^−½ · w_j / W · τ_j

θ: the current base; τ_j, w_j: values and bucket of vector j; k_j: its staleness, the number of
bases published after the one that it was trained from; W: the sum of w_j over the stale vectors
only; merge: the rule, its scale included. So a single stale vector moves the model by
``server_step`` times itself, many of them by a step of at most 0.3 in the direction of their
mean, and neither takes weight from the fresh ones. Both sums run in the order of the serials.

To publish after every single arrival, use the mean with scale 0.3, which is ``server_step(0)``: a
full step for each arrival swings (44–90 % measured), this one stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from common.vectors.base import apply_update, is_floating
from common.vectors.errors import VectorError
from common.vectors.rules import Contribution, Rule, in_order, server_step, shares, weighted_sum
from common.vectors.tensors import Arrays
from common.vectors.vector import check_shapes

FEWEST_SKEWED = 3
"""Hospitals with different mixes of classes from which on merging was measured to help."""

_ENSEMBLE = (
    "use the softmax ensemble of the fine-tuned models (84 % where the merged model had 51 %)"
)


def candidate(
    weights: Arrays, contributions: Sequence[Contribution], rule: Rule
) -> dict[str, np.ndarray]:
    """The weights θ' of this module's formula, each entry in its own dtype, sorted by name.

    ``weights``: the current base's. Entries that are not floating (counters) stay as they are.
    No vectors: a copy of ``weights``. VectorError as :meth:`Rule.merge`, ``vector-shape`` for
    vectors that do not fit ``weights``, ``merge-overflow``.
    """
    given = in_order(contributions)
    for c in given[:1]:  # in_order has compared the others with it
        check_shapes(
            {k: tuple(v.shape) for k, v in weights.items() if is_floating(v)},
            {k: tuple(v.shape) for k, v in c.values.items()},
        )
    fresh = [c for c in given if c.staleness == 0]
    stale = [c for c in given if c.staleness > 0]
    update = rule.merge(fresh) if fresh else {}
    if stale:
        steps = [server_step(c.staleness) for c in stale]
        factors = [s * share for s, share in zip(steps, shares(stale), strict=True)]
        moved = weighted_sum(stale, factors)
        update = {k: update[k] + v for k, v in moved.items()} if update else moved
    return apply_update(weights, update)


def merge_refusal(*, pretrained: bool, hospitals: int, skewed: bool) -> VectorError | None:
    """Why these vectors are better not merged (``merge-base``, ``merge-few``); None: merge.

    ``hospitals``: how many different ones the vectors are of. ``skewed``: whether their mixes
    of classes differ, or may differ. The remedy names the ensemble (:func:`ensemble`).
    """
    if not pretrained:
        return VectorError(
            "merge-base",
            "the base is a random initialisation: vectors trained from it do not add up",
            f"publish a pre-trained base, or a fedavg run's model; or {_ENSEMBLE}",
        )
    if skewed and hospitals < FEWEST_SKEWED:
        return VectorError(
            "merge-few",
            f"vectors of {hospitals} hospitals with different mixes of classes: merged, they "
            "were measured to fall below the base",
            f"wait for {FEWEST_SKEWED} hospitals; or {_ENSEMBLE}",
        )
    return None


def ensemble(logits: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted mean of the softmax probabilities: (N, classes) float64, rows summing to 1.

    ``logits``: each fine-tuned model's outputs, (N, classes), by the serial of its vector;
    ``weights``: the same serials' buckets. Summed in the order of the serials.
    VectorError (``merge-empty``, ``merge-weight``, ``vector-shape``).
    """
    if not logits:
        raise VectorError("merge-empty", "there is no model to ask", "wait for vectors")
    total = sum(weights[serial] for serial in sorted(logits) if serial in weights)
    if set(weights) != set(logits) or not all(w > 0 for w in weights.values()):
        raise VectorError(
            "merge-weight", "the ensemble's weights are not one above 0 for each model", "correct"
        )
    shapes = {tuple(v.shape) for v in logits.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise VectorError(
            "vector-shape", "the models' outputs differ in shape", "ask all for the same images"
        )
    mean = np.zeros(next(iter(shapes)), dtype=np.float64)
    for serial in sorted(logits):
        values = logits[serial].astype(np.float64)
        odds = np.exp(values - values.max(axis=1, keepdims=True))
        mean += weights[serial] / total * (odds / odds.sum(axis=1, keepdims=True))
    return mean

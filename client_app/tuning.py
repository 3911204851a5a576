"""What a hospital does with task vectors: fine-tune a base, or count what a candidate gets right.

Imported only when there is something to train or to count, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Context
from torch import nn

from client_app.admission import take_part
from client_app.data import Part, data_of
from client_app.hospital import Hospital
from client_app.opaque import one_code
from client_app.private import admitted, note_non_private
from client_app.work import Work, checked_spec, sums
from common.config import RunConfig
from common.evaluation import evaluate
from common.messages import Comparison, Job, Offer
from common.model import Weights, build
from common.privacy.figures import Figures
from common.vectors.base import is_floating


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned base: what :class:`common.vectors.TaskVector` is made of.

    ``images``: how many trained it, with noise under privacy; ``metrics``: sums over the
    hospital's validation images, of the base (``val-…``) and of the fine-tuned model
    (``tuned-…``), noised or left out as the policy says; none where hospitals judge candidates.
    """

    values: Weights
    images: int
    epsilon: float | None
    delta: float | None
    metrics: Mapping[str, float]


def tune(offer: Offer, name: str, hospital: Hospital, context: Context) -> Tuned:
    """Fine-tune ``offer``'s base as one round by itself, under the name ``name`` in the ledger.

    ε, δ and the schedule of the run config are those of this one vector. Refusals as those of
    :func:`client_app.work.train_job`.
    """
    asked_of = hospital
    hospital = replace(hospital, config=replace(hospital.config, rounds=1))
    job = Job(name, 1, offer.model_digest, offer.weights)
    data = data_of(hospital)
    spec = checked_spec(job, hospital, data)
    work = Work(job, hospital, data, spec, context, None, draw=offer.version)
    if hospital.config.privacy == "none":
        note_non_private(name, hospital, data)
        take_part(offer.run, asked_of)
        update = work.train(None).update
        metrics: dict[str, float] = {}
        if hospital.config.judged_by != "hospitals":  # else figures are told in sums only
            metrics = _figures("val", work.exact_figures())
            metrics |= _figures("tuned", work.moved(update).exact_figures())
        return Tuned(_floating(update, offer), len(data.train), None, None, metrics)
    with admitted(name, hospital, data) as run:
        take_part(offer.run, asked_of)
        update = run.update(1, work.model, lambda: work.train(run).update)
        metrics = _figures("val", work.private_figures(run))
        metrics |= _figures("tuned", work.moved(update).private_figures(run))
        spent, delta = run.ledger.spent_by_run(name).value, hospital.config.delta
        return Tuned(_floating(update, offer), run.plan.train_count, spent, delta, metrics)


def _floating(update: Weights, offer: Offer) -> Weights:
    """Without the counters of batch norm, which no vector carries."""
    return {name: update[name] for name in sorted(update) if is_floating(offer.weights[name])}


def _figures(name: str, figures: Figures) -> dict[str, float]:
    return sums(name, figures) if figures.examples > 0 else {}


def compare(asked: Comparison, hospital: Hospital) -> tuple[int, int]:
    """(images that only the candidate gets right, that only the current base does).

    Of the hospital's validation images: exact counts, for a secured sum and nothing else.
    ConfigError for a model that is not the run's; NotAllowed where the policy forbids to work
    without privacy.
    """
    data = data_of(hospital)
    model = build(checked_spec(asked, hospital, data))
    note_non_private(asked.run, hospital, data)
    take_part(asked.run, hospital)
    with one_code():
        before, after = (
            _right(model, weights, data.val, hospital.config)
            for weights in (asked.current, asked.candidate)
        )
    return int((after & ~before).sum()), int((before & ~after).sum())


def _right(
    model: nn.Module, weights: Mapping[str, np.ndarray], part: Part, config: RunConfig
) -> np.ndarray:
    """(N,) bool: which images get their own label."""
    found = evaluate(
        model, weights, part.images, part.labels, threads=config.threads, device=config.device
    )
    right: np.ndarray = found.probabilities.argmax(1) == part.labels.numpy()
    return right

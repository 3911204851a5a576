"""What a hospital does when asked: validate the model it was sent, train it, report.

Imported only when a hospital trains or evaluates, since it needs torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from flwr.app import Context, RecordDict
from torch import nn

from client_app import secagg
from client_app.data import HospitalData, Part, data_of, model_spec
from client_app.hospital import Hospital
from client_app.identity import roster_of
from client_app.private import PrivateRun, admitted, note_non_private
from client_app.step import kept_features, sum_of
from common.aggregation import GRADIENT, TRAIN, VALIDATE, flat_length, flatten
from common.errors import ConfigError
from common.messages import Comparison, Envelope, Job, Offer, Report
from common.model import ModelSpec, Weights, build, build_for, get_weights, weights_digest
from common.prior.model import head_alone
from common.privacy.figures import Figures
from common.privacy.limits import EXACT
from common.privacy.randomness import SecureRandom
from common.secagg import RoundBinding
from common.training import (
    EvalResult,
    TrainResult,
    TrainSettings,
    evaluate,
    train,
)
from common.vectors.base import is_floating


@dataclass(frozen=True, eq=False)
class _Work:
    """One job at one hospital, checked: what it is about and whether sums are secured."""

    job: Job
    hospital: Hospital
    data: HospitalData
    spec: ModelSpec
    context: Context
    binding: RoundBinding | None
    draw: int = 0
    """Which of several trainings with the same number of a round this is: another order."""

    @classmethod
    def checked(cls, job: Job, hospital: Hospital, context: Context) -> _Work:
        """Of a round's job, before it is known whether its sums are secured."""
        if hospital.config.mode == "vectors":
            # What its own messages guard would otherwise be had by asking for a round.
            raise ConfigError(
                "the server asked for a round in a run of vectors, which has none",
                "treat the server as hostile until this is explained",
            )
        data = data_of(hospital)
        spec = _checked_spec(job, hospital, data)
        return cls(job, hospital, data, spec, context, None)

    def invited(self, purpose: str, *, length: int | None = None, grid: float = 0.0) -> _Work:
        """The same with its invitation, checked; without one where the request, rightly, has none.

        ``length``, ``grid``: of a server step's sum.
        """
        job, hospital = self.job, self.hospital
        if not job.invitation:
            hospital.policy.check_plain(hospital.config.secagg)
            return self
        binding = secagg.check_invitation(
            job.invitation,
            hospital,
            run=job.run,
            round=job.round,
            purpose=purpose,
            length=flat_length(job.weights) if length is None else length,
            has_roster=roster_of(self.context) is not None,
            grid=grid,
        )
        return replace(self, binding=binding)

    @cached_property
    def model(self) -> str:
        """Hash of the model that was sent."""
        return weights_digest(self.job.weights)

    def validate(self) -> EvalResult:
        """The model's exact figures on the validation images: for the hospital's eyes only."""
        val, threads = self.data.val, self.hospital.config.threads
        model, weights, inputs = head_alone(
            build(self.spec), self.job.weights, val.images, kept_features(self.hospital)
        )
        return evaluate(model, weights, inputs, val.labels, threads=threads)

    def moved(self, update: Weights) -> _Work:
        """The same work on the model after ``update``."""
        weights = {
            name: (array + update[name]).astype(array.dtype)
            for name, array in self.job.weights.items()
        }
        return replace(self, job=replace(self.job, weights=weights))

    def exact_figures(self) -> Figures:
        """The same, told as they are."""
        result = self.validate()
        return Figures(result.examples, float(result.correct), result.loss_sum)

    def private_figures(self, run: PrivateRun) -> Figures:
        """What the policy lets out under privacy; exact figures only into a secured sum."""
        exact = self.hospital.policy.privacy.metrics == EXACT
        if exact and self.binding is not None:
            return self.exact_figures()
        return run.figures(self.job.round, self.model, self.validate)


def train_job(job: Job, hospital: Hospital, context: Context) -> RecordDict:
    """Validate ``job``'s model on the hospital's validation images, then train it.

    With privacy on, the round is reserved in the hospital's ledger before it trains, and what
    it released is kept: the same request again gets the same and costs nothing more. Figures
    are then noised, and the training loss is not told.

    Under secure aggregation the answer holds this round's public keys only; update and figures
    stay at the node, to be masked. PolicyRefusal if the request would bypass it.
    """
    work = _Work.checked(job, hospital, context)
    if hospital.config.server_step:
        return _step(work)
    work = work.invited(TRAIN)
    if hospital.config.privacy == "none":
        note_non_private(job.run, hospital, work.data)
        figures = work.exact_figures()
        result = _train(work, None)
        weight = len(work.data.train)
        return _updated(work, figures, result.update, weight, train_loss=result.loss * weight)
    with admitted(job.run, hospital, work.data) as run:
        update = run.update(job.round, work.model, lambda: _train(work, run).update)
        figures = work.private_figures(run)
        return _updated(work, figures, update, run.plan.train_count)


def _step(work: _Work) -> RecordDict:
    """One hospital's part of a server step, or of a statistic: a clipped sum with its noise.

    Drawn and charged anew each time that it is asked for (:mod:`client_app.private`).
    """
    job = work.job
    with admitted(job.run, work.hospital, work.data) as run:
        asked = sum_of(run, work.spec, job)
        shares = asked.shares
        work = work.invited(TRAIN, length=shares.dimension, grid=shares.step)
        figures = work.private_figures(run)

        def draw() -> np.ndarray:
            return shares.release(asked.compute(), SecureRandom())

        values = {GRADIENT: run.drawn(job.round, work.model, asked.mechanism, draw)}
        return _answer(work, figures, values, run.plan.train_count)


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
    :func:`train_job`.
    """
    hospital = replace(hospital, config=replace(hospital.config, rounds=1))
    job = Job(name, 1, offer.model_digest, offer.weights)
    data = data_of(hospital)
    spec = _checked_spec(job, hospital, data)
    work = _Work(job, hospital, data, spec, context, None, draw=offer.version)
    if hospital.config.privacy == "none":
        note_non_private(name, hospital, data)
        update = _train(work, None).update
        metrics: dict[str, float] = {}
        if hospital.config.judged_by != "hospitals":  # else figures are told in sums only
            metrics = _figures("val", work.exact_figures())
            metrics |= _figures("tuned", work.moved(update).exact_figures())
        return Tuned(_floating(update, offer), len(data.train), None, None, metrics)
    with admitted(name, hospital, data) as run:
        update = run.update(1, work.model, lambda: _train(work, run).update)
        metrics = _figures("val", work.private_figures(run))
        metrics |= _figures("tuned", work.moved(update).private_figures(run))
        spent, delta = run.ledger.spent_by_run(name).value, hospital.config.delta
        return Tuned(_floating(update, offer), run.plan.train_count, spent, delta, metrics)


def _floating(update: Weights, offer: Offer) -> Weights:
    """Without the counters of batch norm, which no vector carries."""
    return {name: update[name] for name in sorted(update) if is_floating(offer.weights[name])}


def _figures(name: str, figures: Figures) -> dict[str, float]:
    if figures.examples <= 0:
        return {}
    return {f"{name}-{key}": float(value) for key, value in _named(figures).items()}


def compare(asked: Comparison, hospital: Hospital) -> tuple[int, int]:
    """(images that only the candidate gets right, that only the current base does).

    Of the hospital's validation images: exact counts, for a secured sum and nothing else.
    ConfigError for a model that is not the run's; NotAllowed where the policy forbids to work
    without privacy.
    """
    data = data_of(hospital)
    model = build(_checked_spec(asked, hospital, data))
    note_non_private(asked.run, hospital, data)
    before, after = (
        _right(model, weights, data.val, hospital.config.threads)
        for weights in (asked.current, asked.candidate)
    )
    return int((after & ~before).sum()), int((before & ~after).sum())


def _right(
    model: nn.Module, weights: Mapping[str, np.ndarray], part: Part, threads: int
) -> np.ndarray:
    """(N,) bool: which images get their own label."""
    found = evaluate(model, weights, part.images, part.labels, threads=threads)
    right: np.ndarray = found.probabilities.argmax(1) == part.labels.numpy()
    return right


def evaluate_job(job: Job, hospital: Hospital, context: Context) -> RecordDict:
    """Validate ``job``'s model on the hospital's validation images; nothing is trained."""
    work = _Work.checked(job, hospital, context).invited(VALIDATE)
    if hospital.config.privacy == "none":
        note_non_private(job.run, hospital, work.data)
        return _answer(work, work.exact_figures())
    with admitted(job.run, hospital, work.data) as run:
        return _answer(work, work.private_figures(run))


def _updated(
    work: _Work, figures: Figures, update: Weights, weight: int, *, train_loss: float | None = None
) -> RecordDict:
    """The report in the clear; or this round's keys, and the rest to be masked."""
    if work.binding is None:
        metrics = _metrics(figures) | {"examples": float(weight)}
        if train_loss is not None:
            metrics["train-loss-sum"] = train_loss
        return Report(work.job.run, work.job.round, work.hospital.name, metrics, update).to_record()
    # In the model's own order, not in the one in which the server sent the weights: a server that
    # permuted them for one hospital would find its update at another place of the sum.
    values = {"update": flatten({n: update[n] for n in get_weights(build(work.spec))})}
    if train_loss is not None:
        values["train-loss-sum"] = np.array([train_loss])
    return _answer(work, figures, values, weight)


def _answer(
    work: _Work,
    figures: Figures,
    values: Mapping[str, np.ndarray] | None = None,
    weight: int = 1,
) -> RecordDict:
    """The figures in the clear; or this round's keys, and figures and ``values`` to be masked."""
    job, hospital = work.job, work.hospital
    if work.binding is None:
        return Report(job.run, job.round, hospital.name, _metrics(figures)).to_record()
    if secagg.validated_before(hospital, bytes.fromhex(work.model)):
        figures = Figures(0, 0.0, 0.0)
    exact_counts = hospital.config.privacy == "none"
    sums = {
        "val-examples": np.array([figures.examples]),
        "val-correct": np.array([int(figures.correct) if exact_counts else figures.correct]),
        "val-loss-sum": np.array([figures.loss_sum]),
    }
    return _keys(work, work.binding, {**(values or {}), **sums}, weight=weight)


def _metrics(figures: Figures) -> dict[str, float]:
    return {f"val-{name}": float(value) for name, value in _named(figures).items()}


def _named(figures: Figures) -> Mapping[str, float]:
    return {
        "examples": figures.examples,
        "correct": figures.correct,
        "loss-sum": figures.loss_sum,
    }


def _keys(
    work: _Work, binding: RoundBinding, values: Mapping[str, np.ndarray], *, weight: int
) -> RecordDict:
    message = secagg.advertise(
        work.context,
        work.hospital,
        binding,
        values,
        weight=weight,
        model_hash=bytes.fromhex(work.model),
    )
    return Envelope(message).to_record()


def _checked_spec(job: Job | Comparison, hospital: Hospital, data: HospitalData) -> ModelSpec:
    spec = model_spec(hospital.config, data)
    if spec.digest() != job.model_digest:
        raise ConfigError(
            f"the server's model is not the one for this hospital's data ({spec})",
            "use the same model, width, classes and colour channels everywhere",
        )
    return spec


def _train(work: _Work, run: PrivateRun | None) -> TrainResult:
    c, job, part = work.hospital.config, work.job, work.data.train
    if work.hospital.own is None and c.simulated_delay:
        time.sleep(c.simulated_delay * work.hospital.partition_id / work.hospital.num_partitions)
    settings = TrainSettings(
        epochs=c.local_epochs,
        batch_size=c.batch_size,
        learning_rate=c.learning_rate_of(job.round),
        optimizer=c.optimizer,
        threads=c.threads,
        privacy=None if run is None else run.step(),
        precision=c.precision,
        schedule=c.learning_rate_schedule if c.mode == "vectors" else "constant",
    )
    # Another order of batches for each hospital and round, the same for the same seed.
    number = job.round + work.draw
    parts = np.random.SeedSequence([c.seed, number, work.hospital.partition_id])
    return train(
        build_for(c, work.spec),
        job.weights,
        part.images,
        part.labels,
        settings,
        seed=int(parts.generate_state(1)[0]),
        units=None if run is None else part.shared_units(run.plan.promise.unit),
    )

"""What a hospital does when asked: validate the model it was sent, train it, report.

Imported only when a hospital trains or evaluates, since it needs torch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from flwr.app import Context, RecordDict

from client_app import secagg
from client_app.admission import admit, check_size, take_part
from client_app.agreements import Agreements
from client_app.data import HospitalData, data_of, model_spec
from client_app.fixed import completed, keep
from client_app.hospital import Hospital
from client_app.identity import peers_of
from client_app.opaque import one_code
from client_app.private import PrivateRun, admitted, note_non_private
from client_app.step import Sum, kept_features, sum_of
from common.aggregation import GRADIENT, TRAIN, VALIDATE, flat_length, flatten, terms_for
from common.errors import ConfigError, ProtocolError
from common.evaluation import EvalResult, evaluate
from common.messages import Comparison, Envelope, Job, Report
from common.model import ModelSpec, Weights, build, build_for, moving_names, weights_digest
from common.prior.kept import head_alone
from common.prior.model import update_of_head
from common.privacy.figures import Figures
from common.privacy.limits import EXACT
from common.privacy.randomness import SecureRandom
from common.secagg import RoundBinding
from common.training import TrainingError, TrainResult, TrainSettings, train

log = logging.getLogger("consilium.hospital")


@dataclass(frozen=True, eq=False)
class Work:
    """One job at one hospital, checked: what it is about and whether sums are secured."""

    job: Job
    hospital: Hospital
    data: HospitalData
    spec: ModelSpec
    context: Context
    binding: RoundBinding | None
    draw: int = 0
    """Which of several trainings with the same number of a round this is: another order."""
    came: Mapping[str, np.ndarray] = field(default_factory=dict)
    """The fixed entries that came with the request, to be kept."""

    @classmethod
    def checked(cls, job: Job, hospital: Hospital, context: Context, *, purpose: str) -> Work:
        """Of a round's job; refused before any image is read, where that is possible."""
        if hospital.config.mode == "vectors":
            # What its own messages guard would otherwise be had by asking for a round.
            raise ConfigError(
                "the server asked for a round in a run of vectors, which has none",
                "treat the server as hostile until this is explained",
            )
        check_size(hospital, job.weights, job.fixed)
        binding = admit(job, hospital, context, purpose=purpose)
        data = data_of(hospital)
        spec = checked_spec(job, hospital, data)
        if set(job.weights) != set(moving_names(hospital.config, spec)):
            raise ProtocolError(
                "the server's message moves other entries of the model than this run's rounds do",
                "run the same version of consilium at the server and at every hospital",
            )
        whole = completed(job, spec, hospital)
        return cls(whole, hospital, data, spec, context, binding, came=job.fixed)

    def agreed(self, asked: Sum | None = None) -> Work:
        """The same, once the round is known to be about this model and vector.

        ``asked``: a server step's sum. Only now is anything of the request kept.
        """
        job, hospital = self.job, self.hospital
        if self.binding is not None:
            shares = None if asked is None else asked.shares
            rate = 0.0 if asked is None else asked.sampling_rate
            secagg.check_vector(
                self.binding,
                hospital,
                length=flat_length(job.weights) if shares is None else shares.dimension,
                model_hash=bytes.fromhex(self.model),
                terms=terms_for(hospital.config, shares, sampling_rate=rate),
                grid=0.0 if shares is None else shares.step,
            )
        keep(self.came, hospital)
        return self

    @cached_property
    def model(self) -> str:
        """Hash of the model that is to be worked on."""
        return weights_digest(self.job.model)

    @cached_property
    def most_images(self) -> int:
        """Images that this hospital counts for at most: by the run, and by its roster's entry.

        One that has more is not refused, which would tell that it has.
        """
        peers = peers_of(self.context, self.hospital.policy)
        agreed = None if peers is None else peers.most_images
        most = self.hospital.config.max_examples
        return most if agreed is None else min(most, agreed)

    def validate(self) -> EvalResult:
        """The model's exact figures on the validation images: for the hospital's eyes only.

        WorkFailed for whatever goes wrong.
        """
        with one_code():
            return self._validate()

    def _validate(self) -> EvalResult:
        val, config = self.data.val, self.hospital.config
        model, weights, inputs = head_alone(
            build(self.spec), self.job.model, val.images, kept_features(self.hospital)
        )
        # In bfloat16 an image's loss may hang on how many others there are, by far more than in
        # float32: the noise on private figures would not cover it.
        precision = config.precision if config.privacy == "none" else "float32"
        return evaluate(
            model, weights, inputs, val.labels,
            threads=config.threads, precision=precision, device=config.device,
        )  # fmt: skip

    def train(self, run: PrivateRun | None) -> TrainResult:
        """Train the model on the hospital's training images: as ``run`` says, or without privacy.

        Of a classifier on a prior the head is trained, on features that are computed once.
        In a simulation with ``simulated-delay`` it begins later, the more so the higher its number.
        A training that ends in NaN or infinity gives zeros, since a server can choose a model that
        overflows on one image. WorkFailed for whatever else goes wrong.
        """
        with one_code():
            try:
                return self._train(run)
            except TrainingError:
                log.exception("this training came to nothing: zeros are handed over in its place")
                zeros = {name: np.zeros(a.shape, np.float32) for name, a in self.job.model.items()}
                return TrainResult(zeros, 0.0, len(self.data.train), 0)

    def _train(self, run: PrivateRun | None) -> TrainResult:
        c, job, part = self.hospital.config, self.job, self.data.train
        model = job.model
        if self.hospital.own is None and c.simulated_delay:
            time.sleep(
                c.simulated_delay * self.hospital.partition_id / self.hospital.num_partitions
            )
        settings = TrainSettings(
            epochs=c.local_epochs,
            steps=c.local_steps,
            batch_size=c.batch_size,
            learning_rate=c.learning_rate_of(job.round),
            optimizer=c.optimizer,
            threads=c.threads,
            privacy=None if run is None else run.step(),
            precision=c.precision,
            device=c.device,
            views=c.augmentation_multiplicity,
            schedule=c.learning_rate_schedule if c.mode == "vectors" else "constant",
        )
        # Another order of batches for each hospital and round, the same for the same seed.
        number = job.round + self.draw
        parts = np.random.SeedSequence([c.seed, number, self.hospital.partition_id])
        network, weights, inputs = head_alone(
            build_for(c, self.spec), model, part.images, kept_features(self.hospital)
        )
        result = train(
            network,
            weights,
            inputs,
            part.labels,
            settings,
            seed=int(parts.generate_state(1)[0]),
            units=None if run is None else part.shared_units(run.plan.promise.unit),
            reuse=(self.spec, c.frozen),
        )
        if weights is model:
            return result
        return replace(result, update=update_of_head(model, result.update))

    def moved(self, update: Weights) -> Work:
        """The same work on the model after ``update``."""
        weights = {
            name: (array + update[name]).astype(array.dtype)
            for name, array in self.job.model.items()
        }
        return replace(self, job=replace(self.job, weights=weights, fixed={}))

    def exact_figures(self) -> Figures:
        """The same, told as they are; a loss that is not finite as 0."""
        result = self.validate()
        loss = result.loss_sum
        if not math.isfinite(loss):
            log.warning("the validation loss is %s: it is told as 0", loss)
            loss = 0.0
        return Figures(result.examples, float(result.correct), loss)

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
    work = Work.checked(job, hospital, context, purpose=TRAIN)
    if hospital.config.server_step:
        return _step(work)
    work = work.agreed()
    if hospital.config.privacy == "none":
        note_non_private(job.run, hospital, work.data)
        take_part(job.run, hospital)
        figures = work.exact_figures()
        result = work.train(None)
        weight = min(len(work.data.train), work.most_images)
        return _updated(
            work, figures, result.update, weight,
            train_loss=result.loss * weight, subjects=(f"model {work.model}",),
        )  # fmt: skip
    with admitted(job.run, hospital, work.data) as run:
        take_part(job.run, hospital)
        update = run.update(job.round, work.model, lambda: work.train(run).update)
        figures = work.private_figures(run)
        # The same round on the same model gets the same, kept update (client_app.private).
        subject = f"update {job.run} {job.round} {work.model}"
        weight = min(run.plan.train_count, work.most_images)
        return _updated(work, figures, update, weight, subjects=(subject,))


def _step(work: Work) -> RecordDict:
    """One hospital's part of a server step, or of a statistic: a clipped sum with its noise.

    Drawn and charged anew each time that it is asked for (:mod:`client_app.private`).
    """
    job = work.job
    with admitted(job.run, work.hospital, work.data) as run:
        take_part(job.run, work.hospital)
        asked = sum_of(run, work.spec, job)
        work = work.agreed(asked)
        figures = work.private_figures(run)

        def draw() -> np.ndarray:
            with one_code():
                return asked.shares.release(asked.compute(), SecureRandom())

        values = {GRADIENT: run.drawn(job.round, work.model, asked.mechanism, draw)}
        return _answer(work, figures, values, run.plan.train_count)


def evaluate_job(job: Job, hospital: Hospital, context: Context) -> RecordDict:
    """Validate ``job``'s model on the hospital's validation images; nothing is trained."""
    work = Work.checked(job, hospital, context, purpose=VALIDATE).agreed()
    if hospital.config.privacy == "none":
        note_non_private(job.run, hospital, work.data)
        take_part(job.run, hospital)
        return _answer(work, work.exact_figures())
    with admitted(job.run, hospital, work.data) as run:
        take_part(job.run, hospital)
        return _answer(work, work.private_figures(run))


def _updated(
    work: Work,
    figures: Figures,
    update: Weights,
    weight: int,
    *,
    train_loss: float | None = None,
    subjects: Sequence[str] = (),
) -> RecordDict:
    """The report in the clear; or this round's keys, and the rest to be masked.

    Of ``update`` what rounds move: the rest is zero.
    """
    # In the model's own order, not in the one in which the server sent the weights: a server that
    # permuted them for one hospital would find its update at another place of the sum.
    update = {n: update[n] for n in moving_names(work.hospital.config, work.spec)}
    if work.binding is None:
        metrics = sums("val", figures) | {"examples": float(weight)}
        if train_loss is not None:
            metrics["train-loss-sum"] = train_loss
        return Report(work.job.run, work.job.round, work.hospital.name, metrics, update).to_record()
    values = {"update": flatten(update)}
    if train_loss is not None:
        values["train-loss-sum"] = np.array([train_loss])
    return _answer(work, figures, values, weight, subjects=subjects)


def _answer(
    work: Work,
    figures: Figures,
    values: Mapping[str, np.ndarray] | None = None,
    weight: int = 1,
    *,
    subjects: Sequence[str] = (),
) -> RecordDict:
    """The figures in the clear; or this round's keys, and figures and ``values`` to be masked.

    ``subjects``: what of ``values`` comes again if it is asked for again.
    """
    job, hospital = work.job, work.hospital
    if work.binding is None:
        return Report(job.run, job.round, hospital.name, sums("val", figures)).to_record()
    exact = hospital.config.privacy == "none"
    # Exact figures are the model's alone, whatever the run is called; noised ones are the run's.
    same_in_all_runs = exact or hospital.policy.privacy.metrics == EXACT
    of_figures = f"model {work.model}" if same_in_all_runs else f"figures {job.run} {work.model}"
    told_before = secagg.validated_before(hospital, bytes.fromhex(work.model))
    if told_before or (not exact and Agreements(hospital).has_signed(of_figures)):
        figures = Figures(0, 0.0, 0.0)
    if figures.examples:
        subjects = (*subjects, of_figures)
    figures = within(figures, work.most_images)
    counted = {
        "val-examples": np.array([figures.examples]),
        "val-correct": np.array([int(figures.correct) if exact else figures.correct]),
        "val-loss-sum": np.array([figures.loss_sum]),
    }
    return _keys(work, work.binding, {**(values or {}), **counted}, weight, subjects)


def within(figures: Figures, most: int) -> Figures:
    """``figures`` of no more than ``most`` images: scaled down, where there are more.

    A refusal instead would tell how many images this hospital has.
    """
    if figures.examples <= most:
        return figures
    share = most / figures.examples
    return Figures(most, math.floor(figures.correct * share), figures.loss_sum * share)


def sums(name: str, figures: Figures) -> dict[str, float]:
    """``figures`` as a record carries them: ``NAME-examples``, ``-correct`` and ``-loss-sum``."""
    return {
        f"{name}-examples": float(figures.examples),
        f"{name}-correct": float(figures.correct),
        f"{name}-loss-sum": float(figures.loss_sum),
    }


def _keys(
    work: Work,
    binding: RoundBinding,
    values: Mapping[str, np.ndarray],
    weight: int,
    subjects: Sequence[str],
) -> RecordDict:
    message = secagg.advertise(
        work.context,
        work.hospital,
        binding,
        values,
        weight=weight,
        model_hash=bytes.fromhex(work.model),
        subjects=subjects,
    )
    return Envelope(message).to_record()


def checked_spec(job: Job | Comparison, hospital: Hospital, data: HospitalData) -> ModelSpec:
    """The model that fits ``data``; ConfigError unless it is the one that the server sent."""
    spec = model_spec(hospital.config, data)
    if spec.digest() != job.model_digest:
        raise ConfigError(
            f"the server's model is not the one for this hospital's data ({spec})",
            "use the same model, width, classes and colour channels everywhere",
        )
    return spec

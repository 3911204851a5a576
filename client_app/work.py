"""What a hospital does when asked: validate the model it was sent, train it, report.

Imported only when a hospital trains or evaluates, since it needs torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flwr.app import Context, RecordDict
from safetensors import safe_open
from safetensors.numpy import save

from client_app import secagg
from client_app.data import HospitalData, data_of, model_spec
from client_app.hospital import Hospital
from client_app.identity import roster_of
from common.aggregation import TRAIN, VALIDATE, flat_length, flatten
from common.config import RunConfig
from common.errors import ConfigError, PrivacyError
from common.files import atomic_write
from common.messages import Envelope, Job, Report
from common.model import ModelSpec, build, get_weights, weights_digest
from common.privacy.plan import PrivacyPlan
from common.secagg import RoundBinding
from common.training import (
    EvalResult,
    PrivateStep,
    TrainSettings,
    evaluate,
    steps_per_epoch,
    train,
)


def train_job(job: Job, hospital: Hospital, context: Context) -> RecordDict:
    """Validate ``job``'s model on the hospital's validation images, then train it.

    With privacy on, the round is charged before it trains, and the update is kept: the same
    request again (a lost reply, a resumed run) gets the same update and costs nothing more.

    Under secure aggregation the answer holds this round's public keys only; update and figures
    stay at the node, to be masked. PolicyRefusal if the request would bypass it.
    """
    data = data_of(hospital)
    spec = _checked_spec(job, hospital, data)
    binding = _binding(job, hospital, context, TRAIN)
    validation = _validate(job, hospital, data, spec)
    update, loss = _update(job, hospital, data, spec)
    examples = len(data.train_labels)
    if binding is None:
        metrics = {"examples": float(examples), "train-loss-sum": loss * examples}
        metrics |= _sums(validation)
        return Report(job.run, job.round, hospital.name, metrics, update).to_record()
    values = {
        # In the model's own order, not in the one in which the server sent the weights: a server
        # that permuted them for one hospital would find its update at another place of the sum.
        "update": flatten({name: update[name] for name in get_weights(build(spec))}),
        "train-loss-sum": np.array([loss * examples]),
        **_segments(validation, hospital, job),
    }
    return _keys(job, hospital, context, binding, values, weight=examples)


def evaluate_job(job: Job, hospital: Hospital, context: Context) -> RecordDict:
    """Validate ``job``'s model on the hospital's validation images; nothing is trained."""
    data = data_of(hospital)
    spec = _checked_spec(job, hospital, data)
    binding = _binding(job, hospital, context, VALIDATE)
    validation = _validate(job, hospital, data, spec)
    if binding is None:
        return Report(job.run, job.round, hospital.name, _sums(validation)).to_record()
    return _keys(job, hospital, context, binding, _segments(validation, hospital, job), weight=1)


def _binding(job: Job, hospital: Hospital, context: Context, purpose: str) -> RoundBinding | None:
    """The invitation, checked before any work; None if the request, rightly, has none."""
    if not job.invitation:
        hospital.policy.check_plain(hospital.config.secagg)
        return None
    length = flat_length(job.weights)
    return secagg.check_invitation(
        job.invitation,
        hospital,
        run=job.run,
        round=job.round,
        purpose=purpose,
        length=length,
        has_roster=roster_of(context) is not None,
    )


def _keys(
    job: Job,
    hospital: Hospital,
    context: Context,
    binding: RoundBinding,
    values: Mapping[str, np.ndarray],
    *,
    weight: int,
) -> RecordDict:
    message = secagg.advertise(
        context,
        hospital,
        binding,
        values,
        weight=weight,
        model_hash=bytes.fromhex(weights_digest(job.weights)),
    )
    return Envelope(message).to_record()


def _update(
    job: Job, hospital: Hospital, data: HospitalData, spec: ModelSpec
) -> tuple[dict[str, np.ndarray], float]:
    """(update, mean training loss): trained now, or kept from the same request before."""
    if hospital.config.privacy == "none":
        return _train(job, hospital, data, spec, None)
    own = hospital.run_directory(job.run)
    question = f"{job.round}:{weights_digest(job.weights)}"
    kept = _kept_update(own, question)
    if kept is not None:
        return kept
    plan = charge(own / "privacy.json", hospital.config, len(data.train_labels))
    update, loss = _train(job, hospital, data, spec, plan)
    _keep_update(own, question, update, loss)
    return update, loss


def charge(path: Path, config: RunConfig, images: int) -> PrivacyPlan:
    """Charge one round to the run's plan at ``path`` and return it; made at the first round.

    Raises PrivacyError when the plan is exhausted, damaged, or was made for other settings.
    """
    steps = steps_per_epoch(images, config.batch_size)
    plan = PrivacyPlan.calibrated(
        epsilon=config.epsilon,
        delta=config.delta,
        clipping_norm=config.clipping_norm,
        sampling_rate=1.0 / steps,
        steps_per_round=steps * config.local_epochs,
        rounds=config.rounds,
    )
    if path.exists():
        kept = PrivacyPlan.load(path)
        if not kept.same_promise(plan):
            raise PrivacyError(
                "the run's privacy settings are not those of its first round "
                f"({kept.rounds} rounds, ε={kept.epsilon}, δ={kept.delta})",
                "go on with the settings of the first round, or start a new run",
            )
        plan = kept
    plan = plan.charge_round()
    plan.save(path)
    return plan


def _checked_spec(job: Job, hospital: Hospital, data: HospitalData) -> ModelSpec:
    spec = model_spec(hospital.config, data)
    if spec.digest() != job.model_digest:
        raise ConfigError(
            f"the server's model is not the one for this hospital's data ({spec})",
            "use the same model, width, classes and colour channels everywhere",
        )
    return spec


def _validate(job: Job, hospital: Hospital, data: HospitalData, spec: ModelSpec) -> EvalResult:
    return evaluate(
        build(spec), job.weights, data.val_images, data.val_labels, threads=hospital.config.threads
    )


def _train(
    job: Job, hospital: Hospital, data: HospitalData, spec: ModelSpec, plan: PrivacyPlan | None
) -> tuple[dict[str, np.ndarray], float]:
    c = hospital.config
    privacy = None
    if plan is not None:
        privacy = PrivateStep(
            noise_multiplier=plan.noise_multiplier, clipping_norm=plan.clipping_norm
        )
    settings = TrainSettings(
        epochs=c.local_epochs,
        batch_size=c.batch_size,
        learning_rate=c.learning_rate_of(job.round),
        optimizer=c.optimizer,
        threads=c.threads,
        privacy=privacy,
    )
    # Another order of batches for each hospital and round, the same for the same seed.
    parts = np.random.SeedSequence([c.seed, job.round, hospital.partition_id])
    result = train(
        build(spec),
        job.weights,
        data.train_images,
        data.train_labels,
        settings,
        seed=int(parts.generate_state(1)[0]),
    )
    return result.update, result.loss


def _segments(result: EvalResult, hospital: Hospital, job: Job) -> dict[str, np.ndarray]:
    """The validation figures; zeros if this model's have been summed up before."""
    if secagg.validated_before(hospital, bytes.fromhex(weights_digest(job.weights))):
        result = EvalResult(0.0, 0, 0, result.probabilities[:0])
    return {
        "val-examples": np.array([result.examples]),
        "val-correct": np.array([result.correct]),
        "val-loss-sum": np.array([result.loss_sum]),
    }


def _sums(result: EvalResult) -> dict[str, float]:
    return {
        "val-examples": float(result.examples),
        "val-loss-sum": result.loss_sum,
        "val-correct": float(result.correct),
    }


def _keep_update(own: Path, question: str, update: dict[str, np.ndarray], loss: float) -> None:
    about = {"question": question, "loss": repr(loss)}
    atomic_write(own / "update.safetensors", save(update, metadata=about), mode=0o600)


def _kept_update(own: Path, question: str) -> tuple[dict[str, np.ndarray], float] | None:
    path = own / "update.safetensors"
    if not path.exists():
        return None
    with safe_open(path, framework="numpy") as file:
        about = file.metadata()
        if about.get("question") != question:
            return None
        return {name: file.get_tensor(name) for name in file.keys()}, float(about["loss"])

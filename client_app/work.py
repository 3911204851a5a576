"""What a hospital does when asked: validate the model it was sent, train it, report.

Imported only when a hospital trains or evaluates, since it needs torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from client_app.hospital import Hospital, HospitalData
from common.config import RunConfig
from common.errors import ConfigError, PrivacyError
from common.files import atomic_write
from common.messages import Job, Report
from common.model import build, weights_digest
from common.privacy.plan import PrivacyPlan
from common.training import (
    EvalResult,
    PrivateStep,
    TrainSettings,
    evaluate,
    steps_per_epoch,
    train,
)


def train_job(job: Job, hospital: Hospital) -> Report:
    """Validate ``job``'s model on the hospital's validation images, then train it.

    With privacy on, the round is charged before it trains, and the update is kept: the same
    request again (a lost reply, a resumed run) gets the same update and costs nothing more.
    """
    data = hospital.data()
    validation = _validate(job, hospital, data)
    own = hospital.run_directory(job.run)
    if hospital.config.privacy == "none":
        update, loss, examples = _train(job, hospital, data, None)
        spent: dict[str, float] = {}
    else:
        question = f"{job.round}:{weights_digest(job.weights)}"
        kept = _kept_update(own, question)
        if kept is None:
            plan = charge(own / "privacy.json", hospital.config, len(data.train_labels))
            update, loss, examples = _train(job, hospital, data, plan)
            _keep_update(own, question, update, loss)
        else:
            update, loss = kept
            examples = len(data.train_labels)
            plan = PrivacyPlan.load(own / "privacy.json")
        epsilon = plan.spent()
        spent = {"epsilon-prv": epsilon.prv, "epsilon-pld": epsilon.pld}
    metrics = {
        "examples": float(examples),
        "train-loss-sum": loss * examples,
        **_sums(validation),
        **spent,
    }
    return Report(job.run, job.round, hospital.name, metrics, update)


def evaluate_job(job: Job, hospital: Hospital) -> Report:
    """Validate ``job``'s model on the hospital's validation images; nothing is trained."""
    validation = _validate(job, hospital, hospital.data())
    return Report(job.run, job.round, hospital.name, _sums(validation))


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


def _validate(job: Job, hospital: Hospital, data: HospitalData) -> EvalResult:
    spec = hospital.model_spec(data)
    if spec.digest() != job.model_digest:
        raise ConfigError(
            f"the server's model is not the one for this hospital's data ({spec})",
            "use the same model, width, classes and colour channels everywhere",
        )
    return evaluate(
        build(spec), job.weights, data.val_images, data.val_labels, threads=hospital.config.threads
    )


def _train(
    job: Job, hospital: Hospital, data: HospitalData, plan: PrivacyPlan | None
) -> tuple[dict[str, np.ndarray], float, int]:
    c = hospital.config
    privacy = None
    if plan is not None:
        privacy = PrivateStep(
            noise_multiplier=plan.noise_multiplier, clipping_norm=plan.clipping_norm
        )
    settings = TrainSettings(
        epochs=c.local_epochs,
        batch_size=c.batch_size,
        learning_rate=c.learning_rate,
        optimizer=c.optimizer,
        threads=c.threads,
        privacy=privacy,
    )
    # Another order of batches for each hospital and round, the same for the same seed.
    seed = int(
        np.random.SeedSequence([c.seed, job.round, hospital.partition_id]).generate_state(1)[0]
    )
    result = train(
        build(hospital.model_spec(data)),
        job.weights,
        data.train_images,
        data.train_labels,
        settings,
        seed=seed,
    )
    return result.update, result.loss, result.examples


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

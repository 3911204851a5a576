"""What a hospital does under differential privacy: admit, reserve, work, keep, settle.

The order is the guarantee. A round is reserved in the ledger before it trains and its result is
kept on the disk before it leaves, so that

* a crash in between leaves it counted, and asked again it trains again under the same
  reservation: nothing of the first attempt had left;
* the same request after that (a lost reply, a resumed run) gets the kept result and costs nothing.

A server step (:meth:`PrivateRun.drawn`) is the exception: it is charged for good before it is
computed, nothing of it is kept, and the same request is drawn and charged anew. Its noise may be
a share of a sum's; were the same vector summed twice, over different hospitals, the difference of
the sums would show it with that share alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from client_app.data import HospitalData
from client_app.hospital import Hospital
from common.errors import PrivacyError
from common.evaluation import EvalResult
from common.files import atomic_write, read_json, write_json
from common.model import Weights
from common.privacy.figures import Figures, noised
from common.privacy.ledger import TRAINING, VALIDATION, Ledger
from common.privacy.limits import NOISED
from common.privacy.plan import COUNT_EPSILON, Promise, RunPlan
from common.privacy.randomness import SecureRandom
from common.training import PrivateStep

log = logging.getLogger("consilium.hospital")


@dataclass(frozen=True, eq=False)
class PrivateRun:
    """One admitted run at one hospital, this process alone in it."""

    name: str
    plan: RunPlan
    hospital: Hospital
    data: HospitalData
    directory: Path
    ledger: Ledger

    def step(self) -> PrivateStep:
        """The mechanism of a round's training steps, from public figures only."""
        plan = self.plan
        return PrivateStep(
            noise_multiplier=plan.noise_multiplier,
            clipping_norm=plan.promise.clipping_norm,
            sampling_rate=plan.sampling_rate,
            steps=plan.steps_per_round,
            expected_batch_size=plan.train_count * plan.sampling_rate,
            views=self.hospital.config.augmentation_multiplicity,
            clipping=self.hospital.config.clipping,
        )

    def update(self, round: int, model: str, train: Callable[[], Weights]) -> Weights:
        """The update of ``round`` on the model with hash ``model``: trained now, or kept."""
        path, question = self.directory / "update.safetensors", f"{round}:{model}"
        kept = _kept_update(path, question)
        if kept is not None:
            self.ledger.settle_kept(self.name, round, model, TRAINING)
            return kept
        reserved = self.ledger.reserve_round(self.name, round, model)
        update = train()
        self.hospital.made_directory(self.name)
        atomic_write(path, save(update, metadata={"question": question}), mode=0o600)
        self.ledger.settle(reserved)
        return update

    def drawn(
        self, round: int, model: str, mechanism: str, draw: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """A server step's sum with this hospital's noise: charged now, for one exchange only."""
        # Settled first: what is settled is never handed out for a second draw.
        self.ledger.charge_round(self.name, round, model, mechanism)
        return draw()

    def figures(self, round: int, model: str, evaluate: Callable[[], EvalResult]) -> Figures:
        """The model's noised validation figures: released now, or as they were before.

        All zero where the policy withholds them, or the plan has none left.
        """
        path = self.directory / "validated.json"
        kept = dict(read_json(path)) if path.exists() else {}
        if model in kept:
            self.ledger.settle_kept(self.name, None, model, VALIDATION)
            return Figures(**kept[model])
        if self.hospital.policy.privacy.metrics != NOISED:
            return Figures(0, 0.0, 0.0)
        reserved = self.ledger.reserve_validation(self.name, round, model)
        if reserved is None:
            return Figures(0, 0.0, 0.0)
        val = self.data.val
        figures = noised(
            evaluate().probabilities,
            val.labels.numpy(),
            val.units(self.plan.promise.unit).numpy(),
            count=self.plan.val_count,
            noise_multiplier=self.plan.validation_noise_multiplier,
        )
        self.hospital.made_directory(self.name)
        write_json(path, kept | {model: asdict(figures)}, mode=0o600)
        self.ledger.settle(reserved)
        return figures


@contextmanager
def admitted(run: str, hospital: Hospital, data: HospitalData) -> Iterator[PrivateRun]:
    """The run, admitted by the ledger; waits for another process that works on it.

    Raises NotAllowed, BudgetExhausted or another PrivacyError, before anything is trained, for
    whatever the hospital's limits do not allow; LedgerError for a ledger that is not sound.
    """
    promise, limits = Promise.of(hospital.config), hospital.policy.privacy
    subjects = data.subjects()

    def draw() -> tuple[int, int]:
        noise, unit = SecureRandom().discrete_laplace, promise.unit
        train = data.train.count_units(unit) + noise(COUNT_EPSILON)
        val = data.val.count_units(unit) + noise(COUNT_EPSILON)
        return max(1, train), max(1, val)

    def calibrate() -> RunPlan:
        numbers = ledger.tell_numbers(run, subjects, promise.unit, limits, draw)
        return RunPlan.calibrated(promise, limits, train_count=numbers[0], val_count=numbers[1])

    path = hospital.ledger(run)
    if hospital.own is not None and not path.exists():
        log.warning("a new, empty privacy ledger is made: %s (right for a first run only)", path)
    with hospital.alone_in(run) as directory, Ledger(path) as ledger:
        state = ledger.admit(run, promise, subjects, limits, calibrate)
        yield PrivateRun(run, state.plan, hospital, data, directory, ledger)


def note_non_private(run: str, hospital: Hospital, data: HospitalData) -> None:
    """Enter training without privacy in the ledger; NotAllowed if the policy forbids it."""
    with Ledger(hospital.ledger(run)) as ledger:
        ledger.note_non_private(run, data.subjects(), hospital.policy.privacy)


def _kept_update(path: Path, question: str) -> Weights | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            if file.metadata().get("question") != question:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        # Not trained again: the update may have left, and only one is charged for.
        raise PrivacyError(
            f"{path}, a round's kept update, cannot be read ({error})",
            "restore it from a backup; else the run goes on at its next round",
        ) from None

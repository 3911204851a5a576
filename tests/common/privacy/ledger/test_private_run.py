"""Admit, reserve, work, keep, settle: nothing leaves a hospital that is not counted."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from client_app.hospital import Hospital
from client_app.policy import HospitalPolicy
from client_app.private import PrivateRun, admitted, note_non_private
from common.config import RunConfig
from common.datasets import ImageSet
from common.datasets.splitting import split_independently
from common.errors import PrivacyError
from common.evaluation import EvalResult
from common.model import Weights, get_weights
from common.privacy.figures import noised
from common.privacy.ledger import Entry, Ledger
from common.privacy.ledger.runs import COUNT, TRAINING, VALIDATION
from common.privacy.limits import WITHHELD, BudgetExhausted, PrivacyLimits
from common.training import PrivateStep, TrainSettings, train
from tests.common.privacy.ledger.processes import (
    LEDGER,
    RUN,
    evaluate,
    hospital,
    run_of,
    train_anew,
)


class Killed(BaseException):
    """The end of the process, at a moment that the test chose."""


class DiesBeforeSettling(Ledger):
    """A ledger whose process is killed between keeping a result and settling it."""

    def settle(self, reserved: Entry) -> None:
        raise Killed


@pytest.fixture
def run(tmp_path: Path) -> Iterator[PrivateRun]:
    with Ledger(tmp_path / LEDGER) as ledger:
        yield run_of(tmp_path, ledger)


def reservations(run: PrivateRun, mechanism: str) -> int:
    entries = run.ledger.chain.entries(run=run.name)
    return Counter(e.mechanism for e in entries if e.kind == "reserve")[mechanism]


def token(update: Weights) -> bytes:
    return update["token"].tobytes()


def test_the_same_request_gets_the_same_update_and_costs_nothing(run: PrivateRun) -> None:
    first = run.update(1, "m", train_anew)
    for _ in range(3):
        assert token(run.update(1, "m", train_anew)) == token(first)
    assert reservations(run, TRAINING) == 1


def test_an_update_that_is_no_longer_kept_is_made_and_counted_anew(run: PrivateRun) -> None:
    results = {token(run.update(number, "m", train_anew)) for number in (1, 2, 1, 2, 1)}
    assert reservations(run, TRAINING) == len(results) == 5


def test_killed_in_training_it_trains_again_under_the_same_reservation(run: PrivateRun) -> None:
    def killed() -> Weights:
        raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            run.update(1, "m", killed)
    assert reservations(run, TRAINING) == 1
    run.update(1, "m", train_anew)
    assert reservations(run, TRAINING) == 1


def test_killed_before_it_settled_one_reservation_still_releases_one_result(
    tmp_path: Path,
) -> None:
    """Kept, not settled; then the kept one leaves, is overwritten, and is asked for once more."""
    with DiesBeforeSettling(tmp_path / LEDGER) as ledger:
        dying = run_of(tmp_path, ledger)
        with pytest.raises(Killed):
            dying.update(1, "m", train_anew)
        with pytest.raises(Killed):
            dying.figures(1, "m", evaluate)
    with Ledger(tmp_path / LEDGER) as ledger:
        run = run_of(tmp_path, ledger)
        left = [token(run.update(number, "m", train_anew)) for number in (1, 2, 1)]
        assert len(set(left)) <= reservations(run, TRAINING)
        told = {run.figures(number, "m", evaluate) for number in (1, 2)}
        (tmp_path / "validated.json").unlink()  # lost with a disk, or tidied away
        told.add(run.figures(1, "m", evaluate))
        assert len(told) <= reservations(run, VALIDATION)


def test_a_models_figures_are_released_once_whatever_round_they_are_asked_in(
    run: PrivateRun,
) -> None:
    told = {run.figures(number, "m", evaluate) for number in (0, 1, 1, 7)}
    assert len(told) == reservations(run, VALIDATION) == 1
    assert run.figures(1, "n", evaluate) not in told
    assert reservations(run, VALIDATION) == 2


def test_figures_that_the_policy_withholds_are_zero_and_cost_nothing(run: PrivateRun) -> None:
    policy = dataclasses.replace(
        run.hospital.policy,
        privacy=dataclasses.replace(run.hospital.policy.privacy, metrics=WITHHELD),
    )
    discreet = dataclasses.replace(run, hospital=dataclasses.replace(run.hospital, policy=policy))
    figures = discreet.figures(1, "m", evaluate)
    assert (figures.examples, figures.correct, figures.loss_sum) == (0, 0.0, 0.0)
    assert reservations(run, VALIDATION) == 0


def private_hospital(home: Path, limits: PrivacyLimits) -> Hospital:
    """A hospital with a policy of its own, asked for one round of ε = 2."""
    config = RunConfig.parse(
        {"rounds": 1, "epsilon": 2.0, "delta": 1e-4, "batch-size": 64, "secagg": False}
    )
    return dataclasses.replace(
        hospital(home)[0], config=config, policy=HospitalPolicy(privacy=limits)
    )


def test_what_was_done_while_no_total_was_set_counts_once_there_is_one(tmp_path: Path) -> None:
    """A policy goes from 'inf' to 8: images that were trained without privacy have no 8 left."""
    endless = PrivacyLimits(total_epsilon=math.inf, allow_non_private=True)
    data = hospital(tmp_path)[1]
    note_non_private("before", private_hospital(tmp_path, endless), data)
    finite = private_hospital(tmp_path, PrivacyLimits())
    with pytest.raises(BudgetExhausted), admitted("after", finite, data):
        pass


def test_a_run_that_began_without_a_total_does_not_begin_anew_with_one(tmp_path: Path) -> None:
    data = hospital(tmp_path)[1]
    for limits in (PrivacyLimits(total_epsilon=math.inf), PrivacyLimits()):
        with admitted(RUN, private_hospital(tmp_path, limits), data) as run:
            plan = run.plan
            if math.isinf(limits.total_epsilon):
                first = plan
                run.update(1, "m", train_anew)
    assert plan == first
    with (
        admitted(RUN, private_hospital(tmp_path, PrivacyLimits()), data) as run,
        pytest.raises(BudgetExhausted),
    ):
        run.update(1, "another model", train_anew)


# One image must not decide what the server is answered.

BRIGHT = 3.0


def tiny_data(*, with_target: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Four dark pictures, and one with two bright pixels."""
    images = torch.zeros(4 + with_target, 1, 4, 4)
    if with_target:
        images[4, 0, 0, :2] = BRIGHT
    return images, torch.zeros(4 + with_target, dtype=torch.int64)


def detector() -> nn.Module:
    """A model that overflows on the bright picture, and on no other: NaN for an answer."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[1].weight[:, :2] = 3e38
    return model


@pytest.mark.parametrize("with_target", [False, True])
def test_a_crafted_model_cannot_make_a_private_round_fail_on_one_picture(
    with_target: bool,
) -> None:
    """A refusal in place of an update would tell, without noise, that the picture is here."""
    images, labels = tiny_data(with_target=with_target)
    step = PrivateStep(
        noise_multiplier=1.0, clipping_norm=1.0, sampling_rate=1.0, steps=1, expected_batch_size=5
    )
    settings = TrainSettings(
        epochs=1, batch_size=5, learning_rate=0.1, optimizer="sgd", privacy=step
    )
    model = detector()
    result = train(model, get_weights(model), images, labels, settings, seed=0)
    assert all(np.isfinite(u).all() for u in result.update.values())


@pytest.mark.parametrize("with_target", [False, True])
def test_a_crafted_model_cannot_make_the_figures_fail_on_one_picture(with_target: bool) -> None:
    images, labels = tiny_data(with_target=with_target)
    with torch.no_grad():
        outputs = torch.softmax(detector()(images), dim=1).numpy()
    result = EvalResult(0.0, 0, len(labels), outputs)
    figures = noised(
        result.probabilities, labels.numpy(), np.arange(len(labels)), count=5, noise_multiplier=1.0
    )
    assert math.isfinite(figures.correct) and math.isfinite(figures.loss_sum)


def test_the_numbers_of_images_are_drawn_once_for_a_data_set(tmp_path: Path) -> None:
    """Else a server would ask under many names, and average the noise away."""
    who, data = private_hospital(tmp_path, PrivacyLimits(hold_days=0.0)), hospital(tmp_path)[1]
    told = []
    for name in ("a", "b", "c"):
        with admitted(name, who, data) as run:
            told.append((run.plan.train_count, run.plan.val_count))
    assert len(set(told)) == 1


def test_what_a_plan_that_cannot_be_made_tells_of_the_numbers_is_counted(tmp_path: Path) -> None:
    """Whether any noise suffices depends on the steps, and these on the numbers drawn."""
    who = private_hospital(tmp_path, PrivacyLimits())
    config = dataclasses.replace(who.config, rounds=100_000, local_epochs=1000, epsilon=0.5)
    endless = dataclasses.replace(who, config=config)
    for _ in range(3):
        with (
            pytest.raises(PrivacyError, match="no noise multiplier"),
            admitted(RUN, endless, hospital(tmp_path)[1]),
        ):
            raise AssertionError("admitted without a plan")
    with Ledger(who.ledger(RUN)) as ledger:
        counts = [e for e in ledger.chain.entries() if e.mechanism == COUNT]
    assert len(counts) == 1


def test_an_image_more_changes_no_other_images_side() -> None:
    """Each side has the whole ε because an image touches one side: no other may move with it."""
    pictures = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(60, dtype=np.int64) % 3

    def sides(chosen: list[int]) -> dict[bytes, str]:
        parts = split_independently(ImageSet(pictures[chosen], labels[chosen]), 0.2, 0)
        return {
            row.tobytes(): side
            for side, part in zip(("train", "val"), parts, strict=True)
            for row in part.digests
        }

    everyone = sides(list(range(60)))
    for gone in range(60):
        without = sides([i for i in range(60) if i != gone])
        assert without.items() <= everyone.items()


def test_a_ledger_that_is_damaged_stops_everything_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / LEDGER).write_bytes(b"no ledger")
    with (
        pytest.raises(PrivacyError, match="ledger"),
        admitted(RUN, private_hospital(tmp_path, PrivacyLimits()), hospital(tmp_path)[1]),
    ):
        raise AssertionError("admitted without a ledger")

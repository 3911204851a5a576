"""What rounds do not move is sent once: kept under its digest, and nothing else passes for it."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_app import fixed
from client_app.fixed import completed, folder_of, keep
from client_app.hospital import Hospital
from common.config import RunConfig
from common.errors import FixedMissing, ModelError, ProtocolError
from common.fixed import groups_of
from common.messages import Job
from common.model import ModelSpec, build, get_weights, moving_names, weights_digest

pytestmark = pytest.mark.usefixtures("small_prior")

SPEC = ModelSpec(width=0.03125)
WEIGHTS = get_weights(build(SPEC, seed=0))
PARTS = {"stem", "block1"}
FIXED = {n: a for n, a in WEIGHTS.items() if n.split(".")[0] in PARTS}
WHOLE = Job("run-1", 1, b"digest", {n: a for n, a in WEIGHTS.items() if n not in FIXED}, b"", FIXED)
SHORT = WHOLE.without_fixed(groups_of(FIXED))


def hospital_in(folder: Path, number: int = 0) -> Hospital:
    config = RunConfig.parse({"dataset": "synthetic"})
    return Hospital("hospital-00", folder / "simulation" / f"hospital-0{number}", config, number, 4)


@pytest.fixture
def hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    monkeypatch.setattr(fixed, "_known", type(fixed._known)())
    return hospital_in(tmp_path)


def answered(job: Job, hospital: Hospital) -> Job:
    """As a hospital answers: the message read and completed, what came kept."""
    read = Job.from_record(job.to_record())
    whole = completed(read, SPEC, hospital)
    keep(read.fixed, hospital)
    return whole


def other(i: int) -> Job:
    """The same with another stem."""
    return replace(WHOLE, fixed={n: a + i if n.startswith("stem") else a for n, a in FIXED.items()})


def test_what_was_sent_once_need_not_be_sent_again(hospital: Hospital) -> None:
    assert len(SHORT.left_out) == 2 and "fixed" not in SHORT.to_record()
    for job in (answered(WHOLE, hospital), answered(SHORT, hospital)):
        assert weights_digest(job.model) == weights_digest(WEIGHTS)
        assert set(job.weights) == set(WHOLE.weights)
        assert job.left_out == ()


def test_a_part_that_changed_comes_alone(hospital: Hospital) -> None:
    answered(WHOLE, hospital)
    changed = other(1)
    kept = groups_of(FIXED).keys() & groups_of(changed.fixed).keys()
    part = changed.without_fixed({d: groups_of(FIXED)[d] for d in kept})
    assert {n.split(".")[0] for n in part.fixed} == {"stem"}
    assert weights_digest(answered(part, hospital).model) == weights_digest(changed.model)


def test_another_process_of_the_hospital_finds_it(hospital: Hospital) -> None:
    answered(WHOLE, hospital)
    fixed._known.clear()
    assert weights_digest(answered(SHORT, hospital).model) == weights_digest(WEIGHTS)


def test_what_is_not_there_is_asked_for(hospital: Hospital) -> None:
    with pytest.raises(FixedMissing, match="does not have"):
        answered(SHORT, hospital)


@pytest.mark.parametrize("harm", ["other", "cut", "empty"])
def test_a_file_that_is_not_what_it_was_is_not_used_and_mended_by_the_next_message(
    hospital: Hospital, harm: str
) -> None:
    answered(WHOLE, hospital)
    fixed._known.clear()
    one, two = sorted(folder_of(hospital).iterdir())
    harmed = {"other": two.read_bytes(), "cut": one.read_bytes()[:40], "empty": b""}
    one.write_bytes(harmed[harm])
    with pytest.raises(FixedMissing):
        answered(SHORT, hospital)
    answered(WHOLE, hospital)
    fixed._known.clear()
    assert weights_digest(answered(SHORT, hospital).model) == weights_digest(WEIGHTS)


@pytest.mark.parametrize(
    "wrong",
    [{"junk": np.zeros(1000, np.float32)}, {"stem.0.weight": np.zeros(1000, np.float32)},
     {"stem.0.weight": np.full_like(WEIGHTS["stem.0.weight"], np.nan)}],
)  # fmt: skip
def test_entries_that_are_not_the_models_are_refused_and_not_kept(
    hospital: Hospital, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ModelError):
        answered(replace(WHOLE, fixed={**FIXED, **wrong}), hospital)
    assert not folder_of(hospital).exists()


def test_few_sets_are_kept_however_many_a_server_sends_and_those_in_use_stay(
    hospital: Hospital,
) -> None:
    answered(WHOLE, hospital)
    for i in range(1, 30):
        answered(other(i), hospital)
        fixed._known.clear()
        assert weights_digest(answered(SHORT, hospital).model) == weights_digest(WEIGHTS)
    files = list(folder_of(hospital).iterdir())
    assert len(files) <= 12
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)


def _sends_many(folder: Path, number: int) -> None:
    for i in range(40):
        answered(other(number * 40 + i), hospital_in(folder, number))


def test_processes_that_keep_and_prune_at_once_do_not_trip_over_each_other(
    tmp_path: Path, hospital: Hospital
) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_sends_many, args=(tmp_path, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4


@pytest.mark.parametrize("name", ["../../ledger", "A" * 64, "0" * 63, "0" * 65])
def test_a_digest_that_is_none_names_no_file(name: str) -> None:
    with pytest.raises(ProtocolError, match="leaves out"):
        Job.from_record(replace(SHORT, left_out=(name,)).to_record())
    with pytest.raises(ProtocolError, match="leaves out"):
        Job.from_record(replace(SHORT, left_out=("0" * 64,) * 65).to_record())


def test_a_message_that_has_entries_twice_is_refused() -> None:
    with pytest.raises(ProtocolError, match="twice"):
        Job.from_record(replace(WHOLE, fixed=WEIGHTS).to_record())


@pytest.mark.parametrize(
    ("values", "still"),
    [({}, set()), ({"model": "resnet9", "privacy": "none"}, set()),
     ({"base": "x", "frozen": "stem."}, {"stem."}),
     ({"model": "prior-head", "allow-random-base": True, "privacy": "none"},
      {"features.", "mean", "matrix"}),
     ({"model": "prior-head", "hidden-units": 8, "privacy": "none", "allow-random-base": True},
      {"features.", "mean", "matrix"})],
)  # fmt: skip
def test_what_rounds_move_is_all_but_what_is_frozen_or_a_priors(
    values: dict[str, Any], still: set[str]
) -> None:
    config = RunConfig.parse({"dataset": "synthetic", "model-width": 0.0625, **values})
    spec = ModelSpec.of(config, num_classes=8, channels=3)
    moving, state = moving_names(config, spec), list(build(spec).state_dict())
    assert [n for n in state if n in moving] == list(moving)
    left = set(state) - set(moving)
    assert all(n.startswith(tuple(still)) for n in left) if still else not left
    assert bool(left) == bool(still)

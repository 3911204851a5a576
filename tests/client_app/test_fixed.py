"""What rounds do not move is sent once: kept under its digest, and nothing else passes for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client_app import fixed
from client_app.fixed import FixedMissing, completed, folder_of
from client_app.hospital import Hospital
from common.config import RunConfig
from common.errors import ProtocolError
from common.messages import Job
from common.model import ModelSpec, build, moving_names, weights_digest

FIXED = {"stem": np.arange(6, dtype=np.float32).reshape(2, 3), "count": np.array(3)}
MOVING = {"head": np.ones(4, dtype=np.float32)}
WHOLE = Job("run-1", 1, b"digest", MOVING, b"", FIXED)
SHORT = WHOLE.without_fixed(weights_digest(FIXED))


@pytest.fixture
def hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    monkeypatch.setattr(fixed, "_known", type(fixed._known)())
    config = RunConfig.parse({"dataset": "synthetic"})
    return Hospital("hospital-00", tmp_path / "simulation" / "hospital-00", config, 0, 4)


def sent(job: Job) -> Job:
    return Job.from_record(job.to_record())


def test_what_was_sent_once_need_not_be_sent_again(hospital: Hospital) -> None:
    first = completed(sent(WHOLE), hospital)
    again = completed(sent(SHORT), hospital)
    for job in (first, again):
        assert {n: a.tolist() for n, a in job.model.items()} == {
            "stem": [[0, 1, 2], [3, 4, 5]], "count": 3, "head": [1, 1, 1, 1],
        }  # fmt: skip
        assert set(job.weights) == {"head"}
    assert weights_digest(first.model) == weights_digest(again.model)
    sizes = [len(str(j.to_record()["weights"])) for j in (WHOLE, SHORT)]
    assert sizes[0] == sizes[1] and "fixed" not in SHORT.to_record()


def test_another_process_of_the_hospital_finds_it(hospital: Hospital) -> None:
    completed(sent(WHOLE), hospital)
    fixed._known.clear()
    assert set(completed(sent(SHORT), hospital).fixed) == set(FIXED)


def test_what_is_not_there_is_asked_for(hospital: Hospital) -> None:
    with pytest.raises(FixedMissing, match="does not have"):
        completed(sent(SHORT), hospital)


@pytest.mark.parametrize("harm", ["other", "cut", "empty"])
def test_a_file_that_is_not_what_it_was_is_not_used(hospital: Hospital, harm: str) -> None:
    completed(sent(WHOLE), hospital)
    fixed._known.clear()
    (file,) = folder_of(hospital).iterdir()
    if harm == "other":
        completed(sent(replace(WHOLE, fixed={"stem": FIXED["stem"] + 1})), hospital)
        (other,) = set(folder_of(hospital).iterdir()) - {file}
        other.replace(file)
    else:
        file.write_bytes(file.read_bytes()[:40] if harm == "cut" else b"")
    with pytest.raises(FixedMissing):
        completed(sent(SHORT), hospital)


def test_few_sets_are_kept_however_many_a_server_sends(hospital: Hospital) -> None:
    for i in range(9):
        completed(sent(replace(WHOLE, fixed={"stem": np.full(3, i)})), hospital)
    files = list(folder_of(hospital).iterdir())
    assert len(files) == 4
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)


@pytest.mark.parametrize("name", ["../../ledger", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_a_digest_that_is_none_names_no_file(name: str) -> None:
    with pytest.raises(ProtocolError, match="leaves out"):
        sent(replace(SHORT, left_out=name))


def test_a_message_that_has_entries_twice_is_refused() -> None:
    with pytest.raises(ProtocolError, match="twice"):
        sent(replace(WHOLE, fixed={"head": MOVING["head"]}))
    with pytest.raises(ProtocolError, match="both"):
        sent(replace(WHOLE, left_out=weights_digest(FIXED)))


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

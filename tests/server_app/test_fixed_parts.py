"""In a run, what rounds do not move travels once to each hospital, and into no sum."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from client_app import fixed
from common.files import consilium_home
from common.messages import Job
from common.secagg import RoundBinding
from deploy.inprocess import run_in_process
from server_app import secure_round
from tests.server_app.running import lines, the_run
from tests.server_app.test_head_without_privacy import PEOPLE, RUN

HEAD = 8 * 301


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Every job that a hospital reads, in their order."""
    monkeypatch.setattr(fixed, "_known", type(fixed._known)())
    seen: list[Job] = []
    read = Job.from_record.__func__  # type: ignore[attr-defined]

    def noted(cls: type[Job], record: Any) -> Job:
        seen.append(read(cls, record))
        return seen[-1]

    monkeypatch.setattr(Job, "from_record", classmethod(noted))
    return seen


def test_a_priors_features_are_sent_once_and_only_the_head_is_summed(
    messages: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: set[int] = set()
    summed = secure_round.secure_sum

    def noted(grid: Any, cohort: Any, binding: RoundBinding, *rest: Any, **more: Any) -> Any:
        lengths.update(s.length for s in binding.layout.segments if s.name == "update")
        return summed(grid, cohort, binding, *rest, **more)

    monkeypatch.setattr(secure_round, "secure_sum", noted)
    run_in_process({**RUN, "secagg": True}, num_hospitals=PEOPLE)
    assert lengths == {HEAD}
    assert [bool(job.fixed) for job in messages] == [True] * PEOPLE + [False] * (4 * PEOPLE)
    assert all(set(job.weights) == {"head.weight"} for job in messages)
    # And what is kept of the run is whole.
    first, last = (load_file(the_run() / f"round-000{i}.safetensors") for i in (0, 4))
    assert set(first) == set(last) > {"head.weight", "mean", "matrix"}
    assert not np.array_equal(first["head.weight"], last["head.weight"])


def test_who_lost_its_copy_misses_a_round_and_is_sent_another(
    messages: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[Path] = []
    ends = secure_round.secure_round  # between the rounds 2 and 3 every copy goes

    def losing(*args: Any, **more: Any) -> Any:
        if args[2].round == 3 and not lost:
            lost.append(consilium_home() / "simulation" / "fixed")
            shutil.rmtree(lost[0])
            fixed._known.clear()
        return ends(*args, **more)

    monkeypatch.setattr("server_app.fedavg.secure_round", losing)
    run_in_process({**RUN, "secagg": True, "rounds": 5}, num_hospitals=PEOPLE)
    noted = {record["round"]: record for record in lines(the_run())}
    assert {r: noted[r]["status"] for r in (2, 3, 4, 5)} == {
        2: "ok", 3: "failed", 4: "ok", 5: "ok",
    }  # fmt: skip
    assert len(noted[3]["dropped"]) == PEOPLE
    assert all("fixed-missing" in absence["reason"] for absence in noted[3]["dropped"])
    whole = [job.round for job in messages if job.fixed]
    assert whole == [1] * PEOPLE + [4] * PEOPLE


def test_a_server_that_leaves_entries_out_of_a_sum_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it could have the same model's parts summed one by one, over other hospitals each."""
    honest = Job.to_record

    def part(self: Job) -> Any:
        name = "head.weight"
        rest = {n: a for n, a in self.weights.items() if n != name}
        return honest(Job(self.run, self.round, self.model_digest, rest, self.invitation,
                          {**self.fixed, name: self.weights[name]}))  # fmt: skip

    monkeypatch.setattr(Job, "to_record", part)
    with pytest.raises(Exception, match="round 3 failed"):
        run_in_process({**RUN, "secagg": True}, num_hospitals=PEOPLE)
    reasons = {a["reason"] for record in lines(the_run()) for a in record.get("dropped", [])}
    assert reasons and all("protocol" in reason for reason in reasons)

"""Runs whose candidates the hospitals judge: the sums are right, and nothing is opened by few."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import KEYS, RunConfig
from common.errors import ConfigError, RoundError
from common.files import consilium_home
from common.messages import Comparison
from common.model import ModelSpec, build, get_weights
from common.vectors import Base, Rule, VectorError
from deploy.inprocess import Fault, InProcessGrid, run_in_process
from server_app.registry import GateRefusal, Proposal
from server_app.run_store import runs_directory
from server_app.vectors import federated
from server_app.vectors.federated import (
    Bench,
    CandidateWaits,
    FederatedJudge,
    HospitalsVerdict,
    WorseAtHospitals,
)
from tests.client_app.judging import ALLOWED, delivered
from tests.server_app.vectors.judging import JUDGED, counted, gate, soon
from tests.server_app.vectors.running import TINY, lines, registry, the_run

__all__ = ["soon"]  # fixtures


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, str, int, int]]:
    """(both models, hospital, gained, lost) as each hospital counted, in the order of time.

    A tiny model barely moves: the counts are made up, another pair for each hospital.
    """
    return counted(monkeypatch, lambda asked, name: (1 << int(name[-2:]), 3 ** int(name[-2:])))


def kept() -> dict[str, Any]:
    return dict(json.loads((the_run() / "judging.json").read_text()))


def asked(grid: InProcessGrid, kind: str = "query.judge") -> list[int]:
    return [i for one, i, _ in grid.log if one == kind]


def refusing(*hospitals: int) -> dict[int, dict[str, Any]]:
    """Policies of hospitals that send vectors and do not judge."""
    path = consilium_home() / "no-judge.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(ALLOWED)
    return {i: {"policy": str(path)} for i in hospitals}


def is_judge(*hospitals: int) -> Any:
    return lambda kind, i, _: kind == "query.judge" and i in hospitals


def test_a_candidate_is_published_by_sums_that_are_those_of_the_hospitals(
    base: str, told: list[tuple[bytes, str, int, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    grid = run_in_process({**JUDGED, "base": base, "publish-every": 5}, num_hospitals=5)
    judged = gate(1)
    assert judged["hospitals"] == [f"hospital-0{i}" for i in range(5)]
    assert len(told) == 5
    assert judged["gained"] == sum(gained for _, _, gained, _ in told) == 31
    assert judged["lost"] == sum(lost for _, _, _, lost in told) == 121
    assert judged["adopt"] and judged["current"] is None and judged["candidate"] is None
    assert kept()["bases"][registry_base(0)]["hospitals"] == judged["hospitals"]
    assert all(row["metrics"] == {} for row in lines("arrival"))
    said = capsys.readouterr().out
    assert f"gains {judged['gained']} images and loses {judged['lost']}" in said
    assert "of their counts, sums only" in said
    assert not asked(grid, "train") and not asked(grid, "evaluate")


def registry_base(version: int) -> str:
    with registry() as opened:
        return opened.base(version).id


def test_the_server_is_sent_envelopes_only_when_hospitals_judge(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = ("query.judge", "query.share", "query.masked", "query.consistency", "query.unmask")
    answers: list[Any] = []
    original = InProcessGrid._handle

    def watched(self: InProcessGrid, message: Any, partition_id: int) -> Any:
        reply = original(self, message, partition_id)
        if message.metadata.message_type in stages:
            answers.append(reply.content)
        return reply

    monkeypatch.setattr(InProcessGrid, "_handle", watched)
    run_in_process({**JUDGED, "base": base, "publish-every": 5}, num_hospitals=5)
    assert len(answers) == 5 * len(stages)
    for record in answers:
        assert set(record) == {"envelope"}
        assert set(record.config_records["envelope"]) == {"version", "payload"}


def test_a_candidate_that_is_worse_at_the_hospitals_is_not_published(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted(monkeypatch, lambda asked, name: (1, 5))
    with pytest.raises(RoundError, match="no base 1"):
        run_in_process({**JUDGED, "base": base, "publish-margin": 1.0, "publish-every": 5},
                       num_hospitals=5)  # fmt: skip
    (held,) = lines("held")
    assert held["code"] == "registry-gate"
    assert (held["gate"]["gained"], held["gate"]["lost"]) == (5, 25)
    assert held["gate"]["margin"] == pytest.approx(math.sqrt(30))
    assert [row["version"] for row in lines("base")] == [0]


def test_a_second_candidate_for_a_base_is_judged_by_the_same_hospitals_and_later(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four deliver and find it worse; two come later, and have a vector but no say."""
    first: list[bytes] = []

    def say(question: Comparison, name: str) -> tuple[int, int]:
        first.append(question.models)
        return (0, 9) if question.models == first[0] else (9, 0)

    told = counted(monkeypatch, say)
    late = Fault(lambda kind, i, _: kind == "query.offer" and i in (4, 5), delay_polls=120)
    grid = run_in_process(
        {**JUDGED, "base": base, "publish-every": 4, "publish-margin": 1.0},
        num_hospitals=6, workers=6, faults=[late],
    )  # fmt: skip
    judges = [f"hospital-0{i}" for i in range(4)]
    assert [name for _, name, _, _ in sorted(told, key=lambda row: row[1])] == sorted(2 * judges)
    assert sorted(asked(grid)) == sorted([0, 1, 2, 3] * 2)
    assert gate(1)["hospitals"] == judges
    assert lines("base")[1]["hospitals"] == [f"hospital-0{i}" for i in range(6)]
    (base_kept,) = kept()["bases"].values()
    assert sorted(base_kept["counts"].values()) == [[0, 36], [36, 0]]


def test_when_too_few_may_judge_nothing_is_opened_and_the_run_says_so(base: str) -> None:
    with pytest.raises(RoundError, match="judge a candidate") as caught:
        run_in_process({**JUDGED, "base": base, "publish-every": 5}, num_hospitals=5,
                       node_configs=refusing(1, 3))  # fmt: skip
    assert "hospital-01, hospital-03: policy" in str(caught.value)
    codes = [row["code"] for row in lines("held")]
    assert codes == ["judging-waits", "judging-few"]
    assert kept()["bases"][registry_base(0)] == {"hospitals": [], "tried": [], "counts": {}}


def test_one_that_may_not_judge_is_left_out_and_the_others_do(base: str) -> None:
    grid = run_in_process({**JUDGED, "base": base, "publish-every": 5, "versions": 2},
                          num_hospitals=5, node_configs=refusing(2))  # fmt: skip
    assert asked(grid).count(2) == 1
    for version in (1, 2):
        assert gate(version)["hospitals"] == [f"hospital-0{i}" for i in (0, 1, 3, 4)]


def test_hospitals_that_do_not_answer_make_the_candidate_wait_until_they_do(base: str) -> None:
    lost = Fault(is_judge(1, 2), drop_request=True, times=2)
    started = time.monotonic()
    grid = run_in_process(
        {**JUDGED, "base": base, "publish-every": 5, "stage-timeout": 2.0}, num_hospitals=5,
        workers=5, faults=[lost],
    )  # fmt: skip
    (held,) = lines("held")
    assert held["code"] == "judging-waits"
    assert gate(1)["hospitals"] == [f"hospital-0{i}" for i in range(5)]
    assert asked(grid).count(0) == 2
    assert kept()["round"] == 2
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("stage", ["share", "masked", "consistency", "unmask"])
def test_two_of_five_lost_at_any_stage_open_nothing_and_it_is_tried_again(
    base: str, stage: str, told: list[tuple[bytes, str, int, int]]
) -> None:
    lost = Fault(
        lambda kind, i, _: kind == f"query.{stage}" and i in (1, 2), drop_reply=True, times=2
    )
    run_in_process(
        {**JUDGED, "base": base, "publish-every": 5, "stage-timeout": 6.0}, num_hospitals=5,
        workers=5, faults=[lost],
    )  # fmt: skip
    assert [row["code"] for row in lines("held")] == ["judging-waits"]
    assert gate(1)["gained"] == sum(gained for _, _, gained, _ in told) / 2
    assert gate(1)["hospitals"] == [f"hospital-0{i}" for i in range(5)]


@pytest.mark.parametrize("stage", ["share", "masked", "consistency", "unmask"])
def test_an_exchange_takes_no_longer_than_its_time_whoever_is_silent(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """One never answers, and all others stop later: the stages share one stage-timeout."""
    values = {key.name: key.default for key in KEYS} | JUDGED | {"base": base, "stage-timeout": 2.0}
    grid, proposal = ready(values, base)
    delivered(grid, get_weights(build(ModelSpec(width=0.03125), seed=0)), monkeypatch)
    everybody = {f"hospital-0{i}": 1000 + i for i in range(5)}
    grid.faults += [
        Fault(is_judge(4), drop_reply=True),
        Fault(lambda kind, i, _: kind == f"query.{stage}", drop_reply=True),
    ]
    monkeypatch.setattr(federated, "FIRST_PAUSE", 60.0)
    panel = judge(grid, values, tmp_path)
    started = time.monotonic()
    with pytest.raises(CandidateWaits, match="nothing was opened"):
        panel.verdict(proposal, Bench(everybody, False))
    assert time.monotonic() - started < 3.0
    assert len(asked(grid)) == 5
    assert len(asked(grid, f"query.{stage}")) == 4
    with pytest.raises(CandidateWaits):  # and nobody is asked again at once
        panel.verdict(proposal, Bench(everybody, False))
    assert len(asked(grid)) == 5 and not panel.due()


def ready(values: dict[str, Any], path: str) -> tuple[InProcessGrid, Proposal]:
    """Five hospitals, and a candidate: the base with every weight moved a little."""
    from client_app.app import app
    from server_app.first_base import first_base

    spec = ModelSpec(width=0.03125)
    first: Base = first_base(RunConfig.parse(values), spec)
    moved = {k: v + np.float32(0.01) for k, v in get_weights(build(spec, seed=0)).items()}
    return InProcessGrid(app, 5, values), Proposal(first, Rule(), moved, (), 0)


def judge(grid: InProcessGrid, values: dict[str, Any], folder: Path) -> FederatedJudge:
    return FederatedJudge(
        grid, RunConfig.parse(values), "run-1", folder / "judging.json", hospitals=5,
        say=lambda line: None,
    )  # fmt: skip


def test_fewer_than_the_cohort_are_not_even_asked(base: str, tmp_path: Path) -> None:
    values = {key.name: key.default for key in KEYS} | JUDGED | {"base": base}
    grid, proposal = ready(values, base)
    panel = judge(grid, values, tmp_path)
    three = {f"hospital-0{i}": 1000 + i for i in range(3)}
    with pytest.raises(CandidateWaits) as first:
        panel.verdict(proposal, Bench(three, False))
    with pytest.raises(CandidateWaits) as second:
        panel.verdict(proposal, Bench(three, False))
    assert first.value.news and not second.value.news
    with pytest.raises(VectorError) as never:
        panel.verdict(proposal, Bench(three, False, frozenset(three)))
    assert never.value.code == "judging-few"
    assert grid.log == []


def test_who_only_owes_an_answer_is_waited_for_a_little(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {key.name: key.default for key in KEYS} | JUDGED | {"base": base}
    grid, proposal = ready(values, base)
    delivered(grid, get_weights(build(ModelSpec(width=0.03125), seed=0)), monkeypatch)
    now = [100.0]
    panel = FederatedJudge(
        grid, RunConfig.parse(values), "run-1", tmp_path / "judging.json", hospitals=5,
        say=lambda line: None, clock=lambda: now[0],
    )  # fmt: skip
    four = Bench({f"hospital-0{i}": 1000 + i for i in range(4)}, True)
    with pytest.raises(CandidateWaits) as waits:
        panel.verdict(proposal, four)
    assert not waits.value.news and not asked(grid) and not panel.due()
    now[0] += federated.GRACE
    assert panel.due()
    assert panel.verdict(proposal, four).hospitals == tuple(sorted(four.able))


def test_a_killed_server_asks_the_same_hospitals_again_and_none_for_what_it_knows(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = counted(monkeypatch, lambda asked, name: (0, 4))
    settings = {**JUDGED, "base": base, "publish-every": 5, "publish-margin": 1.0}
    with pytest.raises(RoundError):
        run_in_process(settings, num_hospitals=5)
    before = kept()
    more = {**settings, "resume": the_run().name}
    with pytest.raises(RoundError, match="loses 20"):
        run_in_process(more, num_hospitals=5)
    assert len(told) == 5
    assert kept() == before
    # What may change on resume is the margin: the counts are known, and now they are enough.
    grid = run_in_process({**more, "publish-margin": 100.0}, num_hospitals=5)
    assert not asked(grid)
    assert gate(1)["lost"] == 20


def test_hospitals_judge_in_public_runs_as_little_as_before(base: str) -> None:
    grid = run_in_process({**TINY, "base": base, "publish-every": 3}, num_hospitals=3)
    assert not asked(grid)
    assert not (the_run() / "judging.json").exists()
    assert gate(1)["candidate"] is not None


def test_with_nobody_to_judge_whatever_comes_is_published(
    base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_in_process(
        {**TINY, "base": base, "publish-every": 3, "judged-by": "none", "publish-margin": 0.0},
        num_hospitals=3,
    )
    assert gate(1) == {"adopt": True, "candidate": None, "current": None, "margin": 0.0}
    assert "WITHOUT being judged" in capsys.readouterr().out


def test_what_the_hospitals_can_never_judge_is_refused_before_anybody_is_asked(base: str) -> None:
    for wrong, why in (
        ({"privacy": "local"}, "ε is for one vector"),
        ({"mode": "fedavg"}, "judges no candidates"),
        ({"min-cohort": 6}, "no candidate could ever be judged"),
    ):
        with pytest.raises(ConfigError, match=why) as caught:
            run_in_process({**JUDGED, "base": base, **wrong}, num_hospitals=5)
        assert caught.value.remedy
    assert not runs_directory().exists()


@pytest.mark.parametrize(
    ("gained", "lost", "errors", "adopt"),
    [
        (0, 0, 0.0, True), (5, 5, 0.0, True), (5, 6, 0.0, False), (0, 1, 1.0, True),
        (0, 2, 1.0, False), (30, 40, 1.0, False), (30, 38, 1.0, True), (30, 40, 2.0, True),
        (40, 30, 0.0, True),
    ],
)  # fmt: skip
def test_a_candidate_may_lose_so_many_standard_errors_more_images_than_it_gains(
    gained: int, lost: int, errors: float, adopt: bool
) -> None:
    found = HospitalsVerdict.of(gained, lost, ["a", "b", "c"], errors=errors)
    assert found.adopt is adopt
    assert found.margin == pytest.approx(errors * math.sqrt(gained + lost))
    assert json.loads(json.dumps(found.to_dict()))["gained"] == gained
    refusal = WorseAtHospitals(found)
    assert isinstance(refusal, GateRefusal) and refusal.code == "registry-gate"
    assert str(lost) in refusal.what

"""Whole runs under secure aggregation, with hospitals that drop out at any stage and return."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.errors import ConfigError, RoundError
from common.messages import Envelope, Report
from common.secagg import Identity, Roster, RosterEntry
from deploy.inprocess import Fault, InProcessGrid, run_in_process
from server_app.run_store import runs_directory

TINY: dict[str, Any] = {
    "dataset": "synthetic", "synthetic-size": 500, "partition": "iid", "rounds": 2,
    "local-epochs": 1, "batch-size": 16, "model-width": 0.03125, "privacy": "none",
    "partition-min-size": 5, "secagg": True, "stage-timeout": 3.0, "round-timeout": 20.0,
    "quorum": 0.5,
}  # fmt: skip
STAGES = ["train", "share", "masked", "consistency", "unmask"]


def at(stage: str, *hospitals: int) -> Any:
    kind = "train" if stage == "train" else f"query.{stage}"
    return lambda message_type, i, _: message_type == kind and i in hospitals


def newest() -> Path:
    return max(runs_directory().iterdir(), key=lambda d: d.stat().st_mtime_ns)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_secure_model_is_that_of_plain_fedavg() -> None:
    """Largest error 2^-20 of the range (update-range 1.0) after one round."""
    run_in_process({**TINY, "rounds": 1, "partition": "size-skew"}, num_hospitals=5)
    secure = load_file(newest() / "model.safetensors")
    run_in_process(
        {**TINY, "rounds": 1, "partition": "size-skew", "secagg": False}, num_hospitals=5
    )
    plain = load_file(newest() / "model.safetensors")
    worst = max(np.abs(secure[k].astype(float) - plain[k]).max() for k in plain)
    # One float32 rounding of a weight of size ~1 is 2^-24 on top.
    assert worst <= 2.0**-20 + 2.0**-23
    a, b = (lines(d)[1] for d in sorted(runs_directory().iterdir()))
    for figure in ("accuracy", "examples"):
        assert a["validation"][figure] == b["validation"][figure]
    assert a["train"]["examples"] == b["train"]["examples"]
    assert a["train"]["loss"] == pytest.approx(b["train"]["loss"], abs=1e-3)


def test_the_server_is_sent_no_report_no_update_and_no_figure_of_one_hospital(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[tuple[str, Any]] = []
    original = InProcessGrid._handle

    def watched(self: InProcessGrid, message: Any, partition_id: int) -> Any:
        reply = original(self, message, partition_id)
        sent.append((message.metadata.message_type, reply.content))
        return reply

    monkeypatch.setattr(InProcessGrid, "_handle", watched)
    run_in_process({**TINY, "rounds": 1}, num_hospitals=5)
    answers = [(kind, record) for kind, record in sent if kind != "query.greet"]
    assert (
        len(answers) == 2 * 5 * 5
    )  # one training round, one validation, five stages, five hospitals
    for _, record in answers:
        assert not record.metric_records
        assert set(record.config_records) == {"envelope"}
        assert set(record.config_records["envelope"]) <= {"version", "payload"}
        assert set(record.array_records) <= {"payload"}
    # Two hospitals' masked vectors tell nothing: their bytes are uniform, and far from any sum.
    masked = [Envelope.from_record(r).payload for kind, r in answers if kind == "query.masked"]
    body = np.frombuffer(masked[0][-8000:], dtype=np.uint8)
    assert np.bincount(body, minlength=256).std() < 4 * np.sqrt(8000 / 256)


@pytest.mark.parametrize(
    ("stage", "lost"),
    [pytest.param(stage, lost, marks=pytest.mark.slow if lost == "drop_request" else ())
     for stage in STAGES for lost in ("drop_request", "drop_reply")],
)  # fmt: skip
def test_one_of_five_may_drop_at_any_stage_and_is_named(stage: str, lost: str) -> None:
    fault = Fault(at(stage, 2), times=1, **{lost: True})
    settings = {**TINY, "round-timeout": 4.0 if stage == "train" else 20.0}
    run_in_process(settings, num_hospitals=5, faults=[fault])
    first, second = lines(newest())[1:]
    assert first["status"] == second["status"] == "ok"
    assert [(d["hospital"], d["stage"]) for d in first["dropped"]] == [("hospital-02", stage)]
    # A vector that was handed over counts, even if its hospital is gone at the end.
    handed_over = stage in ("consistency", "unmask")
    assert ("hospital-02" in first["contributed"]) == handed_over
    assert len(second["contributed"]) == 5


@pytest.mark.parametrize("stage", STAGES)
def test_two_of_five_dropping_fails_closed_and_the_next_round_is_clean(stage: str) -> None:
    fault = Fault(at(stage, 1, 3), times=2, drop_reply=True)
    settings = {**TINY, "round-timeout": 4.0 if stage == "train" else 20.0, "stage-timeout": 2.0}
    run_in_process(settings, num_hospitals=5, faults=[fault])
    first, second = lines(newest())[1:]
    assert first["status"] == "failed"
    assert "hospital-01" in first["reason"]
    assert first["contributed"] == []
    assert first["train"] is None
    assert second["status"] == "ok"
    assert len(second["contributed"]) == 5
    zero, one, two = ((newest() / f"round-000{i}.safetensors").read_bytes() for i in range(3))
    assert zero == one != two


def test_a_hospital_that_restarts_mid_round_is_refused_for_it_and_welcome_in_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = InProcessGrid._handle
    restarted: list[int] = []

    def crashing(self: InProcessGrid, message: Any, partition_id: int) -> Any:
        if message.metadata.message_type == "query.masked" and partition_id == 0 and not restarted:
            restarted.append(partition_id)
            self.restart(0)
        return original(self, message, partition_id)

    monkeypatch.setattr(InProcessGrid, "_handle", crashing)
    run_in_process(TINY, num_hospitals=5)
    first, second = lines(newest())[1:]
    assert [(d["hospital"], d["stage"]) for d in first["dropped"]] == [("hospital-00", "masked")]
    assert "secagg-no-round" in first["dropped"][0]["reason"]
    assert len(second["contributed"]) == 5


def test_nothing_of_a_round_is_left_at_the_node_after_it() -> None:
    grid = run_in_process(TINY, num_hospitals=5)
    for context in grid.contexts.values():
        assert set(context.state) == {"identity"}


def test_a_node_that_aborted_has_wiped_the_round() -> None:
    def broken(record: Any) -> Any:
        return Envelope(b"nonsense").to_record()

    fault = Fault(at("share", 4), times=1, edit_reply=broken)
    grid = run_in_process({**TINY, "rounds": 1}, num_hospitals=5, faults=[fault])
    # Its shares were refused, so it is asked nothing more; the validation round wipes the rest.
    assert set(grid.contexts[4].state) == {"identity"}
    assert lines(newest())[1]["dropped"][0]["reason"].startswith("refused: secagg-")


@pytest.mark.parametrize("hospitals", [4, 5])
def test_four_and_five_hospitals_work_with_threshold_four(hospitals: int) -> None:
    run_in_process({**TINY, "rounds": 1, "num-shares": hospitals}, num_hospitals=hospitals)
    assert len(lines(newest())[1]["contributed"]) == hospitals


def test_three_hospitals_fail_closed_and_the_reason_is_said() -> None:
    with pytest.raises(ConfigError, match=r"3 hospitals: at least 4 are needed.*threshold"):
        run_in_process(TINY, num_hospitals=3)


def test_three_of_five_that_finish_training_fail_closed_and_the_reason_is_said() -> None:
    fault = Fault(at("train", 0, 1), drop_request=True)
    with pytest.raises(RoundError, match="3 of 5 hospitals advertised"):
        run_in_process({**TINY, "rounds": 1, "round-timeout": 3.0}, num_hospitals=5, faults=[fault])


def test_more_shares_than_hospitals_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="set num-shares=4"):
        run_in_process(TINY, num_hospitals=4)


def test_a_larger_cohort_takes_a_ring_of_neighbours() -> None:
    grid = run_in_process({**TINY, "rounds": 1, "synthetic-size": 800}, num_hospitals=9)
    assert len(lines(newest())[1]["contributed"]) == 9
    assert grid.num_hospitals == 9


def test_a_private_run_under_secure_aggregation_keeps_its_promise() -> None:
    run_in_process({**TINY, "privacy": "local", "delta": 1e-3}, num_hospitals=5)
    summary = json.loads((newest() / "summary.json").read_text())
    assert summary["secagg"] is True
    assert len(summary["epsilon_by_hospital"]) == 5
    assert 5.9 < summary["epsilon"] <= 6.0


# Identity ------------------------------------------------------------------------------


@pytest.fixture
def enrolled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Five hospitals with identity files and a roster that the coordinator signed."""
    coordinator = Identity.generate()
    identities = [Identity.generate() for _ in range(5)]
    entries = tuple(
        RosterEntry(f"hospital-0{i}", identity.public, "2020-01-01", "2099-12-31")
        for i, identity in enumerate(identities)
    )
    (tmp_path / "roster.json").write_bytes(Roster("test", entries).sign(coordinator))
    key = base64.b64encode(coordinator.public).decode()
    for i, identity in enumerate(identities):
        (tmp_path / f"identity-{i}").write_bytes(identity.private_bytes())
    original = InProcessGrid._context

    def with_files(self: InProcessGrid, i: int) -> Any:
        context = original(self, i)
        context.node_config |= {
            "identity": str(tmp_path / f"identity-{i}"),
            "roster": str(tmp_path / "roster.json"),
            "coordinator-key": key,
        }
        return context

    monkeypatch.setattr(InProcessGrid, "_context", with_files)
    return {"roster": str(tmp_path / "roster.json"), "coordinator-key": key}


def test_with_a_roster_enrolled_hospitals_take_part(enrolled: dict[str, Any]) -> None:
    run_in_process({**TINY, "rounds": 1, **enrolled}, num_hospitals=5)
    assert len(lines(newest())[1]["contributed"]) == 5


def test_with_a_roster_a_hospital_with_another_key_is_refused(
    enrolled: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "identity-3").write_bytes(Identity.generate().private_bytes())
    run_in_process({**TINY, "rounds": 1, **enrolled}, num_hospitals=5)
    record = lines(newest())[1]
    assert record["contributed"] == ["hospital-00", "hospital-01", "hospital-02", "hospital-04"]
    assert "secagg-" in record["dropped"][0]["reason"]


def test_hospitals_refuse_a_peer_that_a_server_without_a_roster_lets_in(
    enrolled: dict[str, Any], tmp_path: Path
) -> None:
    """The server does not check; each honest hospital does, and nothing is opened."""
    (tmp_path / "identity-3").write_bytes(Identity.generate().private_bytes())
    with pytest.raises(RoundError):
        run_in_process({**TINY, "rounds": 1}, num_hospitals=5)
    record = lines(newest())[1]
    assert record["contributed"] == []
    refused = {d["hospital"] for d in record["dropped"] if "secagg-" in d["reason"]}
    assert refused >= {"hospital-00", "hospital-01", "hospital-02", "hospital-04"}


def test_a_roster_that_another_coordinator_signed_is_refused(
    enrolled: dict[str, Any], tmp_path: Path
) -> None:
    roster = Roster("test", ())
    (tmp_path / "roster.json").write_bytes(roster.sign(Identity.generate()))
    with pytest.raises(Exception, match="not signed by the coordinator"):
        run_in_process({**TINY, "rounds": 1, **enrolled}, num_hospitals=5)


# Policy --------------------------------------------------------------------------------


def with_policy(text: str) -> None:
    from common.files import consilium_home

    consilium_home().mkdir(parents=True, exist_ok=True)
    (consilium_home() / "policy.toml").write_text(text)


@pytest.mark.parametrize(
    ("policy", "settings", "code"),
    [
        ('secagg = "required"', {"secagg": False}, "policy"),
        ("min-cohort = 6\nrequire-roster = false", {"min-cohort": 5}, "secagg-policy"),
        (
            "min-threshold = 4\nrequire-roster = false",
            {"reconstruction-threshold": 3, "num-shares": 3, "min-cohort": 4},
            "secagg-policy",
        ),
        ("require-roster = true", {}, "secagg-roster"),
    ],
)
def test_a_server_that_asks_for_less_than_the_policy_is_refused(
    policy: str, settings: dict[str, Any], code: str
) -> None:
    with_policy(f"version = 1\n[aggregation]\n{policy}\n")
    with pytest.raises(RoundError):
        run_in_process({**TINY, "rounds": 1, **settings}, num_hospitals=5)
    record = lines(newest())[1]
    assert record["contributed"] == []
    assert {d["reason"].split(" (")[0] for d in record["dropped"]} == {f"refused: {code}"}


def test_a_policy_that_is_met_lets_the_round_through() -> None:
    with_policy(
        "version = 1\n[aggregation]\nmin-cohort = 5\nrequire-roster = false\n"
        "[privacy]\nallow-non-private = true\n"
    )
    run_in_process({**TINY, "rounds": 1, "min-cohort": 5}, num_hospitals=5)
    assert len(lines(newest())[1]["contributed"]) == 5


def test_a_request_that_would_bypass_aggregation_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run config says secagg; the server, lying, asks for the updates in the clear."""
    from server_app import fedavg

    def clear(grid: Any, cohort: Any, job: Any, config: Any, *, train: bool, **_: Any) -> Any:
        return fedavg.plain_round(grid, cohort, job, train=train, timeout=config.round_timeout)

    monkeypatch.setattr(fedavg, "secure_round", clear)
    received: list[Any] = []
    read = Report.from_record.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(
        Report, "from_record",
        classmethod(lambda cls, record, **k: received.append(record) or read(cls, record, **k)),
    )  # fmt: skip
    with pytest.raises(RoundError, match="0 of 5"):
        run_in_process({**TINY, "rounds": 1}, num_hospitals=5)
    assert received == []
    assert {d["reason"].split(" (")[0] for d in lines(newest())[1]["dropped"]} == {
        "refused: policy"
    }


# Malicious servers ---------------------------------------------------------------------


def test_a_server_that_runs_the_same_round_again_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two sums over cohorts that differ in one hospital would show its input."""
    from server_app import fedavg
    from server_app.secure_round import secure_round

    outcomes: list[Any] = []

    def twice(*args: Any, **kwargs: Any) -> Any:
        first = secure_round(*args, **kwargs)
        grid, cohort, *rest = args
        smaller = dict(list(cohort.items())[1:])
        again = secure_round(grid, smaller, *rest, **kwargs)
        outcomes.append(again)
        return first

    monkeypatch.setattr(fedavg, "secure_round", twice)
    run_in_process({**TINY, "rounds": 1, "num-shares": 5}, num_hospitals=6)
    for again in outcomes:
        assert again.contributed == []
        assert {a.reason.split(" (")[0] for a in again.absent} == {"refused: secagg-repeated"}


def test_a_server_that_asks_for_a_finer_scale_or_another_layout_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from common.secagg import VectorLayout
    from server_app import secure_round as module

    original = module.layout_for

    def other(purpose: str, length: int, config: Any, **more: Any) -> VectorLayout:
        layout = original(purpose, length, config, **more)
        return VectorLayout(layout.segments, layout.max_weight * 2) if purpose == "validate" else (
            VectorLayout((*layout.segments[:-1],), layout.max_weight)
        )  # fmt: skip

    monkeypatch.setattr(module, "layout_for", other)
    with pytest.raises(RoundError):
        run_in_process({**TINY, "rounds": 1}, num_hospitals=5)
    assert {d["reason"].split(" (")[0] for d in lines(newest())[1]["dropped"]} == {
        "refused: secagg-layout"
    }


def test_a_server_that_sends_hospitals_different_models_gets_no_sum() -> None:
    """The binding names the model's hash; a hospital that got another one refuses."""
    from client_app.app import app
    from common.config import KEYS, RunConfig
    from common.messages import Job
    from common.model import ModelSpec, build, get_weights
    from server_app import secure_round as module

    values = {key.name: key.default for key in KEYS} | TINY
    grid = InProcessGrid(app, 5, values)
    spec = ModelSpec(width=TINY["model-width"])
    weights = get_weights(build(spec, seed=0))
    original = module._Talk.stage

    def split(self: Any, stage: str, content: Any, collect: Any, **kwargs: Any) -> None:
        def lying(name: str) -> Any:
            if stage != "train" or name != "hospital-02":
                return content(name)
            job = Job.from_record(content(name))
            bad = {k: v + 1 for k, v in job.weights.items()}
            return Job(job.run, job.round, job.model_digest, bad, job.invitation).to_record()

        original(self, stage, lying, collect, **kwargs)

    module._Talk.stage = split  # type: ignore[method-assign]
    try:
        cohort = {f"hospital-0{i}": 1000 + i for i in range(5)}
        job = Job("run-1", 1, spec.digest(), weights)
        outcome = module.secure_round(grid, cohort, job, RunConfig.parse(values), train=True)
    finally:
        module._Talk.stage = original  # type: ignore[method-assign]
    assert [(a.hospital, a.reason.split(" (")[0]) for a in outcome.absent] == [
        ("hospital-02", "refused: secagg-model")
    ]
    assert "hospital-02" not in outcome.contributed

"""Whole runs under secure aggregation, with hospitals that drop out at any stage and return."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.errors import ConfigError, RoundError
from common.messages import Envelope
from deploy.inprocess import Fault, InProcessGrid, run_in_process
from server_app.run_store import runs_directory
from tests.server_app.running import SECURE, at, lines, newest

STAGES = ["train", "share", "masked", "consistency", "unmask"]


def test_the_secure_model_is_that_of_plain_fedavg() -> None:
    """Largest error 2^-20 of the range (update-range 1.0) after one round."""
    run_in_process({**SECURE, "rounds": 1, "partition": "size-skew"}, num_hospitals=5)
    secure = load_file(newest() / "model.safetensors")
    run_in_process(
        {**SECURE, "rounds": 1, "partition": "size-skew", "secagg": False}, num_hospitals=5
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
    run_in_process({**SECURE, "rounds": 1}, num_hospitals=5)
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
    settings = {**SECURE, "round-timeout": 4.0 if stage == "train" else 20.0}
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
    settings = {**SECURE, "round-timeout": 4.0 if stage == "train" else 20.0, "stage-timeout": 2.0}
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
    run_in_process(SECURE, num_hospitals=5)
    first, second = lines(newest())[1:]
    assert [(d["hospital"], d["stage"]) for d in first["dropped"]] == [("hospital-00", "masked")]
    assert "secagg-no-round" in first["dropped"][0]["reason"]
    assert len(second["contributed"]) == 5


def test_nothing_of_a_round_is_left_at_the_node_after_it() -> None:
    grid = run_in_process(SECURE, num_hospitals=5)
    for context in grid.contexts.values():
        assert set(context.state) == {"identity"}


def test_a_node_that_aborted_has_wiped_the_round() -> None:
    def broken(record: Any) -> Any:
        return Envelope(b"nonsense").to_record()

    fault = Fault(at("share", 4), times=1, edit_reply=broken)
    grid = run_in_process({**SECURE, "rounds": 1}, num_hospitals=5, faults=[fault])
    # Its shares were refused, so it is asked nothing more; the validation round wipes the rest.
    assert set(grid.contexts[4].state) == {"identity"}
    assert lines(newest())[1]["dropped"][0]["reason"].startswith("refused: secagg-")


@pytest.mark.parametrize("hospitals", [4, 5])
def test_four_and_five_hospitals_work_with_threshold_four(hospitals: int) -> None:
    run_in_process({**SECURE, "rounds": 1, "num-shares": hospitals}, num_hospitals=hospitals)
    assert len(lines(newest())[1]["contributed"]) == hospitals


def test_three_hospitals_fail_closed_and_the_reason_is_said() -> None:
    with pytest.raises(ConfigError, match=r"3 hospitals: at least 4 are needed.*threshold"):
        run_in_process(SECURE, num_hospitals=3)


def test_three_of_five_that_finish_training_fail_closed_and_the_reason_is_said() -> None:
    fault = Fault(at("train", 0, 1), drop_request=True)
    with pytest.raises(RoundError, match="3 of 5 hospitals advertised"):
        run_in_process(
            {**SECURE, "rounds": 1, "round-timeout": 3.0}, num_hospitals=5, faults=[fault]
        )


def test_more_shares_than_hospitals_are_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match="set num-shares=4"):
        run_in_process(SECURE, num_hospitals=4)


def test_a_larger_cohort_takes_a_ring_of_neighbours() -> None:
    grid = run_in_process({**SECURE, "rounds": 1, "synthetic-size": 800}, num_hospitals=9)
    assert len(lines(newest())[1]["contributed"]) == 9
    assert grid.num_hospitals == 9


def test_a_private_run_under_secure_aggregation_keeps_its_promise() -> None:
    # Time enough to calibrate the noise on a busy machine.
    values = {**SECURE, "privacy": "local", "delta": 1e-3, "round-timeout": 600.0}
    run_in_process(values, num_hospitals=5)
    summary = json.loads((newest() / "summary.json").read_text())
    assert summary["secagg"] is True
    assert len(summary["epsilon_by_hospital"]) == 5
    assert 5.9 < summary["epsilon"] <= 6.0

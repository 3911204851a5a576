"""A run that goes on: what hospitals take back is heard before anything is made or concluded."""

from __future__ import annotations

import time
from typing import Any

import pytest
from safetensors.numpy import load_file

from common.errors import ConfigError, RoundError
from deploy.inprocess import Fault, InProcessGrid, run_in_process
from server_app.registry import Registry
from server_app.vectors import letters
from server_app.vectors.public import Judge
from server_app.vectors.record import Journal
from tests.server_app.test_report import words
from tests.server_app.vectors.judging import JUDGED, counted, gate, soon
from tests.server_app.vectors.running import (
    TINY,
    Killed,
    after,
    lines,
    outbox,
    registry,
    states,
    summary,
    the_run,
    withdrawn,
)

__all__ = ["soon"]  # fixtures


def refuse_all(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """On public images the first base is the best that there can be."""
    start = load_file(path)

    def call(self: Any, weights: Any) -> float:
        return 0.9 if all((weights[k] == v).all() for k, v in start.items()) else 0.1

    monkeypatch.setattr(Judge, "__call__", call)


def test_a_run_that_is_stuck_hears_what_was_taken_back_before_it_ends_again(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_all(monkeypatch, base)
    settings = {**TINY, "base": base, "publish-every": 3, "publish-margin": 1.0}
    with pytest.raises(RoundError, match="no base 1"):
        run_in_process(settings, num_hospitals=3)
    assert {item.state for i in range(3) for item in outbox(i).items()} == {"sent"}
    serial = withdrawn(2)
    more = {**settings, "resume": the_run().name}
    for _ in range(2):
        with pytest.raises(RoundError, match="no base 1"):
            run_in_process(more, num_hospitals=3)
        assert states()[serial] == "withdrawn"
        assert [row["serial"] for row in lines("withdrawal")] == [serial]
        assert outbox(2).items()[0].state == "withdrawn"


def test_a_run_that_is_complete_hears_what_was_taken_back_and_trains_nothing(base: str) -> None:
    settings = {**TINY, "base": base, "publish-every": 4}
    run_in_process(settings, num_hospitals=4)
    serial = withdrawn(1)
    grid = run_in_process({**settings, "resume": the_run().name}, num_hospitals=4)
    assert {kind for kind, _, _ in grid.log} == {"query.greet", "query.receipt"}
    assert (states()[serial], outbox(1).items()[0].state) == ("withdrawn", "withdrawn")
    assert summary()["status"] == "completed"
    model = load_file(the_run() / "model.safetensors")
    with registry() as kept:
        assert kept.log().recipes[1] and kept.rebuild() == []
        assert all((model[k] == v).all() for k, v in kept.current().weights.items())


def test_no_base_is_published_of_what_was_taken_back_while_the_server_was_away(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**TINY, "base": base, "publish-every": 3}
    with monkeypatch.context() as context:
        after(4, Registry, "accept", context)
        context.setattr("server_app.vectors.run.VectorsRun.conclude", lambda *_: None)
        with pytest.raises(Killed):
            run_in_process({**settings, "publish-every": 4}, num_hospitals=4)
    withdrawn(2)
    run_in_process({**settings, "resume": the_run().name}, num_hospitals=4)
    first, second = lines("base")
    assert (first["why"], second["why"]) == ("first", "published")
    assert second["hospitals"] == [f"hospital-0{i}" for i in (0, 1, 3)]


def test_a_hospital_that_says_nothing_holds_a_resumed_run_up_for_a_while_only(
    base: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**TINY, "base": base, "publish-every": 3}
    run_in_process(settings, num_hospitals=3)
    serial = withdrawn(1)
    monkeypatch.setattr(letters, "HEARING", 1.0)
    monkeypatch.setattr(letters, "FAREWELL", 1.0)
    silent = Fault(lambda kind, i, _: kind == "query.receipt" and i == 0, drop_reply=True)
    started = time.monotonic()
    run_in_process(
        {**settings, "resume": the_run().name}, num_hospitals=3, workers=3, faults=[silent]
    )
    assert time.monotonic() - started < 20
    assert states()[serial] == "withdrawn"
    said = capsys.readouterr().out
    assert "hospital-00: did not say in time whether it takes a vector back" in said


def test_a_hospital_whose_node_fails_once_is_asked_again_what_it_takes_back(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**TINY, "base": base, "publish-every": 3}
    run_in_process(settings, num_hospitals=3)
    serial = withdrawn(1)
    failed: list[int] = []
    handle = InProcessGrid._handle

    def fails(self: InProcessGrid, message: Any, partition_id: int) -> Any:
        if message.metadata.message_type == "query.receipt" and partition_id == 1 and not failed:
            failed.append(1)
            message.metadata.__dict__["_message_type"] = "query.nothing"
        return handle(self, message, partition_id)

    monkeypatch.setattr(InProcessGrid, "_handle", fails)
    run_in_process({**settings, "resume": the_run().name}, num_hospitals=3)
    assert failed and states()[serial] == "withdrawn"


def test_a_withdrawal_is_told_once_though_the_server_was_killed_before_it_could_confirm_it(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**TINY, "base": base, "publish-every": 3}
    run_in_process(settings, num_hospitals=3)
    serial = withdrawn(1)
    more = {**settings, "resume": the_run().name}
    for owner, name, known in ((Registry, "withdraw", 0), (Journal, "withdrawal", 1)):
        with monkeypatch.context() as context:
            after(1, owner, name, context)
            context.setattr("server_app.vectors.run.VectorsRun.conclude", lambda *_: None)
            with pytest.raises(Killed):
                run_in_process(more, num_hospitals=3)
        assert len(lines("withdrawal")) == known
        assert outbox(1).items()[0].state == "withdrawal waits"
    run_in_process(more, num_hospitals=3)
    assert [row["serial"] for row in lines("withdrawal")] == [serial]
    assert outbox(1).items()[0].state == "withdrawn"
    assert "0 excluded, 1 taken back" in words(the_run())


def test_no_file_of_the_run_holds_what_was_taken_back_even_if_the_server_is_killed_then(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = load_file(base)

    def call(self: Any, weights: Any) -> float:
        return 0.1 if all((weights[k] == v).all() for k, v in start.items()) else 0.9

    monkeypatch.setattr(Judge, "__call__", call)
    settings = {**TINY, "base": base, "publish-every": 3}
    run_in_process(settings, num_hospitals=3)
    assert summary()["best_version"] == 1
    withdrawn(1)
    after(2, Journal, "_files", monkeypatch)  # the first is of the opening
    monkeypatch.setattr("server_app.vectors.run.VectorsRun.conclude", lambda *_: None)
    with pytest.raises(Killed):
        run_in_process({**settings, "resume": the_run().name}, num_hospitals=3)
    with registry() as kept:
        stand = [kept.base(row.version).weights for row in kept.log().line]
    for name in ("model", "best"):
        found = load_file(the_run() / f"{name}.safetensors")
        assert any(all((found[k] == v).all() for k, v in one.items()) for one in stand), name


def test_the_report_says_of_whom_a_base_is_that_was_made_anew(base: str) -> None:
    settings = {**TINY, "base": base, "publish-every": 4}
    run_in_process(settings, num_hospitals=4)
    with registry() as kept:
        mine = {row.hospital: row.serial for row in kept.log().vectors}
        made = kept.current().id
    withdrawn(2)
    more = {**settings, "resume": the_run().name}
    run_in_process(more, num_hospitals=4)
    left = [f"hospital-0{i}" for i in (0, 1, 3)]
    row = lines("base")[-1]
    assert row["base"] != made
    assert (row["version"], row["vectors"], row["hospitals"]) == (1, 3, left)
    why = "made anew without a vector that hospital-02 took back"
    assert f"{why} 3 {', '.join(left)}" in words(the_run())
    with registry() as kept:
        kept.exclude(mine["hospital-00"], "by hand")
    run_in_process(more, num_hospitals=4)
    seen = words(the_run())
    assert "made anew while the run was stopped 2 hospital-01, hospital-03" in seen
    assert "Bases were made anew or changed by hand" in seen


def test_a_base_whose_line_was_lost_is_told_with_its_hospitals(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**TINY, "base": base, "publish-every": 3}
    with monkeypatch.context() as context:
        after(1, Registry, "adopt", context)
        context.setattr("server_app.vectors.run.VectorsRun.conclude", lambda *_: None)
        with pytest.raises(Killed):
            run_in_process(settings, num_hospitals=3)
    run_in_process({**settings, "resume": the_run().name}, num_hospitals=3)
    (row,) = lines("base")[1:]
    assert row["why"] == "published before the run was stopped"
    assert (row["vectors"], row["hospitals"]) == (3, [f"hospital-0{i}" for i in range(3)])
    assert row["gate"] == gate(1)


def test_a_late_vector_whose_line_was_lost_is_told_as_late(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth hospital answers after the base that the other three make."""
    settings = {**TINY, "base": base, "publish-every": 3}
    late = Fault(lambda kind, i, _: kind == "query.offer" and i == 3, delay_polls=40, times=1)
    accept = Registry.accept

    def dies(self: Registry, envelope: bytes, identities: Any) -> Any:
        accepted = accept(self, envelope, identities)
        if accepted.staleness:
            raise Killed
        return accepted

    with monkeypatch.context() as context:
        context.setattr(Registry, "accept", dies)
        context.setattr("server_app.vectors.run.VectorsRun.conclude", lambda *_: None)
        with pytest.raises(Killed):
            run_in_process({**settings, "versions": 8}, num_hospitals=4, faults=[late])
    with registry() as kept:
        entry = kept.vectors()[-1]
    assert entry.row.hospital == "hospital-03" and entry.staleness
    assert entry.row.serial not in {row["serial"] for row in lines("arrival")}
    run_in_process({**settings, "resume": the_run().name}, num_hospitals=4)
    (told,) = [row for row in lines("arrival") if row["serial"] == entry.row.serial]
    assert told["staleness"] == entry.staleness


def test_where_hospitals_judge_a_base_that_is_made_anew_is_trained_from_and_judged_anew(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They judge no base that they made no vector from, and all had delivered for the old one."""
    counted(monkeypatch, lambda asked, name: (1, 1))
    monkeypatch.setattr(letters, "KNOCK", 0.0)
    taken: list[str] = []
    handle = InProcessGrid._handle

    def takes_back(self: InProcessGrid, message: Any, partition_id: int) -> Any:
        m = message.metadata
        if (m.message_type, m.group_id, partition_id) == ("query.offer", "1", 4) and not taken:
            taken.append(withdrawn(2))
        return handle(self, message, partition_id)

    monkeypatch.setattr(InProcessGrid, "_handle", takes_back)
    last = Fault(
        lambda kind, i, group: kind == "query.offer" and i == 4 and group == "1",
        delay_polls=60, times=1,
    )  # fmt: skip
    run_in_process({**JUDGED, "base": base, "publish-every": 5, "versions": 2, "duration": 60.0},
                   num_hospitals=5, workers=5, faults=[last])  # fmt: skip
    assert states()[taken[0]] == "withdrawn"
    assert summary()["bases"] == 2
    assert len(gate(2)["hospitals"]) >= 4
    with registry() as kept:
        recipe = kept.log().recipes[2]
        assert len(recipe) == len({i.row.hospital for i in recipe}) == 5
        assert {i.staleness for i in recipe} == {0}


def test_a_resumed_run_that_is_complete_asks_nobody(base: str) -> None:
    settings = {**TINY, "base": base, "publish-every": 3}
    run_in_process(settings, num_hospitals=3)
    before = (the_run() / "model.safetensors").read_bytes()
    grid = run_in_process({**settings, "resume": the_run().name}, num_hospitals=3)
    assert not [kind for kind, _, _ in grid.log if kind == "query.offer"]
    assert (the_run() / "model.safetensors").read_bytes() == before
    more = {**settings, "resume": the_run().name, "versions": 2}
    run_in_process(more, num_hospitals=3)
    assert summary()["bases"] == 2
    with pytest.raises(ConfigError, match="seed"):
        run_in_process({**more, "seed": 5}, num_hospitals=3)

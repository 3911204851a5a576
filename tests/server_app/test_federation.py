"""Whole runs in the in-process grid, with hospitals that fail, lie, repeat and come back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from safetensors.numpy import load_file

from common.errors import ConfigError, DataError, RoundError
from common.messages import arrays_to_record, record_to_arrays
from deploy.inprocess import Fault, InProcessGrid, run_in_process
from server_app.run_store import runs_directory
from tests.server_app.running import lines, the_run

TINY: dict[str, Any] = {
    "dataset": "synthetic", "synthetic-size": 400, "partition": "iid", "rounds": 2,
    "local-epochs": 1, "batch-size": 16, "model-width": 0.03125, "privacy": "none",
    "partition-min-size": 5, "secagg": False, "learning-rate-schedule": "constant",
}  # fmt: skip


def is_train(partition_id: int) -> Any:
    return lambda kind, i, _: kind == "train" and i == partition_id


def test_a_run_leaves_everything_that_it_promises() -> None:
    run_in_process(TINY, num_hospitals=4)
    files = {p.name for p in the_run().iterdir()}
    assert files >= {
        "config.json", "partition.json", "metrics.jsonl", "round-0000.safetensors",
        "round-0001.safetensors", "round-0002.safetensors", "best.safetensors",
        "model.safetensors", "summary.json", "report.html",
    }  # fmt: skip
    summary = json.loads((the_run() / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["rounds"] == 2
    assert summary["epsilon"] is None
    assert "synthetic" in summary["source"]
    assert len(summary["source_sha256"]) == 64
    assert summary["versions"]["flwr"] == "1.41.0"
    records = lines(the_run())
    assert [r["round"] for r in records] == [0, 1, 2]
    assert all(r["validation"]["examples"] > 0 for r in records)  # the last one's too
    assert all(
        set(r["test"]) >= {"accuracy", "macro_f1", "macro_auc", "per_class"} for r in records
    )
    assert (
        records[2]["contributed"] == records[2]["expected"] == [f"hospital-0{i}" for i in range(4)]
    )


def test_equal_seeds_give_the_same_model_bit_for_bit_in_any_order_of_arrival() -> None:
    late = Fault(lambda kind, i, _: kind == "train" and i == 0, delay_polls=3)
    run_in_process(TINY, num_hospitals=3)
    run_in_process(TINY, num_hospitals=3, faults=[late], workers=2)
    one, two = sorted(runs_directory().iterdir())
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    run_in_process({**TINY, "seed": 1}, num_hospitals=3)
    assert len({(d / "model.safetensors").read_bytes() for d in runs_directory().iterdir()}) == 2


def test_the_mean_is_weighted_by_images() -> None:
    """Two hospitals whose updates are replaced by constants: the model moves by their mean."""

    def constant(value: float) -> Any:
        def edit(record: RecordDict) -> RecordDict:
            update = record_to_arrays(record, "update")
            filled = {k: np.full_like(v, value) for k, v in update.items()}
            record["update"] = arrays_to_record(filled)
            return record

        return edit

    faults = [Fault(is_train(i), edit_reply=constant(v)) for i, v in ((0, 0.25), (1, 1.0))]
    run_in_process({**TINY, "partition": "size-skew", "rounds": 1}, num_hospitals=2, faults=faults)
    rows = json.loads((the_run() / "partition.json").read_text())["hospitals"]
    n0, n1 = rows[0]["train"], rows[1]["train"]
    assert n0 != n1
    before = load_file(the_run() / "round-0000.safetensors")
    after = load_file(the_run() / "round-0001.safetensors")
    for name in before:
        moved = after[name] - before[name]
        np.testing.assert_allclose(moved, (0.25 * n0 + 1.0 * n1) / (n0 + n1), atol=1e-6)


@pytest.mark.parametrize("lost", ["drop_request", "drop_reply"])
def test_a_lost_message_drops_one_hospital_for_one_round_and_is_named(lost: str) -> None:
    fault = Fault(is_train(2), times=1, **{lost: True})
    run_in_process({**TINY, "round-timeout": 4.0, "quorum": 0.5}, num_hospitals=3, faults=[fault])
    first, second = lines(the_run())[1:]
    assert first["contributed"] == ["hospital-00", "hospital-01"]
    assert first["dropped"] == [
        {"hospital": "hospital-02", "stage": "train", "reason": "no answer within 4 s"}
    ]
    assert len(second["contributed"]) == 3


def test_a_repeated_message_changes_nothing() -> None:
    run_in_process(TINY, num_hospitals=2)
    run_in_process(TINY, num_hospitals=2, faults=[Fault(is_train(0), repeat=2)])
    one, two = sorted(runs_directory().iterdir())
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def corrupted(record: RecordDict) -> RecordDict:
    update = record_to_arrays(record, "update")
    name = next(iter(update))
    update[name] = np.full_like(update[name], np.nan)
    record["update"] = arrays_to_record(update)
    return record


def truncated(record: RecordDict) -> RecordDict:
    update = record_to_arrays(record, "update")
    update.pop(next(iter(update)))
    record["update"] = arrays_to_record(update)
    return record


def impostor(record: RecordDict) -> RecordDict:
    record.config_records["report"]["hospital"] = "hospital-00"
    return record


def stale(record: RecordDict) -> RecordDict:
    record.config_records["report"]["round"] = 0
    return record


def garbage(record: RecordDict) -> RecordDict:
    return RecordDict({"something": ConfigRecord({"else": 1})})


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (corrupted, "NaN"), (truncated, "lacks"), (impostor, "answers as"), (stale, "belongs to"),
        (garbage, "no 'report' record"),
    ],
)  # fmt: skip
def test_a_bad_answer_drops_its_hospital_with_the_reason_and_spoils_nothing(
    edit: Any, reason: str
) -> None:
    run_in_process(
        {**TINY, "rounds": 1, "quorum": 0.5}, num_hospitals=3,
        faults=[Fault(is_train(1), edit_reply=edit)],
    )  # fmt: skip
    record = lines(the_run())[1]
    assert record["contributed"] == ["hospital-00", "hospital-02"]
    assert record["dropped"][0]["hospital"] == "hospital-01"
    assert reason in record["dropped"][0]["reason"]
    model = load_file(the_run() / "model.safetensors")
    assert all(np.isfinite(v).all() for v in model.values())


def test_a_round_below_its_quorum_leaves_the_model_unchanged_and_the_next_one_starts() -> None:
    faults = [Fault(is_train(i), times=1, drop_reply=True) for i in (0, 1)]
    run_in_process({**TINY, "rounds": 2, "round-timeout": 3.0}, num_hospitals=3, faults=faults)
    first, second = lines(the_run())[1:]
    assert first["status"] == "failed"
    assert "1 of 3 hospitals" in first["reason"]
    assert second["status"] == "ok"
    d = the_run()
    zero, one, two = ((d / f"round-000{i}.safetensors").read_bytes() for i in range(3))
    assert zero == one != two


def test_a_run_that_keeps_failing_says_so_and_can_be_resumed() -> None:
    always = Fault(lambda kind, *_: kind == "train", drop_request=True)
    settings = {**TINY, "rounds": 5, "round-timeout": 0.3}
    with pytest.raises(RoundError, match="round 3 failed"):
        run_in_process(settings, num_hospitals=2, faults=[always])
    run = the_run()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["failed_rounds"] == [1, 2, 3]
    assert (run / "report.html").exists()
    run_in_process({**TINY, "rounds": 5, "resume": run.name}, num_hospitals=2)
    assert [r["round"] for r in lines(run)] == [0, 1, 2, 3, 4, 5]
    assert json.loads((run / "summary.json").read_text())["status"] == "completed"


def test_a_resumed_run_ends_with_the_same_model_as_one_that_was_never_stopped() -> None:
    run_in_process({**TINY, "rounds": 3}, num_hospitals=2)
    (whole,) = runs_directory().iterdir()
    run_in_process({**TINY, "rounds": 1}, num_hospitals=2)
    (stopped,) = set(runs_directory().iterdir()) - {whole}
    run_in_process({**TINY, "rounds": 3, "resume": stopped.name}, num_hospitals=2)
    assert (whole / "model.safetensors").read_bytes() == (
        stopped / "model.safetensors"
    ).read_bytes()


def test_training_starts_from_the_base_that_is_named_a_file_or_a_run() -> None:
    run_in_process({**TINY, "rounds": 1}, num_hospitals=2)
    first = the_run()
    best = load_file(first / "best.safetensors")
    seen = {first}
    for base in (str(first / "best.safetensors"), first.name):
        run_in_process({**TINY, "rounds": 1, "base": base}, num_hospitals=2)
        (run,) = set(runs_directory().iterdir()) - seen
        seen.add(run)
        start = load_file(run / "round-0000.safetensors")
        assert all((start[k] == best[k]).all() for k in best)


def test_a_fraction_of_the_hospitals_is_asked_and_who_depends_on_the_seed() -> None:
    run_in_process({**TINY, "fraction": 0.5, "rounds": 4}, num_hospitals=4)
    asked = [tuple(r["expected"]) for r in lines(the_run())[1:]]
    assert all(len(names) == 2 for names in asked)
    assert len(set(asked)) > 1


def test_a_hospital_that_is_gone_and_returns_takes_part_again() -> None:
    from client_app.app import app

    grid = InProcessGrid(app, 3, TINY)
    from server_app.directory import Directory

    directory = Directory(grid)
    directory.wait_for(3, timeout=5)
    grid.offline.add(1)
    directory.refresh()
    assert directory.names == [f"hospital-0{i}" for i in range(3)]
    assert list(directory.reach(directory.names)[0]) == ["hospital-00", "hospital-02"]
    assert directory.reach(directory.names)[1] == ["hospital-01"]
    grid.offline.clear()
    directory.refresh()
    assert len(directory.reach(directory.names)[0]) == 3


def test_a_hospital_that_is_not_connected_is_missed_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle = InProcessGrid._handle

    def leaves(self: InProcessGrid, message: Any, partition_id: int) -> Any:
        if message.metadata.message_type == "train" and partition_id == 0:
            self.offline.add(2)
        return handle(self, message, partition_id)

    monkeypatch.setattr(InProcessGrid, "_handle", leaves)
    run_in_process({**TINY, "quorum": 0.5, "rounds": 2}, num_hospitals=3)
    second = lines(the_run())[2]
    assert second["expected"] == [f"hospital-0{i}" for i in range(3)]
    assert second["dropped"] == [
        {"hospital": "hospital-02", "stage": "train", "reason": "its node is not connected"}
    ]


def test_two_nodes_that_claim_one_name_are_not_two_hospitals() -> None:
    from client_app.app import app
    from common.messages import Greeting
    from server_app.directory import Directory

    claims = Fault(
        lambda kind, i, _: kind == "query.greet" and i == 1,
        edit_reply=lambda record: Greeting("hospital-00").to_record(),
    )
    directory = Directory(InProcessGrid(app, 2, TINY, [claims]))
    absent = directory.refresh()
    assert [a.hospital for a in absent] == ["node 1000", "node 1001"]
    assert all("claim the name 'hospital-00'" in a.reason for a in absent)
    assert directory.names == []  # nothing says which of them it is


def test_momentum_repeats_a_share_of_the_last_step_also_after_a_resume() -> None:
    settings = {**TINY, "server-momentum": 0.5}
    run_in_process({**settings, "rounds": 3}, num_hospitals=2)
    (whole,) = runs_directory().iterdir()
    run_in_process({**settings, "rounds": 2}, num_hospitals=2)
    (stopped,) = set(runs_directory().iterdir()) - {whole}
    run_in_process({**settings, "rounds": 3, "resume": stopped.name}, num_hospitals=2)
    assert (whole / "model.safetensors").read_bytes() == (
        stopped / "model.safetensors"
    ).read_bytes()
    run_in_process({**TINY, "rounds": 3}, num_hospitals=2)
    (plain,) = set(runs_directory().iterdir()) - {whole, stopped}
    first, second = ((d / "round-0001.safetensors").read_bytes() for d in (whole, plain))
    assert first == second
    assert (whole / "round-0002.safetensors").read_bytes() != (
        plain / "round-0002.safetensors"
    ).read_bytes()


def test_hospitals_that_do_not_come_are_counted() -> None:
    from client_app.app import app
    from server_app.directory import Directory

    grid = InProcessGrid(app, 2, TINY)
    said: list[str] = []
    directory = Directory(grid, members=["hospital-00", "hospital-01", "st-mary"])
    with pytest.raises(RoundError, match="2 hospitals are there, 3 are needed"):
        directory.wait_for(3, timeout=0.3, pause=0.05, say=said.append)
    assert said == ["2 of 3 hospitals are there (st-mary not yet)"]  # once, not at each look


@pytest.mark.parametrize(
    "bad",
    [
        {"rounds": 0},
        {"typo": 1},
        {"model": "resnet9", "privacy": "local"},
        {"base": "/nowhere.safetensors"},
    ],
)
def test_a_wrong_configuration_stops_before_any_hospital_is_asked(
    bad: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = InProcessGrid.push_messages
    monkeypatch.setattr(
        InProcessGrid, "push_messages",
        lambda self, messages: asked.append(1) or original(self, messages),
    )  # fmt: skip
    with pytest.raises(ConfigError):
        run_in_process({**TINY, **bad}, num_hospitals=2)
    assert asked == []
    assert not runs_directory().exists()


def test_missing_data_stops_the_run_with_the_files_name() -> None:
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        run_in_process({**TINY, "dataset": "npz", "data-path": "/nowhere.npz"}, num_hospitals=2)


def test_resnet9_with_its_counters_is_averaged_too() -> None:
    run_in_process({**TINY, "model": "resnet9", "rounds": 1}, num_hospitals=2)
    model = load_file(the_run() / "model.safetensors")
    counters = [v for k, v in model.items() if k.endswith("num_batches_tracked")]
    assert counters
    assert all(c.dtype == np.int64 and c > 0 for c in counters)

"""Runs of vectors in the in-process grid: hospitals that are slow, away or ask again; the bases."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from safetensors.numpy import load_file

from common.errors import ConfigError, RoundError
from common.vectors import Base
from deploy.inprocess import Fault, InProcessGrid, run_in_process
from server_app.registry import Registry
from server_app.run_store import runs_directory
from server_app.vectors.public import Judge
from tests.server_app.vectors.running import TINY, is_offer, lines, registry, summary, the_run


def test_hospitals_of_different_speeds_publish_the_bases_that_were_asked_for(base: str) -> None:
    run_in_process(
        {**TINY, "base": base, "versions": 2, "publish-every": 3, "simulated-delay": 0.3},
        num_hospitals=5, workers=5,
    )  # fmt: skip
    files = {p.name for p in the_run().iterdir()}
    assert files >= {
        "config.json", "partition.json", "metrics.jsonl", "base.safetensors", "base.json",
        "model.safetensors", "best.safetensors", "summary.json", "registry",
    }  # fmt: skip
    told = summary()
    assert told["status"] == "completed"
    assert told["bases"] == 2
    published = lines("base")
    assert [row["version"] for row in published] == [0, 1, 2]
    assert all(row["vectors"] >= 3 and row["influence"]["rows"] for row in published[1:])
    assert all(0 <= row["validation"] <= 1 and "macro_f1" in row["test"] for row in published)
    arrivals = lines("arrival")
    assert len(arrivals) >= 6
    assert all(row["norm"] > 0 and row["bucket"] == 16 for row in arrivals)
    assert sum(told["by_hospital"][h]["vectors"] for h in told["by_hospital"]) == len(arrivals)
    with registry() as kept:
        current = kept.current()
        assert kept.rebuild() == []
    assert Base.load(the_run() / "base.safetensors").id == current.id
    model = load_file(the_run() / "model.safetensors")
    assert all((model[k] == v).all() for k, v in current.weights.items())


def test_a_hospital_that_is_away_at_first_joins_later(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, made = InProcessGrid._handle, InProcessGrid.__post_init__

    def away(self: InProcessGrid) -> None:
        made(self)
        self.offline.add(3)

    def returns(self: InProcessGrid, message: Any, partition_id: int) -> Any:
        if message.metadata.group_id == "1":
            self.offline.clear()
        return handle(self, message, partition_id)

    monkeypatch.setattr(InProcessGrid, "__post_init__", away)
    monkeypatch.setattr(InProcessGrid, "_handle", returns)
    run_in_process(
        {**TINY, "base": base, "versions": 2, "publish-every": 3, "publish-quorum": 3},
        num_hospitals=4,
    )  # fmt: skip
    first, second = lines("base")[1:]
    assert first["hospitals"] == ["hospital-00", "hospital-01", "hospital-02"]
    assert "hospital-03" in {row["hospital"] for row in lines("arrival")} | set(second["hospitals"])


@pytest.mark.parametrize("fault", [{"repeat": 2}, {"drop_reply": True, "times": 1}])
def test_what_is_repeated_or_lost_trains_once_and_counts_once(
    base: str, fault: dict[str, Any], trained: Counter[tuple[str, int]]
) -> None:
    run_in_process(
        {**TINY, "base": base, "publish-every": 3, "vector-timeout": 2.0},
        num_hospitals=3, faults=[Fault(is_offer(0), **fault)],
    )  # fmt: skip
    assert set(trained.values()) == {1}
    assert len(trained) == 3
    assert len(lines("arrival")) == 3
    assert lines("base")[1]["vectors"] == 3


def test_a_node_that_fails_is_asked_again(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[int] = []
    handle = InProcessGrid._handle

    def fails(self: InProcessGrid, message: Any, partition_id: int) -> Any:
        if message.metadata.message_type == "query.offer" and partition_id == 1 and not failed:
            failed.append(1)
            message.metadata.__dict__["_message_type"] = "query.nothing"
        return handle(self, message, partition_id)

    monkeypatch.setattr(InProcessGrid, "_handle", fails)
    run_in_process({**TINY, "base": base, "publish-every": 3}, num_hospitals=3)
    assert failed
    assert lines("base")[1]["hospitals"] == [f"hospital-0{i}" for i in range(3)]


def test_what_can_never_publish_is_refused_before_any_hospital_is_asked(base: str) -> None:
    for wrong in ({"publish-every": 4}, {"publish-quorum": 4}, {"secagg": True}, {"base": "no"}):
        with pytest.raises(ConfigError):
            run_in_process({**TINY, "base": base, **wrong}, num_hospitals=3)
    assert not runs_directory().exists()


def test_a_random_base_is_merged_only_if_that_was_asked_for() -> None:
    with pytest.raises(ConfigError, match="pre-trained base"):
        run_in_process(TINY, num_hospitals=3)
    run_in_process({**TINY, "allow-random-base": True, "publish-every": 3}, num_hospitals=3)
    with registry() as kept:
        assert not kept.current().pretrained
        assert kept.current().version == 1


def test_a_fedavg_runs_model_can_be_the_base() -> None:
    fedavg = {**TINY, "mode": "fedavg", "rounds": 1}
    run_in_process(fedavg, num_hospitals=3)
    name = the_run().name
    best = load_file(the_run() / "best.safetensors")
    run_in_process({**TINY, "base": name, "publish-every": 3}, num_hospitals=3)
    (made,) = [d for d in runs_directory().iterdir() if d.name != name]
    with Registry(made / "registry", create=False) as kept:
        assert all((kept.base(0).weights[k] == v).all() for k, v in best.items())


def test_a_gate_that_refuses_says_so_and_the_base_stays(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(self: Any, weights: Any) -> float:
        start = load_file(base)
        return 0.9 if all((weights[k] == v).all() for k, v in start.items()) else 0.1

    monkeypatch.setattr(Judge, "__call__", call)
    with pytest.raises(RoundError, match="no base 1"):
        run_in_process(
            {**TINY, "base": base, "publish-every": 3, "publish-margin": 1.0}, num_hospitals=3
        )
    (held,) = lines("held")
    assert held["code"] == "registry-gate"
    assert held["gate"]["candidate"] == 0.1
    assert summary()["bases"] == 0

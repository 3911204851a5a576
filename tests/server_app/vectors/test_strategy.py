"""Runs of vectors in the in-process grid: hospitals that are slow, away, killed, and dishonest."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from safetensors.numpy import load_file, save_file

from client_app import work
from client_app.outbox import Outbox
from common.errors import ConfigError, RoundError
from common.files import consilium_home
from common.messages import Delivery
from common.model import ModelSpec, build, get_weights
from common.privacy.ledger import Ledger
from common.secagg import Identity
from common.simulation import LEDGER
from common.vectors import Base, Rule
from deploy.inprocess import Fault, InProcessGrid, run_in_process
from server_app.registry import Registry
from server_app.run_store import runs_directory
from server_app.vectors import strategy
from server_app.vectors.public import Judge

TINY: dict[str, Any] = {
    "mode": "vectors", "dataset": "synthetic", "synthetic-size": 240, "partition": "iid",
    "batch-size": 16, "model-width": 0.03125, "privacy": "none", "partition-min-size": 5,
    "secagg": False, "versions": 1, "publish-margin": 100.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "LOOK", 0.05)
    monkeypatch.setattr("server_app.vectors.post.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("server_app.vectors.post.LONGEST_WAIT", 0.05)
    monkeypatch.setattr("os.cpu_count", lambda: 1)


@pytest.fixture
def base(tmp_path: Path) -> str:
    path = tmp_path / "base.safetensors"
    save_file(get_weights(build(ModelSpec(width=0.03125), seed=0)), path)
    return str(path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each hospital trained for each version."""
    count: Counter[tuple[str, int]] = Counter()
    train = work._train

    def counted(job: Any, run: Any) -> Any:
        count[(job.hospital.name, job.draw)] += 1
        return train(job, run)

    monkeypatch.setattr(work, "_train", counted)
    return count


PRIVATE = {"privacy": "local", "epsilon": 4.0, "delta": 1e-3, "batch-size": 512}
"""One step a pass, whatever the noise on the counts: the noise is calibrated once for all tests."""


def is_offer(partition_id: int, version: str = "") -> Any:
    return lambda kind, i, group: (
        kind == "query.offer" and i == partition_id and version in ("", group)
    )


def the_run() -> Path:
    return max(runs_directory().iterdir())


def lines(event: str, directory: Path | None = None) -> list[dict[str, Any]]:
    text = ((directory or the_run()) / "metrics.jsonl").read_text()
    return [row for row in map(json.loads, text.splitlines()) if row["event"] == event]


def summary() -> dict[str, Any]:
    return dict(json.loads((the_run() / "summary.json").read_text()))


def registry() -> Registry:
    return Registry(the_run() / "registry", create=False)


def outbox(number: int) -> Outbox:
    home = consilium_home() / "simulation" / f"hospital-{number:02d}"
    return Outbox(home / "runs" / the_run().name / "outbox")


def cheat(monkeypatch: pytest.MonkeyPatch, number: int, factor: float) -> None:
    """This hospital's vectors are multiplied before they are signed."""
    tune = work.tune

    def poisoned(offer: Any, name: str, hospital: Any, context: Any) -> Any:
        made = tune(offer, name, hospital, context)
        if hospital.partition_id == number:
            for key in made.values:
                made.values[key] = made.values[key] * np.float32(factor)
        return made

    monkeypatch.setattr(work, "tune", poisoned)


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


class Killed(BaseException):
    """kill -9, as near as one process comes to it."""


def after(number: int, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server dies once, right after the given call of a method has done its work."""
    method, calls = getattr(owner, name), []

    def dies(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dies)


@pytest.mark.parametrize(("method", "number"), [("accept", 2), ("adopt", 1)])
def test_a_killed_server_goes_on_to_the_base_that_it_would_have_reached(
    base: str, method: str, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    trained: Counter[tuple[str, int]],
) -> None:  # fmt: skip
    """Bit for bit that of a server that was never stopped, on the same arrivals."""
    settings = {**TINY, "base": base, "versions": 2, "publish-every": 3}
    with monkeypatch.context() as context:
        after(number, Registry, method, context)
        context.setattr("server_app.vectors.run.VectorsRun.conclude", lambda *_: None)
        with pytest.raises(Killed):
            run_in_process(settings, num_hospitals=3)
    run_in_process({**settings, "resume": the_run().name}, num_hospitals=3)
    assert summary()["bases"] == 2
    assert set(trained.values()) == {1}
    assert len(lines("arrival")) == len({row["serial"] for row in lines("arrival")}) == 6
    assert [row["version"] for row in lines("base")] == [0, 1, 2]
    keys = {
        name: bytes.fromhex(key)
        for name, key in json.loads((the_run() / "identities.json").read_text()).items()
    }
    with registry() as kept, Registry(tmp_path / "whole") as whole:
        whole.add_base(kept.base(0))
        log = kept.log()
        for point in log.points:
            for row in log.vectors:
                if row.seq <= point.upto:
                    path = the_run() / "registry" / "vectors" / f"{row.serial}.safetensors"
                    whole.accept(path.read_bytes(), keys)
            whole.publish(Rule(), skewed=False)
        assert whole.current().id == kept.current().id


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


def test_each_vector_is_charged_once_and_delivering_it_again_costs_nothing(base: str) -> None:
    settings = {
        **TINY, **PRIVATE, "base": base, "versions": 2, "publish-every": 3,
    }  # fmt: skip
    run_in_process(settings, num_hospitals=3, faults=[Fault(is_offer(1), repeat=1)])
    told = summary()
    assert told["epsilon"] <= 4.0
    home = consilium_home() / "simulation" / "hospital-01"
    ledgers = sorted(home.glob(f"runs/*/{LEDGER}"))
    assert len(ledgers) == 2  # one for each vector: a simulation has no total
    for path in ledgers:
        with Ledger(path, create=False) as ledger:
            state = ledger.state(path.parent.name)
            assert state is not None and state.rounds == 1 and not state.unfinished
            assert 0 < ledger.spent_by_run(path.parent.name).value <= 4.0
    assert all(0 < row["epsilon"] <= 4.0 for row in lines("arrival"))
    assert told["by_hospital"]["hospital-01"]["vectors"] == 2


@pytest.mark.parametrize(
    ("policy", "privacy"),
    [('[vectors]\nsend = "private"\n', "none"), ("", "local")],
)
def test_a_policy_that_keeps_single_vectors_at_home_is_obeyed_before_training(
    base: str, policy: str, privacy: str, trained: Counter[tuple[str, int]]
) -> None:
    consilium_home().mkdir(parents=True, exist_ok=True)
    (consilium_home() / "policy.toml").write_text(
        f"version = 1\n[privacy]\nallow-non-private = true\ntotal-delta = 1e-3\n{policy}"
    )
    with pytest.raises(RoundError, match="vectors-policy"):
        run_in_process({**TINY, "base": base, "privacy": privacy}, num_hospitals=3)
    assert not trained
    assert {row["code"] for row in lines("refusal")} == {"vectors-policy"}
    assert summary()["status"] == "failed"


def test_the_hospitals_total_limits_how_many_vectors_it_makes(base: str) -> None:
    consilium_home().mkdir(parents=True, exist_ok=True)
    (consilium_home() / "policy.toml").write_text(
        "version = 1\n[privacy]\ntotal-epsilon = 5.0\ntotal-delta = 1e-3\n"
        '[vectors]\nsend = "private"\n'
    )
    with pytest.raises(RoundError, match="privacy-budget"):
        run_in_process(
            {**TINY, "base": base, **PRIVATE,
             "versions": 3, "publish-every": 3},
            num_hospitals=3,
        )  # fmt: skip
    assert summary()["bases"] == 1
    assert {row["code"] for row in lines("refusal")} == {"privacy-budget"}


def test_vectors_without_privacy_are_no_answer_to_a_run_that_promises_it(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hospital that says that it spent nothing, or more than was agreed, is refused."""
    tune = work.tune

    def more(offer: Any, name: str, hospital: Any, context: Any) -> Any:
        made = tune(offer, name, hospital, context)
        if hospital.partition_id == 0:
            object.__setattr__(made, "epsilon", 7.0)
        return made

    monkeypatch.setattr(work, "tune", more)
    run_in_process(
        {**TINY, "base": base, **PRIVATE,
         "publish-every": 3},
        num_hospitals=4,
    )  # fmt: skip
    assert [(r["hospital"], r["code"]) for r in lines("refused")] == [
        ("hospital-00", "vector-privacy")
    ]
    assert "hospital-00" not in lines("base")[1]["hospitals"]
    assert outbox(0).items()[0].state == "refused: vector-privacy"


@pytest.mark.parametrize("number", [0, 4])
def test_a_vector_of_a_hundred_times_the_size_has_no_part_in_a_base_whenever_it_comes(
    base: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheat(monkeypatch, number, 100.0)
    run_in_process({**TINY, "base": base, "publish-every": 5}, num_hospitals=5)
    (published,) = lines("base")[1:]
    assert published["hospitals"] == sorted({f"hospital-0{i}" for i in range(5)} - {
        f"hospital-0{number}"
    })  # fmt: skip
    rows = lines("refused") + lines("excluded")
    assert [row["hospital"] for row in rows] == [f"hospital-0{number}"]
    assert outbox(number).items()[0].state == "refused: vector-norm"


def garbage(record: RecordDict) -> RecordDict:
    return RecordDict({"something": ConfigRecord({"else": 1})})


def impostor(record: RecordDict) -> RecordDict:
    record.config_records["delivery"]["hospital"] = "hospital-00"
    return record


def another_key(record: RecordDict) -> RecordDict:
    record.config_records["delivery"]["key"] = bytes(32)
    return record


def cut(record: RecordDict) -> RecordDict:
    delivery = Delivery.from_record(record, run=the_run().name)
    made = Delivery(
        run=delivery.run, hospital=delivery.hospital, key=delivery.key,
        vector=delivery.vector[:-1],
    )  # fmt: skip
    return made.to_record()


def test_a_bad_delivery_is_refused_with_its_code_and_the_others_go_on(base: str) -> None:
    edits = {1: garbage, 2: impostor, 3: another_key, 4: cut}
    faults = [Fault(is_offer(i), edit_reply=edit) for i, edit in edits.items()]
    run_in_process(
        {**TINY, "base": base, "publish-every": 3}, num_hospitals=7, faults=faults, workers=7
    )
    (published,) = lines("base")[1:]
    assert published["hospitals"] == ["hospital-00", "hospital-05", "hospital-06"]
    codes = {row["hospital"]: row["code"] for row in lines("refused")}
    assert codes == {"hospital-03": "vector-signature", "hospital-04": "vector-format"}


def test_a_withdrawn_vector_leaves_the_model_as_if_it_had_never_come(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {**TINY, "base": base, "publish-every": 4}
    run_in_process(settings, num_hospitals=4)
    (item,) = outbox(2).items()
    assert item.state == "sent"
    home = consilium_home() / "simulation" / "hospital-02"
    identity = Identity((home / "identity.key").read_bytes())
    assert outbox(2).withdraw(item.serial, "hospital-02", identity).state == "withdrawal waits"
    assert not (outbox(2).folder / f"{item.serial}.safetensors").exists()
    monkeypatch.setattr(strategy, "KNOCK", 0.0)
    run_in_process({**settings, "resume": the_run().name, "versions": 2}, num_hospitals=4)
    assert [row["serial"] for row in lines("withdrawal")] == [item.serial]
    assert outbox(2).items()[0].state == "withdrawn"
    keys = {
        name: bytes.fromhex(key)
        for name, key in json.loads((the_run() / "identities.json").read_text()).items()
    }
    with registry() as kept, Registry(tmp_path / "without") as without:
        first = kept.base(1)
        without.add_base(kept.base(0))
        for row in kept.log().vectors:
            path = the_run() / "registry" / "vectors" / f"{row.serial}.safetensors"
            if row.base == kept.base(0).id and row.serial != item.serial:
                without.accept(path.read_bytes(), keys)
        assert without.publish(Rule(), skewed=False).id == first.id


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

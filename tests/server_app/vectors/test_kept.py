"""What a server keeps of vectors: a kill or a fault loses nothing, and nothing counts twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from common.files import consilium_home
from common.privacy.ledger import Ledger
from common.secagg import Identity
from common.simulation import LEDGER
from common.vectors import Rule, VectorError
from deploy.inprocess import Fault, run_in_process
from server_app.registry import Registry
from server_app.vectors import letters
from server_app.vectors.record import hospitals_validation
from tests.common.vectors.building import base as small_base
from tests.common.vectors.building import serial
from tests.server_app.registry.building import arrives, fresh, near
from tests.server_app.vectors.running import (
    PRIVATE,
    TINY,
    Killed,
    after,
    is_offer,
    keys,
    lines,
    outbox,
    registry,
    states,
    summary,
    the_run,
    withdrawn,
)


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
    told = keys()
    with registry() as kept, Registry(tmp_path / "whole") as whole:
        whole.add_base(kept.base(0))
        log = kept.log()
        for point in log.points:
            for row in log.vectors:
                if row.seq <= point.upto:
                    path = the_run() / "registry" / "vectors" / f"{row.serial}.safetensors"
                    whole.accept(path.read_bytes(), told)
            whole.publish(Rule(), skewed=False)
        assert whole.current().id == kept.current().id


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
    monkeypatch.setattr(letters, "KNOCK", 0.0)
    run_in_process({**settings, "resume": the_run().name, "versions": 2}, num_hospitals=4)
    assert [row["serial"] for row in lines("withdrawal")] == [item.serial]
    assert outbox(2).items()[0].state == "withdrawn"
    told = keys()
    with registry() as kept, Registry(tmp_path / "without") as without:
        first = kept.base(1)
        without.add_base(kept.base(0))
        for row in kept.log().vectors:
            path = the_run() / "registry" / "vectors" / f"{row.serial}.safetensors"
            if row.base == kept.base(0).id and row.serial != item.serial:
                without.accept(path.read_bytes(), told)
        assert without.publish(Rule(), skewed=False).id == first.id


def failing(name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The registry cannot do this once, as where the disk is full; the codes of its errors."""
    failed: list[str] = []
    method = getattr(Registry, name)

    def cannot(self: Registry, *given: Any) -> Any:
        if not failed:
            failed.append("registry-unusable")
            raise VectorError(failed[0], "the registry cannot be used", "make room on the disk")
        return method(self, *given)

    monkeypatch.setattr(Registry, name, cannot)
    return failed


def test_a_vector_that_the_registry_could_not_keep_is_asked_for_again_and_not_refused(
    base: str, trained: Counter[tuple[str, int]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    failed = failing("accept", monkeypatch)
    run_in_process({**TINY, "base": base, "publish-every": 3}, num_hospitals=3)
    assert failed and set(trained.values()) == {1}
    assert lines("base")[1]["vectors"] == 3
    assert not lines("refused")
    assert {item.state for i in range(3) for item in outbox(i).items()} == {"sent"}
    assert "what it sent could not be kept" in capsys.readouterr().out


def test_a_withdrawal_that_the_registry_could_not_note_is_asked_for_again(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**TINY, "base": base, "publish-every": 3}
    run_in_process(settings, num_hospitals=3)
    taken = withdrawn(1)
    failed = failing("withdraw", monkeypatch)
    run_in_process({**settings, "resume": the_run().name}, num_hospitals=3)
    assert failed and states()[taken] == "withdrawn"
    assert not lines("refused")


def test_what_hospitals_say_of_a_base_counts_once_for_each_and_not_of_what_is_excluded(
    tmp_path: Path,
) -> None:
    def told(correct: float) -> dict[str, float]:
        return {"val-correct": correct, "val-examples": 100.0}

    with fresh() as registry:
        arrives(registry, near(1, metrics=told(60.0)))
        arrives(registry, near(2, metrics=told(90.0)))
        first = small_base().id
        assert hospitals_validation(registry) == {first: pytest.approx(0.75)}
        for n in (3, 4):  # made anew, twice
            arrives(registry, near(n, hospital="h2", created="2030-01-01T00:00:00Z",
                                   metrics=told(90.0)))  # fmt: skip
        assert hospitals_validation(registry) == {first: pytest.approx(0.75)}
        arrives(registry, near(5, metrics=told(100.0)))
        registry.exclude(serial(5), "harms")
        assert hospitals_validation(registry) == {first: pytest.approx(0.75)}

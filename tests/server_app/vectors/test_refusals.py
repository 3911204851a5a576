"""What has no part in a base: vectors that a policy or a budget forbids, and dishonest ones."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from client_app import tuning
from common.errors import RoundError
from common.files import consilium_home
from common.messages import Delivery
from deploy.inprocess import Fault, run_in_process
from tests.server_app.vectors.running import (
    PRIVATE,
    TINY,
    is_offer,
    lines,
    outbox,
    summary,
    the_run,
)


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
    tune = tuning.tune

    def more(offer: Any, name: str, hospital: Any, context: Any) -> Any:
        made = tune(offer, name, hospital, context)
        if hospital.partition_id == 0:
            object.__setattr__(made, "epsilon", 7.0)
        return made

    monkeypatch.setattr(tuning, "tune", more)
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


def cheat(monkeypatch: pytest.MonkeyPatch, number: int, factor: float) -> None:
    """This hospital's vectors are multiplied before they are signed."""
    tune = tuning.tune

    def poisoned(offer: Any, name: str, hospital: Any, context: Any) -> Any:
        made = tune(offer, name, hospital, context)
        if hospital.partition_id == number:
            for key in made.values:
                made.values[key] = made.values[key] * np.float32(factor)
        return made

    monkeypatch.setattr(tuning, "tune", poisoned)


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

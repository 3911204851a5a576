"""Whom hospitals let into a secured sum: the roster's members, and what the policy allows."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from common.errors import RoundError
from common.files import consilium_home
from common.messages import Report
from common.secagg import Identity, Roster, RosterEntry
from deploy.inprocess import Fault, InProcessGrid, run_in_process
from tests.server_app.running import SECURE, lines, newest


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
    run_in_process({**SECURE, "rounds": 1, **enrolled}, num_hospitals=5)
    assert len(lines(newest())[1]["contributed"]) == 5


def test_with_a_roster_a_hospital_with_another_key_is_refused(
    enrolled: dict[str, Any], tmp_path: Path
) -> None:
    """Its key changes once it has greeted: what it then advertises is not the roster's."""

    def swapped(kind: str, partition_id: int, _: str) -> bool:
        if kind == "train" and partition_id == 3:
            (tmp_path / "identity-3").write_bytes(bytes([3]) * 32)
        return False

    run_in_process({**SECURE, "rounds": 1, **enrolled}, num_hospitals=5, faults=[Fault(swapped)])
    record = lines(newest())[1]
    assert record["contributed"] == ["hospital-00", "hospital-01", "hospital-02", "hospital-04"]
    assert "secagg-" in record["dropped"][0]["reason"]


def test_with_a_roster_a_hospital_with_another_key_is_not_even_asked(
    enrolled: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "identity-3").write_bytes(Identity.generate().private_bytes())
    settings = {**SECURE, "rounds": 1, "connect-timeout": 0.1, "quorum": 0.8, **enrolled}
    grid = run_in_process(settings, num_hospitals=5)
    record = lines(newest())[1]
    assert record["contributed"] == ["hospital-00", "hospital-01", "hospital-02", "hospital-04"]
    (left_out,) = [d for d in record["dropped"] if d["stage"] == "greet"]
    assert "not signed with that hospital's key" in left_out["reason"]
    assert {kind for kind, i, _ in grid.log if i == 3} == {"query.greet"}


def test_hospitals_refuse_a_peer_that_a_server_without_a_roster_lets_in(
    enrolled: dict[str, Any], tmp_path: Path
) -> None:
    """The server does not check; each honest hospital does, and nothing is opened."""
    (tmp_path / "identity-3").write_bytes(Identity.generate().private_bytes())
    with pytest.raises(RoundError):
        run_in_process({**SECURE, "rounds": 1}, num_hospitals=5)
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
        run_in_process({**SECURE, "rounds": 1, **enrolled}, num_hospitals=5)


def with_policy(text: str) -> None:
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
        run_in_process({**SECURE, "rounds": 1, **settings}, num_hospitals=5)
    record = lines(newest())[1]
    assert record["contributed"] == []
    assert {d["reason"].split(" (")[0] for d in record["dropped"]} == {f"refused: {code}"}


def test_a_policy_that_is_met_lets_the_round_through() -> None:
    with_policy(
        "version = 1\n[aggregation]\nmin-cohort = 5\nrequire-roster = false\n"
        "[privacy]\nallow-non-private = true\n"
    )
    run_in_process({**SECURE, "rounds": 1, "min-cohort": 5}, num_hospitals=5)
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
        run_in_process({**SECURE, "rounds": 1}, num_hospitals=5)
    assert received == []
    assert {d["reason"].split(" (")[0] for d in lines(newest())[1]["dropped"]} == {
        "refused: policy"
    }

"""Hospitals that only the coordinator knows, in whole rounds: nothing of a victim is summed."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest

from client_app import egress
from client_app.hospital_file import HospitalFolder
from common.errors import RoundError
from deploy.inprocess import run_in_process
from deploy.provision import hospital, members
from deploy.provision.demo import Demo, make
from deploy.provision.federation import FederationFolder
from deploy.provision.kit import Kit
from tests.server_app.test_real_hospitals import config, newest

VICTIM = "hospital-00"
SYBILS = ("sybil-a", "sybil-b", "sybil-c")


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def join(root: Path, name: str) -> None:
    """As the node does each minute, or a person once: nothing is asked."""
    coordinator = FederationFolder(root / "coordinator")
    kit = Kit.read(coordinator.kits / name)
    hospital.join(HospitalFolder(root / name), kit, kit.coordinator, now())


@pytest.fixture
def federation(tmp_path: Path) -> Path:
    """Four hospitals that know each other, and three that the coordinator has invented since."""
    demo = Demo(
        hospitals=4, name="demo", address="localhost:9092", hosts=["localhost"], data=None,
        images=160, image_size=16,
    )  # fmt: skip
    make(tmp_path, demo, now())
    coordinator = FederationFolder(tmp_path / "coordinator")
    for name in SYBILS:
        folder = HospitalFolder(tmp_path / name)
        request = hospital.init(folder, name, now())
        members.admit(coordinator, request, now(), 365)
        shutil.copytree(tmp_path / "hospital-01" / "data", folder.root / "data")
    for name in (*SYBILS, *(f"hospital-{i:02d}" for i in range(4))):
        join(tmp_path, name)
        policy = tmp_path / name / "policy.toml"  # no noise to calibrate: quicker
        text = policy.read_text()
        policy.write_text(text.replace("allow-non-private = false", "allow-non-private = true"))
    return tmp_path


def run(root: Path, *names: str, **changes: Any) -> dict[str, Any]:
    """One round with these hospitals' nodes; its record."""
    nodes = {i: {"hospital": str(root / name)} for i, name in enumerate(names)}
    values = config(
        root, hospitals=len(names), num_shares=len(names), connect_timeout=0.5,
        privacy="none", quorum=0.5, **changes,
    )  # fmt: skip
    run_in_process(values, num_hospitals=len(names), node_configs=nodes)
    record: dict[str, Any] = newest("metrics.jsonl")[1]
    return record


def left(root: Path, name: str = VICTIM) -> set[str]:
    """Every field that has left a hospital."""
    path = root / name / egress.FILE
    return {line["field"] for line in egress.read(path)} if path.exists() else set()


def test_a_cohort_of_one_victim_and_three_invented_hospitals_opens_nothing(
    federation: Path,
) -> None:
    """``k1_sybil``, to its end: the invented ones do whatever they are asked."""
    with pytest.raises(RoundError):
        run(federation, VICTIM, *SYBILS)
    record = newest("metrics.jsonl")[1]
    (reason,) = {d["reason"] for d in record["dropped"] if d["hospital"] == VICTIM}
    assert "secagg-members" in reason
    assert record["contributed"] == []
    assert not left(federation) & {"update", "weight", "val-correct", "val-examples"}


def test_whom_the_people_accept_is_let_in(federation: Path) -> None:
    folder = HospitalFolder(federation / VICTIM)
    waiting = [one for one in hospital.standings(folder) if one.state == "waiting"]
    assert {one.name for one in waiting} == set(SYBILS)
    hospital.accept(folder, {one.name: one.identity for one in waiting}, now())
    record = run(federation, VICTIM, *SYBILS)
    assert record["contributed"] == [VICTIM, *SYBILS]
    assert {"update", "weight"} <= left(federation)


def test_too_few_accepted_or_a_roster_too_old_is_refused_before_anything_is_trained(
    federation: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr("client_app.identity.datetime", Tomorrow)
    for old, new, code in (
        ("min-trusted = 0", "min-trusted = 5", "secagg-members"),
        ("roster-max-age-days = 0.0", "roster-max-age-days = 0.5", "secagg-roster-age"),
    ):
        for i in range(4):
            policy = federation / f"hospital-{i:02d}" / "policy.toml"
            text = policy.read_text()
            assert old in text
            policy.write_text(text.replace(old, new))
        with pytest.raises(RoundError):
            run(federation, *(f"hospital-{i:02d}" for i in range(4)))
        record = newest("metrics.jsonl")[1]
        told = {d["hospital"]: d["reason"].split(" (")[0] for d in record["dropped"]}
        assert {told[f"hospital-{i:02d}"] for i in range(4)} == {f"refused: {code}"}
        for i in range(4):
            policy = federation / f"hospital-{i:02d}" / "policy.toml"
            policy.write_text(policy.read_text().replace(new, old))
    assert "update" not in left(federation)

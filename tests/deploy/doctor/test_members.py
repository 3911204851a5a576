"""Who waits to be accepted is told by the check-up and at the node's start, and stops neither."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from client_app.hospital_file import HospitalFolder
from deploy.node.launch import preflight
from deploy.provision import hospital, members
from deploy.provision.demo import Demo, make
from deploy.provision.federation import FederationFolder
from deploy.provision.kit import Kit
from tests.deploy.doctor.conftest import Ward, row, wrong

NEW = "hospital-99"


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def newcomer(ward: Ward) -> bytes:
    """One more hospital, in a kit that came by itself; its key."""
    made = HospitalFolder(ward.coordinator.root.parent / NEW)
    request = hospital.init(made, NEW, now())
    members.admit(ward.coordinator, request, now(), 365)
    kit = Kit.read(ward.coordinator.kits / ward.folder.root.name)
    hospital.join(ward.folder, kit, kit.coordinator, now())
    return request.identity


def test_who_waits_is_a_warning_until_somebody_decides(ward: Ward) -> None:
    ward.serve()
    key = newcomer(ward)
    document = ward.check()
    assert wrong(document) == {"members": "WARN"}
    told = row(document, "members")
    assert NEW in told["found"] and "consilium hospital members" in told["remedy"]
    (line,) = (warning for warning in preflight(ward.folder) if "members" in warning)
    assert NEW in line
    for decide in (hospital.accept, hospital.refuse):
        decide(ward.folder, {NEW: key}, now())
        assert wrong(ward.check()) == {}
        assert not [warning for warning in preflight(ward.folder) if "members" in warning]


def test_under_auto_who_waits_is_a_warning_only_while_too_few_are_accepted(ward: Ward) -> None:
    ward.serve()
    newcomer(ward)
    ward.edit(ward.folder.policy, 'accept-members = "ask"', 'accept-members = "auto"')
    assert wrong(ward.check()) == {"members": "WARN"}  # two accepted of min-trusted, four
    ward.edit(ward.folder.policy, "min-trusted = 0", "min-trusted = 2")
    assert "1 more may be in sums" in row(ward.check(), "members")["found"]


def test_a_damaged_list_is_a_failure_and_keeps_the_node_from_starting(ward: Ward) -> None:
    ward.serve()
    ward.folder.members.write_text("{}")
    assert wrong(ward.check()) == {"members": "FAIL"}


def test_a_roster_that_is_too_old_fails_the_check_and_not_the_start(ward: Ward) -> None:
    """The node must run to fetch a newer one."""
    ward.serve()
    ward.edit(ward.folder.policy, "roster-max-age-days = 0.0", "roster-max-age-days = 41")
    assert "at most 41 days" in row(ward.check(), "roster age")["found"]
    ward.edit(ward.folder.policy, "roster-max-age-days = 41", "roster-max-age-days = 39")
    told = row(ward.check(), "roster age")
    assert told["status"] == "FAIL" and "--reissue" in told["remedy"]
    preflight(ward.folder)


def test_a_demonstration_of_an_earlier_version_accepts_everybody_when_made_again(
    tmp_path: Path,
) -> None:
    demo = Demo(
        hospitals=2, name="demo", address="localhost:9092", hosts=["localhost"], data=None,
        images=120, image_size=16,
    )  # fmt: skip
    folders = make(tmp_path / "f", demo, now())
    for root in folders:
        (root / "members.json").unlink()
    make(tmp_path / "f", demo, now() + timedelta(minutes=1))
    for root in folders:
        rows = hospital.standings(HospitalFolder(root))
        assert {one.state for one in rows} == {"this hospital", "accepted"}
    assert FederationFolder(tmp_path / "f" / "coordinator").roster.exists()

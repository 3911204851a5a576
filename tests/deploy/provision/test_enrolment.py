"""Admitted, joined, extended, revoked: the roster says who belongs, and when."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta

import pytest

from client_app.hospital_file import HospitalFolder
from common.errors import ConfigError
from common.federation_file import EnrolmentError
from common.roster import load_roster
from common.secagg import Roster
from deploy.provision import federation, hospital, members
from deploy.provision.federation import FederationFolder
from deploy.provision.files import locked
from deploy.provision.kit import Kit, refresh
from tests.deploy.provision.conftest import NOW, World, settings, snapshot


def roster(world: World, day: datetime = NOW) -> list[str]:
    data = world.coordinator.roster.read_bytes()
    found = Roster.load(data, world.coordinator.public_key())
    return sorted(found.identities(day.date().isoformat()))


def test_an_admitted_hospital_joins_and_its_node_reads_the_roster(world: World) -> None:
    today = datetime.now(UTC)
    folder = world.hospital("st-mary")
    world.admit("st-mary", today)
    joined = world.join("st-mary", today)
    assert joined.entry.identity == world.requests["st-mary"].identity
    key = folder.coordinator.read_text().strip()
    assert load_roster(folder.roster, key) == {"st-mary": joined.entry.identity}
    assert folder.load_federation().description == settings().description()


def test_everybody_else_gets_a_new_kit_when_somebody_comes_or_goes(world: World) -> None:
    for name in ("a", "b", "c"):
        world.hospital(name)
    assert world.admit("a") == ["a"]
    assert world.admit("b") == ["a", "b"]
    assert world.admit("c") == ["a", "b", "c"]
    assert world.revoke("b") == ["a", "c"]
    assert roster(world) == ["a", "c"]
    for name in ("a", "c"):
        assert [e.name for e in world.join(name).roster.entries] == ["a", "c"]
    assert not (world.coordinator.kits / "b").exists()
    assert sorted(p.name for p in world.coordinator.hospitals.glob("*.pub")) == ["a.pub", "c.pub"]


def test_commands_repeated_change_nothing(world: World) -> None:
    world.hospital("a")
    world.admit("a")
    world.join("a")
    before = snapshot(world.root)
    later = NOW + timedelta(hours=1)
    assert world.admit("a", later) == []
    with locked(world.coordinator.root):
        assert refresh(world.coordinator, later) == []
    assert not federation.init(world.coordinator, settings(), later, days=825)
    assert world.hospital("a", later).root == world.root / "a"
    world.join("a", later)
    assert snapshot(world.root) == before


def test_an_admission_ends_and_is_extended_by_the_same_request(world: World) -> None:
    folder = world.hospital("a")
    world.admit("a", days=10)
    world.join("a")
    assert roster(world, NOW + timedelta(days=10)) == ["a"]
    late = NOW + timedelta(days=11)
    assert roster(world, late) == []
    with pytest.raises(EnrolmentError, match="not today"):
        world.join("a", late)
    assert world.admit("a", late, days=10) == ["a"]
    world.join("a", late)
    found = Roster.load(folder.roster.read_bytes(), world.coordinator.public_key())
    (entry,) = found.entries
    assert (entry.valid_from, entry.expires) == ("2026-03-01", "2026-03-22")


def test_a_hospital_that_is_not_on_the_roster_cannot_join(world: World) -> None:
    world.hospital("a")
    world.hospital("b")
    world.admit("a")
    kit = world.kit("a")
    folder = HospitalFolder(world.root / "b")
    before = snapshot(folder.root)
    with pytest.raises(EnrolmentError, match="the roster has no hospital b"):
        hospital.join(folder, kit, kit.coordinator, NOW)
    assert snapshot(folder.root) == before


def test_a_roster_with_another_key_for_the_hospital_is_refused(world: World) -> None:
    world.hospital("a")
    world.admit("a")
    thief = HospitalFolder(world.root / "elsewhere")
    hospital.init(thief, "a", NOW)
    kit = world.kit("a")
    with pytest.raises(EnrolmentError, match="another key for a"):
        hospital.join(thief, kit, kit.coordinator, NOW)


def test_a_roster_of_a_revoked_hospital_cannot_be_brought_back(world: World) -> None:
    world.hospital("a")
    world.hospital("b")
    world.admit("a")
    world.admit("b")
    old = world.kit("a")
    world.revoke("b", NOW)
    world.join("a")
    folder = HospitalFolder(world.root / "a")
    before = snapshot(folder.root)
    with pytest.raises(EnrolmentError, match="before the one that is installed"):
        hospital.join(folder, old, old.coordinator, NOW)
    assert snapshot(folder.root) == before


def test_every_change_is_issued_later_even_if_the_clock_went_back(world: World) -> None:
    times = []
    for name in ("a", "b", "c"):
        world.hospital(name)
        world.admit(name, NOW - timedelta(days=len(times)))
        times.append(world.join(name, NOW).told.issued)
    assert times == sorted(set(times))


def test_the_key_is_pinned_at_the_first_kit(
    world: World, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = world.hospital("a")
    world.admit("a")
    world.join("a")
    other = FederationFolder(tmp_path_factory.mktemp("other") / "fed")
    federation.init(other, settings(), NOW, days=825)
    members.admit(other, world.requests["a"], NOW, 365)
    kit = Kit.read(other.kits / "a")
    before = snapshot(folder.root)
    with pytest.raises(EnrolmentError, match="another coordinator's key"):
        hospital.join(folder, kit, kit.coordinator, NOW)
    assert snapshot(folder.root) == before


def test_one_folder_belongs_to_one_federation(world: World) -> None:
    folder = world.hospital("a")
    world.admit("a")
    world.join("a")
    world.coordinator.settings.write_text(settings(name="bones").to_toml())
    world.admit("a", NOW + timedelta(days=1))
    with pytest.raises(EnrolmentError, match="this hospital belongs to blood"):
        world.join("a", NOW + timedelta(days=1))
    assert folder.load_federation().description.name == "blood"


def test_hospitals_hear_of_changed_settings_with_their_next_kit(world: World) -> None:
    world.hospital("a")
    world.admit("a")
    world.join("a")
    world.coordinator.settings.write_text(settings(address="fl.example.org:443").to_toml())
    with locked(world.coordinator.root):
        assert refresh(world.coordinator, NOW) == ["a"]
    joined = world.join("a")
    assert joined.before is not None
    assert joined.before.description.address == "localhost:9443"
    assert joined.told.description.address == "fl.example.org:443"


def test_only_who_was_admitted_can_be_revoked(world: World) -> None:
    world.hospital("a")
    world.admit("a")
    with pytest.raises(ConfigError, match="no hospital 'b'") as error:
        world.revoke("b")
    assert "a" in error.value.remedy
    world.revoke("a")
    before = snapshot(world.coordinator.root)
    assert world.revoke("a", NOW + timedelta(days=1)) == []
    assert snapshot(world.coordinator.root) == before


def test_the_public_key_in_the_kit_is_the_coordinators(world: World) -> None:
    world.hospital("a")
    world.admit("a")
    text = (world.coordinator.kits / "a" / "coordinator.pub").read_text()
    assert base64.b64decode(text.strip(), validate=True) == world.coordinator.signer().public


def test_nothing_changes_where_the_roster_could_not_be_signed(world: World) -> None:
    for name in ("a", "b"):
        world.hospital(name)
    world.admit("a")
    world.coordinator.coordinator_key.write_bytes(bytes(32))
    before = snapshot(world.coordinator.root)
    for action in (world.admit, world.revoke):
        with pytest.raises(ConfigError, match="is not the key of"):
            action("b" if action == world.admit else "a")
    assert snapshot(world.coordinator.root) == before


def test_a_command_waits_until_another_has_finished(world: World) -> None:
    for name in ("a", "b"):
        world.hospital(name)
    world.admit("a")
    for command, name in (("admit", "b"), ("revoke", "a"), ("join", "b")):
        busy = world.root / name if command == "join" else world.coordinator.root
        before = snapshot(world.root)
        with ThreadPoolExecutor(1) as pool:
            with locked(busy):
                waiting = pool.submit(getattr(world, command), name)
                done, _ = wait([waiting], timeout=0.3)
                assert not done
                assert snapshot(world.root) == before
            waiting.result(timeout=10)
        assert snapshot(world.root) != before

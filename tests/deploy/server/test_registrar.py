"""What the registrar decides; what it does is in test_serve."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from client_app.hospital_file import HospitalFolder
from deploy.provision import hospital, members
from deploy.provision.members import Member
from deploy.provision.requests import Request
from deploy.runtime.ports import free_port
from deploy.server.control import Control, Node
from deploy.server.layout import ServerFolder
from deploy.server.registrar import Registrar, plan
from tests.deploy.server.conftest import Federation, now


def member(number: int) -> Member:
    request = Request(f"h{number}", bytes(32), f"key {number}", b"", "", b"", b"")
    return Member(request, "", "2026-01-01", "2026-12-31")


def node(number: int, *, gone: bool = False) -> Node:
    return Node(1000 + number, f"key {number}", gone, "unregistered" if gone else "offline")


numbers = st.sets(st.integers(0, 8))


@given(numbers, numbers, numbers, st.booleans())
def test_afterwards_exactly_the_members_are_in_and_nothing_is_left_to_do(
    current: set[int], known: set[int], gone: set[int], signed: bool
) -> None:
    gone -= known
    there = [node(n) for n in known] + [node(n, gone=True) for n in gone]
    changes = plan([member(n) for n in sorted(current)], there, signed=signed)
    registered = {int(m.name[1:]) for m in changes.register}
    unregistered = {n.id - 1000 for n in changes.unregister}
    assert registered == current - known - gone
    assert unregistered == (known - current if signed else set())
    # A key that was unregistered is never taken again: somebody must be told.
    assert len(changes.warnings) == len(current & gone) + (not signed and bool(known - current))
    after = [node(n) for n in (known | registered) - unregistered]
    after += [node(n, gone=True) for n in gone | unregistered]
    again = plan([member(n) for n in sorted(current)], after, signed=signed)
    assert not again.register and not again.unregister


def registrar(fed: Federation) -> Registrar:
    def nobody() -> Control:
        raise AssertionError("not asked")

    return Registrar(fed.folder, ServerFolder(fed.folder.root), nobody, lambda line: None)


def test_only_the_coordinators_signed_word_lets_a_node_be_unregistered(tmp_path: Path) -> None:
    fed = Federation(tmp_path, free_port())
    fed.admit("a")
    fed.admit("b")
    one = registrar(fed)
    assert one._signed(members.members(fed.folder))
    # A record that is lost, by whatever mishap, is no such word.
    record = fed.folder.hospitals / "a.json"
    kept = record.read_bytes()
    record.unlink()
    assert not one._signed(members.members(fed.folder))
    record.write_bytes(kept)
    fed.folder.roster.rename(tmp_path / "elsewhere")
    assert not one._signed(members.members(fed.folder))
    (tmp_path / "elsewhere").rename(fed.folder.roster)
    fed.revoke("a")
    assert one._signed(members.members(fed.folder))


def test_a_hospital_whose_admission_has_expired_stays_a_member(tmp_path: Path) -> None:
    fed = Federation(tmp_path, free_port())
    request = hospital.init(HospitalFolder(tmp_path / "old"), "old", now())
    members.admit(fed.folder, request, now() - timedelta(days=60), days=30)
    current = members.members(fed.folder)
    there = [Node(7, current[0].request.node, False, "offline")]
    assert current[0].days_left(now()) < 0
    assert plan(current, there, signed=True) == plan([], [], signed=True)

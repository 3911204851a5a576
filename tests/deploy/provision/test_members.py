"""Whom of the roster a hospital shares sums with: its own people's word, kept in its own folder."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import Result

from client_app.hospital_file import HospitalFolder
from client_app.members import Members
from common.errors import ConfigError, ConsiliumError
from common.federation_file import EnrolmentError
from common.secagg import Roster, RosterEntry
from deploy.provision import hospital, members
from deploy.provision.files import locked
from deploy.provision.kit import refresh
from deploy.provision.requests import Request
from deploy.provision.status import describe
from tests.deploy.provision.conftest import NOW, World, snapshot

LATER = NOW + timedelta(days=1)


@pytest.fixture
def joined(world: World) -> World:
    """Three hospitals that joined when all three were on the roster."""
    for name in ("a", "b", "c"):
        world.hospital(name)
        world.admit(name)
    for name in ("a", "b", "c"):
        world.join(name)
    return world


def folder(world: World, name: str = "a") -> HospitalFolder:
    return HospitalFolder(world.root / name)


def states(world: World, name: str = "a") -> dict[str, str]:
    return {one.name: one.state for one in hospital.standings(folder(world, name))}


def key(world: World, name: str) -> bytes:
    return world.requests[name].identity


def accepted(world: World, name: str = "a") -> set[str]:
    """Whose keys the node lets into a sum, as the ClientApp reads them."""
    roster = Roster.load(folder(world, name).roster.read_bytes(), world.coordinator.public_key())
    identities = roster.identities(LATER.date().isoformat())
    keys = Members.load(folder(world, name).members).accepted(identities)
    return {name for name, identity in identities.items() if identity in keys}


def test_the_first_join_accepts_whom_the_person_was_shown(joined: World) -> None:
    assert states(joined) == {"a": "this hospital", "b": "accepted", "c": "accepted"}
    assert stat.S_IMODE(folder(joined).members.stat().st_mode) == 0o600


def test_three_invented_hospitals_in_a_kit_that_comes_by_itself_wait(joined: World) -> None:
    """``k1_sybil``: everything is signed under the pinned key, and installed; nobody is let in."""
    sybils = ("sybil-a", "sybil-b", "sybil-c")
    for name in sybils:
        joined.hospital(name)
        joined.admit(name, LATER)
    found = joined.join("a", LATER)
    assert {one.name for one in found.waiting} == set(sybils)
    assert {entry.name for entry in found.roster.entries} >= set(sybils)
    assert accepted(joined) == {"b", "c"}
    joined.join("a", LATER)  # however often it comes
    assert accepted(joined) == {"b", "c"}


def test_a_revocation_does_not_wait_and_who_comes_back_is_asked_about_again(joined: World) -> None:
    joined.revoke("b")
    joined.join("a", LATER)
    assert accepted(joined) == {"c"}
    assert states(joined)["b"] == "gone"
    joined.coordinator.revoked.unlink()  # the coordinator takes it back
    joined.admit("b", LATER)
    (one,) = joined.join("a", LATER).waiting
    assert (one.name, one.note) == ("b", "left the roster, and has come back")
    assert accepted(joined) == {"c"}


def test_a_member_with_another_key_is_a_new_one(joined: World) -> None:
    joined.revoke("b")
    fresh = HospitalFolder(joined.root / "b-again")
    joined.requests["b"] = hospital.init(fresh, "b", LATER)
    joined.admit("b", LATER)
    (one,) = joined.join("a", LATER).waiting
    assert (one.name, one.note) == ("b", "its key has changed")
    assert accepted(joined) == {"c"}
    hospital.accept(folder(joined), {"b": key(joined, "b")}, LATER)
    assert accepted(joined) == {"b", "c"}


def test_a_known_key_under_another_name_is_a_new_member() -> None:
    before = RosterEntry("b", b"\1" * 32, "2026-01-01", "2027-01-01")
    known = Members().decide([before], "accepted", NOW)
    renamed = Roster("blood", (RosterEntry("z", b"\1" * 32, "2026-01-01", "2027-01-01"),))
    (one,) = (s for s in known.standings(renamed, bytes(32)) if s.state != "gone")
    assert (one.state, one.note) == ("waiting", "its key was known as that of b")
    assert known.accepted({"z": b"\1" * 32}) == frozenset()


def test_what_was_accepted_can_be_refused_and_accepted_again(joined: World) -> None:
    hospital.refuse(folder(joined), {"b": key(joined, "b")}, LATER)
    assert states(joined)["b"] == "refused" and accepted(joined) == {"c"}
    joined.admit("b", LATER, days=500)
    assert joined.join("a", LATER).waiting == ()
    assert accepted(joined) == {"c"}
    hospital.accept(folder(joined), {"b": key(joined, "b")}, LATER)
    assert accepted(joined) == {"b", "c"}


def test_the_key_that_was_compared_is_accepted_and_no_other(joined: World) -> None:
    """A newer kit may come between the look and the decision."""
    before = snapshot(folder(joined).root)
    with pytest.raises(EnrolmentError, match="another key"):
        hospital.accept(folder(joined), {"b": key(joined, "b"), "c": bytes(32)}, LATER)
    for name in ("nobody", "a"):
        with pytest.raises(ConfigError):
            hospital.accept(folder(joined), {name: bytes(32)}, LATER)
    assert snapshot(folder(joined).root) == before


def test_a_folder_that_joined_under_an_earlier_version_has_accepted_nobody(joined: World) -> None:
    folder(joined).members.unlink()
    assert accepted(joined) == set()
    assert {one.name for one in joined.join("a", LATER).waiting} == {"b", "c"}


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"version": "consilium-members-2", "members": []}',
        '{"version": "consilium-members-1", "members": {}}',
        '{"version": "consilium-members-1", "members": [], "more": 1}',
        '{"version": "consilium-members-1", "members": [1]}',
        '{"version": "consilium-members-1", "members": [{"name": "b"}]}',
        '{"version": "consilium-members-1", "version": "consilium-members-1", "members": []}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_list_lets_nobody_in_and_says_what_to_do(joined: World, text: str) -> None:
    folder(joined).members.write_text(text)
    with pytest.raises(ConsiliumError, match=r"members\.json") as error:
        hospital.standings(folder(joined))
    assert "move it away" in error.value.remedy
    with pytest.raises(ConsiliumError):
        joined.join("a", LATER)


@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["b", "c", "d"]),
            st.sampled_from([b"\1" * 32, b"\2" * 32]),
            st.sampled_from(["accepted", "refused"]),
        )
    )
)
def test_the_last_decision_on_a_name_with_a_key_counts(
    rows: list[tuple[str, bytes, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    known, last = Members(), {}
    for name, identity, state in rows:
        entry = RosterEntry(name, identity, "2026-01-01", "2027-01-01")
        known = known.decide([entry], state, NOW)  # type: ignore[arg-type]
        last[name, identity] = state
    path = tmp_path_factory.mktemp("members") / "members.json"
    known.save(path)
    assert Members.load(path) == known
    for (name, identity), state in last.items():
        assert (identity in known.accepted({name: identity})) == (state == "accepted")


# The command ---------------------------------------------------------------------------------


def listed(
    run: Callable[..., Result], world: World, *arguments: object
) -> dict[str, dict[str, str]]:
    told = run("hospital", "members", folder(world).root, "--json", *arguments).stdout
    return {row["name"]: row for row in json.loads(told)["members"]}


@pytest.fixture
def newcomer(joined: World) -> World:
    """A fourth hospital, on the roster of the first, and waiting there."""
    joined.hospital("d")
    joined.admit("d", LATER)
    joined.join("a", LATER)
    return joined


def test_the_fingerprint_is_the_one_that_the_member_itself_sees(
    newcomer: World, run: Callable[..., Result]
) -> None:
    here = listed(run, newcomer)["d"]
    assert here["state"] == "waiting"
    newcomer.join("d", LATER)
    told = json.loads(run("hospital", "members", folder(newcomer, "d").root, "--json").stdout)
    (own,) = (row for row in told["members"] if row["state"] == "this hospital")
    assert own["fingerprint"] == here["fingerprint"] and len(own["fingerprint"]) == 39


def test_accepting_by_fingerprint_asks_nothing_and_a_wrong_one_changes_nothing(
    newcomer: World, run: Callable[..., Result]
) -> None:
    prints = {name: row["fingerprint"] for name, row in listed(run, newcomer).items()}
    with pytest.raises(EnrolmentError, match="nothing was changed"):
        run("hospital", "members", folder(newcomer).root, "--accept", f"d={prints['b']}")
    assert accepted(newcomer) == {"b", "c"}
    spelt = prints["d"].upper().replace("-", " ")
    said = run("hospital", "members", folder(newcomer).root, "--accept", f"d={spelt}").output
    assert accepted(newcomer) == {"b", "c", "d"}
    assert "accepted" in said and prints["d"] in said


@pytest.mark.parametrize("typed", ["no\n", "y\n", "\n", ""])
def test_nobody_is_accepted_unless_somebody_says_yes(
    newcomer: World, run: Callable[..., Result], typed: str
) -> None:
    for choice in (("--accept", "d"), ("--accept-all",)):
        with pytest.raises(ConfigError, match="nothing was changed"):
            run("hospital", "members", folder(newcomer).root, *choice, typed=typed)
    assert accepted(newcomer) == {"b", "c"}
    run("hospital", "members", folder(newcomer).root, "--accept", "d", typed="yes\n")
    assert accepted(newcomer) == {"b", "c", "d"}


def test_all_who_wait_are_accepted_but_whom_one_refuses(
    newcomer: World, run: Callable[..., Result]
) -> None:
    newcomer.hospital("e")
    newcomer.admit("e", LATER)
    newcomer.join("a", LATER)
    rows = listed(run, newcomer, "--accept-all", "--refuse", "d", "--yes")
    assert {name: row["state"] for name, row in rows.items()} == {
        "a": "this hospital", "b": "accepted", "c": "accepted", "d": "refused", "e": "accepted",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="accepted and refused"):
        run("hospital", "members", folder(newcomer).root, "--accept", "d", "--refuse", "d")


def test_who_waits_is_told_with_what_to_do(newcomer: World, run: Callable[..., Result]) -> None:
    said = run("hospital", "members", folder(newcomer).root).output
    assert "no sum is shared with d until accepted: --accept NAME" in said
    said = run("hospital", "join", folder(newcomer).root, newcomer.coordinator.kits / "a").output
    assert "! d must be accepted" in said
    policy = folder(newcomer).policy
    policy.write_text(policy.read_text().replace('members = "ask"', 'members = "auto"'))
    assert "may be in sums beside" in run("hospital", "members", folder(newcomer).root).output


def test_at_the_first_join_the_person_sees_names_and_fingerprints_before_saying_yes(
    joined: World, run: Callable[..., Result]
) -> None:
    new = joined.hospital("d", datetime.now(UTC))
    joined.admit("d")
    prints = {name: row["fingerprint"] for name, row in listed(run, joined).items()}
    said = run("hospital", "join", new.root, joined.coordinator.kits / "d", typed="yes\n").output
    shown = said.partition("The same?")[0]
    assert all(prints[name] in shown for name in ("a", "b", "c"))
    assert accepted(joined, "d") == {"a", "b", "c"}


def test_a_hospital_that_has_not_joined_is_told_so(
    world: World, run: Callable[..., Result]
) -> None:
    made = world.hospital("a")
    with pytest.raises(ConfigError) as error:
        run("hospital", "members", made.root)
    assert error.value.remedy


# What is agreed at admission -------------------------------------------------------------------


def test_admission_fixes_how_many_images_a_hospital_may_claim(
    world: World, run: Callable[..., Result]
) -> None:
    made = HospitalFolder(world.root / "a")
    run("hospital", "init", made.root, "--name", "a", "--max-images", 900)
    request = Request.parse(made.request.read_bytes())
    assert request.max_images == 900
    fed = world.coordinator

    def admitted(*more: object) -> int | None:
        run("federation", "admit", fed.root, made.request, "--fingerprint", request.fingerprint,
            *more)  # fmt: skip
        roster = Roster.load(fed.roster.read_bytes(), fed.public_key())
        (row,) = describe(fed, NOW)["hospitals"]
        assert row["max_images"] == roster.max_images("a")
        return roster.max_images("a")

    assert admitted() == 900
    assert admitted("--max-images", 500) == 500
    assert admitted("--days", 400) == 500  # extended: as it was agreed
    assert "500" in run("federation", "status", fed.root).output


def test_a_proposal_is_signed_and_a_request_without_one_is_as_it_always_was(world: World) -> None:
    made = HospitalFolder(world.root / "a")
    asked = hospital.init(made, "a", NOW, max_images=900)
    document = asked.document()
    assert document["version"] == "consilium-request-2"
    for change in ({"max-images": 901}, {"max-images": "900"}, {"max-images": True}, {}):
        altered = {**document, **change}
        if not change:
            del altered["max-images"]
        with pytest.raises(EnrolmentError):
            Request.of(altered)
        with pytest.raises(EnrolmentError):
            Request.of({**altered, "version": "consilium-request-1"})
    with pytest.raises(ConfigError, match="proposes 900"):
        hospital.init(made, "a", NOW, max_images=901)
    assert hospital.init(made, "a", NOW) == asked
    plain = hospital.init(HospitalFolder(world.root / "b"), "b", NOW)
    assert plain.document()["version"] == "consilium-request-1"


def test_a_record_of_an_earlier_version_opens_without_a_bound(world: World) -> None:
    world.hospital("a")
    world.admit("a")
    path = world.coordinator.hospitals / "a.json"
    document = json.loads(path.read_text())
    del document["max-images"]
    path.write_text(json.dumps(document | {"version": "consilium-hospital-1"}))
    (member,) = members.members(world.coordinator)
    assert member.max_images is None
    path.write_text(json.dumps(document))
    with pytest.raises(EnrolmentError, match="exactly the fields"):
        members.members(world.coordinator)


def test_an_admission_may_begin_later_so_that_the_others_can_accept_before(
    joined: World, run: Callable[..., Result]
) -> None:
    made = joined.hospital("d")
    day = (datetime.now(UTC).date() + timedelta(days=5)).isoformat()
    said = run("federation", "admit", joined.coordinator.root, made.request, "--from", day,
               "--fingerprint", joined.requests["d"].fingerprint).output  # fmt: skip
    assert "must accept it" in said
    joined.join("a", LATER)
    assert states(joined)["d"] == "waiting"
    roster = Roster.load(folder(joined).roster.read_bytes(), joined.coordinator.public_key())
    assert "d" not in roster.identities(datetime.now(UTC).date().isoformat())
    assert "d" in roster.identities(day)
    for wrong in ("tomorrow", "2199-01-01"):
        with pytest.raises(ConfigError, match="cannot begin"):
            run("federation", "admit", joined.coordinator.root, made.request, "--from", wrong,
                "--fingerprint", joined.requests["d"].fingerprint)  # fmt: skip


def test_a_roster_is_dated_and_reissued_without_a_change(joined: World) -> None:
    fed = joined.coordinator

    def issued() -> str:
        return Roster.load(fed.roster.read_bytes(), fed.public_key()).issued

    before = issued()
    assert before.startswith("2026-03-01T12:00:0")
    with locked(fed.root):
        assert refresh(fed, LATER) == []
        assert issued() == before
        assert refresh(fed, LATER, reissue=True) == ["a", "b", "c"]
    assert issued() == LATER.strftime("%Y-%m-%dT%H:%M:%SZ")
    joined.join("a", LATER)
    assert accepted(joined) == {"b", "c"}


def test_a_roster_of_an_earlier_version_is_replaced_by_a_dated_one_at_the_next_refresh(
    joined: World,
) -> None:
    fed, signer = joined.coordinator, joined.coordinator.signer()
    now = Roster.load(fed.roster.read_bytes(), signer.public)
    fed.roster.write_bytes(Roster(now.federation, now.entries).sign(signer))
    assert b"consilium-roster-1" in fed.roster.read_bytes()
    with locked(fed.root):
        refresh(fed, LATER)
    assert Roster.load(fed.roster.read_bytes(), signer.public).issued
    assert describe(fed, NOW)["warnings"] == []


def test_the_list_is_whole_after_a_kill(joined: World, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    class Killed(BaseException):
        pass

    def replace(source: str, target: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            hospital.refuse(folder(joined), {"b": key(joined, "b")}, LATER)
    assert accepted(joined) == {"b", "c"}

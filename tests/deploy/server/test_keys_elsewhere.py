"""A server that holds no signing key: who is admitted is signed on another machine and copied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from client_app.hospital_file import HospitalFolder
from common.errors import ConfigError
from deploy.node import kits
from deploy.provision import federation, hospital, members
from deploy.provision.federation import SIGNED_PARTS, FederationFolder
from deploy.provision.files import locked
from deploy.provision.kit import Kit, refresh
from deploy.provision.requests import Request
from deploy.provision.status import describe
from tests.deploy.server.conftest import Federation, now, until

KEYS = ("coordinator.key", "ca.key")


def copied(office: FederationFolder, server: Path) -> None:
    """What the guide says to copy after each command, in its order; nothing is deleted there."""
    for part in SIGNED_PARTS:
        source = office.root / part
        if source.is_dir():
            shutil.copytree(source, server / part, dirs_exist_ok=True)
        elif source.exists():
            shutil.copy2(source, server / part)


@pytest.fixture
def apart(fed: Federation) -> tuple[FederationFolder, Federation]:
    """The office, which has the keys and a member a, and the server's folder without them."""
    office = fed.folder
    a = fed.admit("a")
    hospital.join(a, Kit.read(office.kits / "a"), office.public_key(), now())
    server = fed.root / "server"
    shutil.copytree(office.root, server, ignore=shutil.ignore_patterns(*KEYS))
    assert [path.name for path in (server / "private").iterdir()] == ["tls.key"]
    fed.folder = FederationFolder(server)
    return office, fed


def test_a_server_without_the_signing_keys_admits_and_revokes_by_what_is_copied_to_it(
    apart: tuple[FederationFolder, Federation],
) -> None:
    office, fed = apart
    victim, address = HospitalFolder(fed.root / "a"), f"localhost:{fed.port}"
    fed.start()
    assert set(fed.nodes()) == {"a"}
    request = hospital.init(HospitalFolder(fed.root / "b"), "b", now())
    members.admit(office, request, now(), 30)
    copied(office, fed.folder.root)
    until(lambda: "b" in fed.nodes())
    assert fed.activate(HospitalFolder(fed.root / "b")) == int(fed.nodes()["b"])
    # The member's node takes the newer kit by itself, and shares no sum with the newcomer.
    (line,) = kits.update(victim, address)
    assert line == (
        "kit: b has joined; no sum is shared with it until it is accepted here: consilium "
        f"hospital members {victim.root} --accept b"
    )
    assert kits.update(victim, address) == []
    states = {one.name: one.state for one in hospital.standings(victim)}
    assert states == {"a": "this hospital", "b": "waiting"}
    hospital.accept(victim, {"b": request.identity}, now())
    members.revoke(office, "b", now(), "")
    copied(office, fed.folder.root)
    until(lambda: "b" not in fed.nodes())
    assert kits.update(victim, address) == ["kit: b has left"]
    assert {one.name: one.state for one in hospital.standings(victim)}["b"] == "gone"
    assert not any((fed.folder.private / name).exists() for name in KEYS)


def test_commands_that_sign_say_where_to_run_them_and_change_nothing(
    apart: tuple[FederationFolder, Federation],
) -> None:
    _, fed = apart
    request = hospital.init(HospitalFolder(fed.root / "b"), "b", now())
    before = {p: p.read_bytes() for p in fed.folder.root.rglob("*") if p.is_file()}

    def renewed() -> None:
        with locked(fed.folder.root):
            refresh(fed.folder, now())

    commands: list[Callable[[], object]] = [
        lambda: members.admit(fed.folder, request, now(), 30),
        lambda: members.revoke(fed.folder, "a", now(), ""),
        lambda: federation.renew(fed.folder, now(), 30),
        renewed,
    ]
    for command in commands:
        with pytest.raises(ConfigError, match="nothing in it can be signed") as error:
            command()
        assert (
            "roster.json" in error.value.remedy and "where the keys are kept" in error.value.remedy
        )
    after = {p: p.read_bytes() for p in fed.folder.root.rglob("*") if p.is_file()}
    assert {p: data for p, data in after.items() if p.name != ".lock"} == {
        p: data for p, data in before.items() if p.name != ".lock"
    }


def test_a_folder_to_serve_from_is_no_folder_to_worry_about(
    apart: tuple[FederationFolder, Federation],
) -> None:
    office, fed = apart
    told = [w for w in describe(fed.folder, now())["warnings"] if "key" in w]
    assert told == []
    office.coordinator_key.unlink()  # one of the two: that is a loss
    assert any("coordinator.key is missing" in w for w in describe(office, now())["warnings"])


def test_a_request_is_all_that_the_office_needs(
    apart: tuple[FederationFolder, Federation],
) -> None:
    """It comes by e-mail, and is checked against the fingerprint told by telephone."""
    office, fed = apart
    made = hospital.init(HospitalFolder(fed.root / "b"), "b", now())
    data = (fed.root / "b" / "request.json").read_bytes()
    assert Request.parse(data).fingerprint == made.fingerprint
    assert members.admit(office, Request.parse(data), now(), 30) == ["a", "b"]

"""A kit is believed whole or not at all."""

from __future__ import annotations

import base64
import json
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from client_app.hospital_file import HospitalFolder
from common.errors import ConfigError, ConsiliumError
from common.federation_file import EnrolmentError, FederationFile
from common.secagg import Identity, Roster
from deploy.provision import certificates, hospital, keys
from deploy.provision.kit import Kit
from tests.deploy.provision.conftest import NOW, World, settings, snapshot


@pytest.fixture
def kit(world: World, tmp_path: Path) -> Path:
    """A kit on its way to hospital a, which has not joined yet."""
    world.hospital("a")
    world.hospital("b")
    world.admit("a")
    world.admit("b")
    return Path(shutil.copytree(world.coordinator.kits / "a", tmp_path / "mail"))


def refused(world: World, kit: Path) -> str:
    """Joining with the kit under the true coordinator's key fails and writes nothing."""
    folder = HospitalFolder(world.root / "a")
    before = snapshot(folder.root)
    with pytest.raises(ConsiliumError) as error:
        hospital.join(folder, Kit.read(kit), world.coordinator.public_key(), NOW)
    assert error.value.remedy
    assert snapshot(folder.root) == before
    return error.value.what


def test_the_kit_as_it_was_sent_is_accepted(world: World, kit: Path) -> None:
    folder = HospitalFolder(world.root / "a")
    hospital.join(folder, Kit.read(kit), world.coordinator.public_key(), NOW)
    assert snapshot(folder.kit) == snapshot(kit)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("address", "evil.example.org:9443"), ("name", "bones"), ("classes", ["x", "y"]),
        ("image-size", 32), ("channels", 1), ("ca-sha256", "0" * 64), ("roster-sha256", "0" * 64),
        ("issued", "2026-03-02T12:00:00Z"),
    ],
)  # fmt: skip
def test_nothing_in_the_description_can_be_changed(
    world: World, kit: Path, field: str, value: object
) -> None:
    path = kit / "federation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert "not signed by the coordinator" in refused(world, kit)


@pytest.mark.parametrize(
    "change",
    [{"version": "2"}, {"more": 1}, {"image-size": "28"}, {"signature": "AA=="}, {"channels": 2},
     {"issued": 5}, {"ca-sha256": "AB" * 32}, {"classes": ["a", "a"]}, {"classes": ["../a", "b"]},
     {"address": "http://x"}, {"name": "a/b"}],
)  # fmt: skip
def test_a_malformed_description_is_refused(
    world: World, kit: Path, change: dict[str, object]
) -> None:
    path = kit / "federation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "description" in refused(world, kit)


def test_another_authority_in_the_kit_is_refused(world: World, kit: Path) -> None:
    """Or whoever carries the kit could stand between the hospital and its server."""
    key = keys.load_pem_private_key(keys.new_tls_key(), None)
    (kit / "ca.crt").write_bytes(certificates.make_authority("blood", key, NOW))  # type: ignore[arg-type]
    assert "ca.crt of the kit is not the one" in refused(world, kit)


def test_a_certificate_that_is_no_authority_is_refused_though_it_is_signed(
    world: World, kit: Path
) -> None:
    server = certificates.load_certificate(world.coordinator.server)
    signer, before = world.coordinator.signer(), (kit / "federation.json").read_bytes()
    told = FederationFile.load(before, signer.public)
    (kit / "ca.crt").write_bytes(world.coordinator.server.read_bytes())
    wrong = FederationFile(
        told.description, certificates.digest(server), told.roster_sha256, told.issued
    )
    (kit / "federation.json").write_bytes(wrong.sign(signer))
    assert "not the certificate of a certificate authority" in refused(world, kit)


def test_another_roster_is_refused_even_an_older_one_of_the_coordinators(
    world: World, kit: Path
) -> None:
    signer = world.coordinator.signer()
    entries = Roster.load((kit / "roster.json").read_bytes(), signer.public).entries
    older = Roster("blood", entries[:1]).sign(signer)
    foreign = Roster("blood", entries).sign(Identity.generate())
    (kit / "roster.json").write_bytes(older)
    assert "roster.json of the kit is not the one" in refused(world, kit)
    (kit / "roster.json").write_bytes(foreign)
    assert "not signed by the coordinator" in refused(world, kit)


def test_a_kit_wholly_of_somebody_else_does_not_pass_the_fingerprint(
    world: World, kit: Path
) -> None:
    forger = Identity.generate()
    before = FederationFile.load(
        (kit / "federation.json").read_bytes(), world.coordinator.public_key()
    )
    (kit / "coordinator.pub").write_text(base64.b64encode(forger.public).decode())
    (kit / "federation.json").write_bytes(before.sign(forger))
    assert Kit.read(kit).fingerprint != keys.coordinator_fingerprint(world.coordinator.public_key())
    assert "another coordinator's key" in refused(world, kit)


@pytest.mark.parametrize("name", ["ca.crt", "roster.json", "federation.json", "coordinator.pub"])
@pytest.mark.parametrize("content", [None, b"", b"\x00\xff", b" " * 1_100_000])
def test_a_kit_with_a_damaged_file_is_refused(
    world: World, kit: Path, name: str, content: bytes | None
) -> None:
    (kit / name).unlink()
    if content is not None:
        (kit / name).write_bytes(content)
    assert refused(world, kit)


def test_a_readme_is_welcome_but_not_needed(world: World, kit: Path) -> None:
    (kit / "README.txt").unlink()
    hospital.join(
        HospitalFolder(world.root / "a"), Kit.read(kit), world.coordinator.public_key(), NOW
    )


def test_what_is_no_folder_is_no_kit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        Kit.read(tmp_path / "kit.zip")


def test_an_installed_description_that_was_tampered_with_is_noticed(
    world: World, kit: Path
) -> None:
    folder = HospitalFolder(world.root / "a")
    hospital.join(folder, Kit.read(kit), world.coordinator.public_key(), NOW)
    folder.federation.write_text(folder.federation.read_text().replace("platelet", "basophil"))
    with pytest.raises(EnrolmentError, match="not signed"):
        folder.load_federation()


def test_an_authority_that_has_ended_is_refused(world: World, kit: Path) -> None:
    folder, late = HospitalFolder(world.root / "a"), NOW + timedelta(days=3651)
    with pytest.raises(EnrolmentError, match=r"ca\.crt is valid from"):
        hospital.join(folder, Kit.read(kit), world.coordinator.public_key(), late)


def test_the_readme_says_where_the_node_connects(kit: Path) -> None:
    text = (kit / "README.txt").read_text()
    assert settings().address in text
    assert "consilium hospital join" in text

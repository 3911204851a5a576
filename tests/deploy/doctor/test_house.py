"""The hospital's own files: each thing that is broken fails its own check, and no other."""

from __future__ import annotations

import base64
import hashlib
import shutil
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest

from common.federation_file import FederationFile, read_limited
from common.secagg import Identity, Roster
from deploy.provision import certificates, keys
from tests.deploy.doctor.conftest import BEGUN, Ward, row, skipped, wrong


def test_an_entry_that_is_misspelt_in_hospital_toml_is_named(ward: Ward) -> None:
    ward.edit(ward.folder.file, "crop = 0", "corp = 0")
    document = ward.check()
    assert wrong(document) == {"hospital.toml": "FAIL"}
    assert "corp" in row(document, "hospital.toml")["found"]
    assert document["hospital"] is None


def test_an_entry_that_is_wrong_in_policy_toml_is_named(ward: Ward) -> None:
    ward.serve()
    ward.edit(ward.folder.policy, "total-epsilon = 8.0", "total-epsilon = -1.0")
    document = ward.check()
    assert wrong(document) == {"policy.toml": "FAIL"}
    assert "total-epsilon" in row(document, "policy.toml")["found"]
    assert set(skipped(document)) == {
        "patients", "delta", "ledger", "budget", "members", "roster age",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "mode", "command"),
    [
        ("private/node.key", 0o644, "chmod 600"),
        ("private/identity.key", 0o640, "have it revoked"),
        ("private", 0o755, "chmod 700"),
        (".", 0o750, "chmod 700"),
    ],
)
def test_loose_permissions_are_found_with_the_command_that_closes_them(
    ward: Ward, name: str, mode: int, command: str
) -> None:
    ward.serve()
    (ward.folder.root / name).chmod(mode)
    document = ward.check()
    assert wrong(document) == {"permissions": "FAIL"}
    assert f"{mode:04o}" in row(document, "permissions")["found"]
    assert command in row(document, "permissions")["remedy"]
    assert set(skipped(document)) == {
        "node key", "identity key", "admission", "members",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "check", "dependent"),
    [("node.key", "node key", set()), ("identity.key", "identity key", {"admission", "members"})],
)
def test_a_key_of_another_hospital_is_found(
    ward: Ward, name: str, check: str, dependent: set[str]
) -> None:
    ward.serve()
    foreign = ward.folder.root.parent / "hospital-01" / "private" / name
    shutil.copy2(foreign, ward.folder.private / name)
    document = ward.check()
    assert wrong(document) == {check: "FAIL"}
    assert "same backup" in row(document, check)["remedy"]
    assert set(skipped(document)) == dependent


def test_a_node_key_of_another_form_is_found(ward: Ward) -> None:
    ward.serve()
    ward.folder.node_key.write_bytes(keys.new_tls_key())  # P-384, but PKCS #8
    document = ward.check()
    assert wrong(document) == {"node key": "FAIL"}
    assert "OpenSSH" in row(document, "node key")["found"]


def test_a_missing_key_is_found(ward: Ward) -> None:
    ward.serve()
    ward.folder.identity_key.unlink()
    document = ward.check()
    assert wrong(document) == {"permissions": "FAIL"}
    assert "backup" in row(document, "permissions")["remedy"]


def test_a_request_under_another_name_is_found(ward: Ward) -> None:
    ward.serve()
    shutil.copy2(ward.folder.root.parent / "hospital-01" / "request.json", ward.folder.request)
    document = ward.check()
    assert wrong(document) == {"request": "FAIL"}
    assert 'name = "hospital-01"' in row(document, "request")["remedy"]


def test_a_hospital_that_has_not_joined_is_told_how(ward: Ward) -> None:
    shutil.rmtree(ward.folder.kit)
    ward.folder.coordinator.unlink()
    document = ward.check()
    assert wrong(document) == {"kit": "FAIL"}
    assert "consilium hospital join" in row(document, "kit")["remedy"]
    assert set(skipped(document).values()) == {"kit"}


def test_a_kit_that_was_changed_is_found(ward: Ward) -> None:
    ward.edit(ward.folder.federation, '"localhost:9092"', '"localhost:9093"')
    document = ward.check()
    assert wrong(document) == {"kit": "FAIL"}
    assert "not signed" in row(document, "kit")["found"]


def test_a_kit_under_another_key_than_the_pinned_one_is_found(ward: Ward) -> None:
    other = Identity.generate().public
    ward.folder.coordinator.write_bytes(base64.b64encode(other) + b"\n")
    document = ward.check()
    assert wrong(document) == {"kit": "FAIL"}
    assert "another coordinator's key" in row(document, "kit")["found"]


def entry(ward: Ward, **changes: str) -> None:
    """Sign the roster anew, with this hospital's entry changed, as a coordinator could."""
    signer = ward.coordinator.signer()
    roster = Roster.load(read_limited(ward.folder.roster), signer.public)
    rows = (replace(e, **changes) if e.name == "hospital-00" else e for e in roster.entries)
    signed = Roster(roster.federation, tuple(rows)).sign(signer)
    told = FederationFile.load(read_limited(ward.folder.federation), signer.public)
    ward.folder.roster.write_bytes(signed)
    digest = hashlib.sha256(signed).digest()
    ward.folder.federation.write_bytes(replace(told, roster_sha256=digest).sign(signer))


@pytest.mark.parametrize(
    ("days", "status"), [(-1, "FAIL"), (0, "WARN"), (29, "WARN"), (30, None), (300, None)]
)
def test_the_end_of_the_admission_is_told_in_time(
    ward: Ward, days: int, status: str | None
) -> None:
    ward.serve()
    last = datetime.now(UTC).date() + timedelta(days=days)
    entry(ward, expires=last.isoformat())
    document = ward.check()
    assert wrong(document) == ({"admission": status} if status else {})
    assert last.isoformat() in row(document, "admission")["found"]
    if status:
        assert "admit request.json again" in row(document, "admission")["remedy"]


def test_an_admission_that_begins_later_and_a_roster_without_this_hospital_are_found(
    ward: Ward,
) -> None:
    ward.serve()
    tomorrow = datetime.now(UTC).date() + timedelta(days=2)
    entry(ward, valid_from=tomorrow.isoformat())
    assert wrong(ward.check()) == {"admission": "FAIL"}
    entry(ward, valid_from=date(2026, 1, 1).isoformat(), name="st-mary")
    document = ward.check()
    assert wrong(document) == {"admission": "FAIL"}
    assert "no hospital hospital-00" in row(document, "admission")["found"]


def test_another_key_on_the_roster_is_found(ward: Ward) -> None:
    ward.serve()
    entry(ward, identity=bytes(31) + b"\x01")  # type: ignore[arg-type]
    document = ward.check()
    assert wrong(document) == {"admission": "FAIL"}
    assert "another identity key" in row(document, "admission")["found"]


def test_an_authority_that_has_ended_is_found_and_its_signature_still_checked(ward: Ward) -> None:
    key = keys.load_tls_key(ward.coordinator.authority_key)
    old = certificates.make_authority("demo", key, BEGUN - timedelta(days=3650))
    made = certificates.parse_certificate(old, "it")
    signer = ward.coordinator.signer()
    told = FederationFile.load(read_limited(ward.folder.federation), signer.public)
    ward.folder.authority.write_bytes(old)
    assert wrong(ward.check())["kit"] == "FAIL"  # not the one that was signed
    changed = replace(told, ca_sha256=certificates.digest(made))
    ward.folder.federation.write_bytes(changed.sign(signer))
    ward.serve()
    document = ward.check()
    assert wrong(document) == {"CA certificate": "FAIL"}
    assert "expired" in row(document, "CA certificate")["found"]
    assert skipped(document)["server TLS"] == "CA certificate"

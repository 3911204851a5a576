"""The whole check-up: what it says of a sound hospital, in which form, and that it only looks."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.cli import cli
from deploy.doctor.checkup import CHECKS, Check, examine
from deploy.doctor.result import Finding, Result
from tests.deploy.doctor.conftest import Ward, skipped, wrong
from tests.deploy.ledger.building import train


def digest(root: Path) -> str:
    """Of every name, mode, time of change, owner and content below ``root``."""
    lines = []
    for path in sorted([root, *root.rglob("*")]):
        s = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        lines.append(f"{path} {s.st_mode} {s.st_mtime_ns} {s.st_uid} {content!r}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_a_sound_hospital_passes_every_check(ward: Ward) -> None:
    ward.serve()
    document = ward.check()
    assert wrong(document) == {} and skipped(document) == {}
    assert document["status"] in ("PASS", "WARN")  # WARN: a machine with little room
    assert document["hospital"] == "hospital-00"


def test_nothing_in_the_folder_is_changed_or_made(ward: Ward) -> None:
    ward.serve()
    before = digest(ward.folder.root)
    ward.check()
    assert digest(ward.folder.root) == before
    train(ward.folder.root / "ledger.sqlite")
    (ward.folder.root / "egress.tsv").touch(0o600)
    (ward.folder.root / "runs").mkdir(0o700)
    before = digest(ward.folder.root)
    document = ward.check()
    assert digest(ward.folder.root) == before
    assert wrong(document) == {}


def test_json_is_one_document_of_the_form_that_is_described(ward: Ward) -> None:
    ward.serve()
    result = CliRunner().invoke(cli, ["hospital", "check", str(ward.folder.root), "--json"])
    document = json.loads(result.output)
    assert result.exit_code == 0
    assert set(document) == {"hospital", "checks", "status"}
    assert [r["name"] for r in document["checks"]] == [check.name for check in CHECKS]
    for found in document["checks"]:
        assert set(found) == {"name", "status", "found", "remedy"}
        assert all(isinstance(value, str) for value in found.values()) and found["found"]
        assert (found["status"] == "PASS") == (found["remedy"] == "")


def test_the_table_has_every_check_and_then_what_to_do(ward: Ward) -> None:
    ward.go_to("localhost:1")
    result = CliRunner().invoke(cli, ["hospital", "check", str(ward.folder.root)])
    assert result.exit_code == 1
    table, _, after = result.output.partition("What to do")
    assert all(f"│ {check.name}" in table for check in CHECKS)
    assert "FAIL server address: ask the coordinator whether the server runs" in after
    assert "server TLS" in after and "could not be checked" in " ".join(after.split())


def test_a_folder_that_is_none_fails_with_exit_code_1_and_without_traceback(
    tmp_path: Path,
) -> None:
    for folder in (tmp_path / "none", tmp_path):
        result = CliRunner().invoke(cli, ["hospital", "check", str(folder), "--json"])
        document = json.loads(result.output)
        assert result.exit_code == 1 and document["status"] == "FAIL"
        assert document["hospital"] is None
        assert wrong(document) == {"folder": "FAIL"}
    assert not (tmp_path / "none").exists() and list(tmp_path.iterdir()) == []


def test_a_check_that_breaks_down_fails_by_itself_and_tells_no_text(ward: Ward) -> None:
    def broken(_: object) -> Finding:
        raise RuntimeError("something of unknown content")

    def unreadable(_: object) -> Finding:
        raise PermissionError(13, "Permission denied", "somewhere")

    checks = (Check("one", broken), Check("two", unreadable), Check("three", broken, ("one",)))
    document = examine(ward.folder, datetime.now(UTC), checks)
    one, two, three = document["checks"]
    assert (one["status"], two["status"], three["status"]) == ("FAIL", "FAIL", "WARN")
    assert "RuntimeError" in one["found"] and "unknown content" not in json.dumps(document)
    assert two["found"] == "somewhere: Permission denied" and two["remedy"]
    assert three["found"] == "not checked: see one"


def test_no_key_and_no_password_of_a_proxy_is_said(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    ward.serve()
    monkeypatch.setenv("HTTPS_PROXY", "http://it:hush-hush@proxy.invalid:3128")
    text = json.dumps(ward.check())
    secret = ward.folder.identity_key.read_bytes()
    forms = [secret.hex(), base64.b64encode(secret).decode(), "hush-hush"]
    forms += ward.folder.node_key.read_text().splitlines()[1:-1]
    assert not [form for form in forms if form in text]


def test_every_needed_check_comes_before_the_one_that_needs_it() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for number, check in enumerate(CHECKS):
        assert set(check.needs) <= set(names[:number])


@pytest.mark.parametrize(("status", "remedy"), [("PASS", "x"), ("WARN", ""), ("FAIL", "")])
def test_a_remedy_belongs_to_what_is_not_pass(status: str, remedy: str) -> None:
    with pytest.raises(ValueError, match="remedy"):
        Result("a", status, "b", remedy)  # type: ignore[arg-type]


def test_the_help_of_the_command_does_not_load_what_checks_need() -> None:
    heavy = ("torch", "flwr", "numpy", "deploy.doctor.checkup")
    asked = f"import sys, deploy.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

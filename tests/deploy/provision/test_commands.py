"""The commands: what they ask, what they print, how they end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from common.errors import ConfigError, ConsiliumError
from common.federation_file import EnrolmentError
from deploy.provision.keys import coordinator_fingerprint
from tests.deploy.provision.conftest import World, snapshot

CONSILIUM = str(Path(sys.executable).parent / "consilium")


def test_the_help_loads_no_heavy_library() -> None:
    code = (
        "import sys, deploy.cli\n"
        "heavy = {'torch', 'opacus', 'numpy', 'flwr', 'scipy', 'cryptography', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"


def test_every_command_has_a_help(run: Callable[..., Result]) -> None:
    for app, names in (
        ("federation", ("init", "renew", "admit", "revoke", "refresh", "status", "demo")),
        ("hospital", ("init", "join")),
    ):
        listing = run(app, "--help").output
        for name in names:
            assert name in listing
            assert "Usage" in run(app, name, "--help").output


def test_reading_a_hospitals_files_loads_no_torch(world: World) -> None:
    folder = world.hospital("a")
    code = (
        "import sys\nfrom pathlib import Path\nfrom client_app.hospital_file import HospitalFile\n"
        f"HospitalFile.load(Path({str(folder.file)!r}))\nprint('torch' in sys.modules)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "False"


def test_what_hospital_and_coordinator_read_to_each_other_is_the_same(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    fed, home = tmp_path / "fed", tmp_path / "h"
    made = run("federation", "init", fed, "--name", "blood", "--address", "localhost:9443",
               "--host", "127.0.0.1", "--classes", "a, b").output  # fmt: skip
    key = made.split("its fingerprint:")[1].split()[0]
    asked = run("hospital", "init", home, "--name", "st-mary").output
    request = asked.split("fingerprint of the request:")[1].split()[0]
    run("federation", "admit", fed, home / "request.json", "--fingerprint", request.upper())
    run("hospital", "join", home, fed / "kits" / "st-mary", "--fingerprint", key.replace("-", " "))
    assert (home / "kit" / "roster.json").read_bytes() == (fed / "roster.json").read_bytes()


def test_typing_what_one_hears_confirms_too(world: World, run: Callable[..., Result]) -> None:
    folder = world.hospital("a")
    heard = world.requests["a"].fingerprint
    said = run("federation", "admit", world.coordinator.root, folder.request, typed=heard + "\n")
    assert "a is admitted" in said.output


@pytest.mark.parametrize("typed", ["no\n", "y\n", "\n\n", "", "0000-0000\n"])
def test_nothing_is_admitted_or_joined_unless_the_fingerprint_is_confirmed(
    world: World, run: Callable[..., Result], typed: str
) -> None:
    folder = world.hospital("a")
    before = snapshot(world.coordinator.root)
    with pytest.raises((EnrolmentError, ConfigError), match="nothing was changed"):
        run("federation", "admit", world.coordinator.root, folder.request, typed=typed)
    assert snapshot(world.coordinator.root) == before
    _admit(world, run)
    before = snapshot(folder.root)
    with pytest.raises((EnrolmentError, ConfigError), match="nothing was changed"):
        run("hospital", "join", folder.root, world.coordinator.kits / "a", typed=typed)
    assert snapshot(folder.root) == before


def _admit(world: World, run: Callable[..., Result]) -> None:
    request = world.requests["a"]
    run("federation", "admit", world.coordinator.root, world.root / "a" / "request.json",
        "--fingerprint", request.fingerprint)  # fmt: skip


def test_a_wrong_fingerprint_is_refused(world: World, run: Callable[..., Result]) -> None:
    folder, fed = world.hospital("a"), world.coordinator
    wrong = coordinator_fingerprint(bytes(32))
    with pytest.raises(EnrolmentError, match="not the one that was told"):
        run("federation", "admit", fed.root, folder.request, "--fingerprint", wrong)
    _admit(world, run)
    with pytest.raises(EnrolmentError, match="not the one that was told"):
        run("hospital", "join", folder.root, fed.kits / "a", "--fingerprint", wrong)
    assert not folder.coordinator.exists()


def test_the_coordinators_key_is_confirmed_once(world: World, run: Callable[..., Result]) -> None:
    folder = world.hospital("a")
    _admit(world, run)
    run("hospital", "join", folder.root, world.coordinator.kits / "a", typed="yes\n")
    said = run("hospital", "join", folder.root, world.coordinator.kits / "a").output
    assert "fingerprint" not in said


def test_an_admission_is_extended_with_words(world: World, run: Callable[..., Result]) -> None:
    folder = world.hospital("a")
    _admit(world, run)
    said = run("federation", "admit", world.coordinator.root, folder.request, "--days", 10,
               typed="yes\n").output  # fmt: skip
    assert "admitted already" in said


def test_whose_kits_must_be_sent_is_told(world: World, run: Callable[..., Result]) -> None:
    world.hospital("a")
    world.admit("a")
    folder = world.hospital("b")
    said = run("federation", "admit", world.coordinator.root, folder.request, typed="yes\n").output
    assert "send the new kits to a as well" in said
    said = run("federation", "revoke", world.coordinator.root, "b", "--reason", "moved").output
    assert "send the new kits to a as well" in said
    assert "up to date" in run("federation", "refresh", world.coordinator.root).output


@pytest.mark.parametrize(
    "arguments",
    [
        ("federation", "status", "none"), ("federation", "renew", "none"),
        ("federation", "refresh", "none"), ("federation", "revoke", "none", "a"),
        ("federation", "admit", "none", "none.json"), ("hospital", "join", "none", "kit"),
        ("hospital", "init", "h", "--name", "a/b"),
        ("federation", "init", "f", "--name", "x", "--address", "x:1", "--classes", "a"),
        ("federation", "demo", "d", "--hospitals", "2", "--data", "none.npz"),
    ],
)  # fmt: skip
def test_errors_have_two_parts_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result],
    arguments: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConsiliumError) as error:
        run(*arguments)
    assert error.value.what and error.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_what_the_file_system_refuses_is_told_in_two_parts(
    tmp_path: Path, run: Callable[..., Result]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file") as error:
        run("hospital", "init", tmp_path / "file" / "h", "--name", "a")
    assert "repeat the command" in error.value.remedy


def test_the_command_ends_with_one_and_no_traceback(tmp_path: Path) -> None:
    answer = subprocess.run(
        [CONSILIUM, "federation", "admit", tmp_path, tmp_path / "none.json"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert answer.returncode == 1
    assert "what to do:" in answer.stderr
    assert "Traceback" not in answer.stderr

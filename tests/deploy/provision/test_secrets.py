"""Private keys stay where they were made: no output and no public file holds one."""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import Result

from client_app.hospital_file import HospitalFolder
from common.errors import ConfigError
from deploy.provision import federation, hospital, keys
from deploy.provision.federation import FederationFolder
from deploy.provision.kit import Kit
from tests.deploy.provision.conftest import NOW, World, settings

CLASSES = "neutrophil,lymphocyte"


@pytest.fixture
def told(tmp_path: Path, run: Callable[..., Result]) -> str:
    """Everything that a whole enrolment prints."""
    fed, home = tmp_path / "fed", tmp_path / "st-mary"
    said = [
        run("federation", "init", fed, "--name", "blood", "--address", "localhost:9443",
            "--classes", CLASSES),
        run("hospital", "init", home, "--name", "st-mary"),
        run("federation", "admit", fed, home / "request.json", typed="yes\n"),
        run("hospital", "join", home, fed / "kits" / "st-mary", typed="yes\n"),
        run("federation", "status", fed),
        run("federation", "status", fed, "--json"),
        run("federation", "renew", fed),
        run("federation", "refresh", fed),
        run("hospital", "init", home, "--name", "st-mary"),
        run("federation", "revoke", fed, "st-mary", "--reason", "moved"),
        run("federation", "admit", fed, home / "request.json", fails=True),
    ]  # fmt: skip
    return "".join(result.output for result in said)


def secrets(root: Path) -> Iterator[bytes]:
    """Every private key below ``root``, in every spelling in which it could leak."""
    for path in root.rglob("private/*"):
        data = path.read_bytes()
        if len(data) == 32:
            numbers = [data]
        else:
            load = keys.load_node_key if b"OPENSSH" in data else keys.load_tls_key
            value = load(path).private_numbers().private_value
            numbers = [value.to_bytes(48, "big")]
            yield str(value).encode()
            yield from (line for line in data.splitlines() if not line.startswith(b"-"))
        for raw in numbers:
            spellings = (raw, raw.hex().encode(), base64.b64encode(raw))
            yield from (*spellings, raw.hex().upper().encode(), base64.urlsafe_b64encode(raw))
            # Inside other base64 the same bytes stand at any of three offsets.
            for shift in range(3):
                yield base64.b64encode(bytes(shift) + raw)[4:-4]


def test_no_secret_is_printed_or_lies_in_a_public_file(tmp_path: Path, told: str) -> None:
    found = list(secrets(tmp_path))
    assert len(list(tmp_path.rglob("private/*"))) == 5
    for key in tmp_path.rglob("private/*"):
        assert any(secret in key.read_bytes() for secret in found), "the search finds nothing"
    public = [p for p in tmp_path.rglob("*") if p.is_file() and p.parent.name != "private"]
    # The first line of an OpenSSH file holds the format's name and no key.
    header = base64.b64encode(b"openssh-key-v1")[:16]
    for where, content in [("output", told.encode()), *((p, p.read_bytes()) for p in public)]:
        assert b"PRIVATE KEY" not in content, where
        leaks = [s for s in found if s in content and not s.startswith(header)]
        # The public half stands in the private OpenSSH file as well.
        halves = [s for s in leaks if s not in _public_lines(tmp_path)]
        assert not halves, where


def _public_lines(root: Path) -> bytes:
    """What is in a node's private file and public all the same: base64 of its public half."""
    path = root / "st-mary" / "private" / "node.key"
    return keys.node_line(keys.load_node_key(path).public_key()).encode()


def test_only_the_owner_reads_private_keys_and_enters_the_folders(
    tmp_path: Path, told: str
) -> None:
    del told
    for path in tmp_path.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif path.parent.name == "private" or path.name in (".lock", "members.json"):
            assert mode == 0o600, path
        else:
            assert mode == 0o644, path


def test_folders_are_closed_whatever_the_umask(tmp_path: Path, world: World) -> None:
    before = os.umask(0)
    try:
        folder = world.hospital("a")
        world.admit("a")
    finally:
        os.umask(before)
    for path in (folder.root, folder.private, world.coordinator.kits / "a"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.identity_key.stat().st_mode) == 0o600


def test_an_empty_folder_that_was_there_is_closed(tmp_path: Path) -> None:
    (tmp_path / "h").mkdir(mode=0o755)
    hospital.init(HospitalFolder(tmp_path / "h"), "a", NOW)
    assert stat.S_IMODE((tmp_path / "h").stat().st_mode) == 0o700


def test_a_key_that_others_may_read_is_not_used(world: World) -> None:
    folder = world.hospital("a")
    folder.identity_key.chmod(0o640)
    with pytest.raises(ConfigError, match="others than its owner") as error:
        world.hospital("a")
    assert "chmod 600" in error.value.remedy
    world.coordinator.coordinator_key.chmod(0o604)
    with pytest.raises(ConfigError, match="others than its owner"):
        world.admit("a")


@pytest.mark.parametrize("name", ["coordinator.key", "ca.key", "tls.key"])
def test_a_lost_key_of_the_federation_is_never_replaced_by_another(world: World, name: str) -> None:
    (world.coordinator.private / name).unlink()
    with pytest.raises(ConfigError, match="is missing, and") as error:
        federation.init(world.coordinator, settings(), NOW, days=825)
    assert "backup" in error.value.remedy
    assert not (world.coordinator.private / name).exists()


@pytest.mark.parametrize("name", ["identity.key", "node.key"])
def test_a_lost_key_of_a_hospital_is_never_replaced_by_another(world: World, name: str) -> None:
    folder = world.hospital("a")
    (folder.private / name).unlink()
    with pytest.raises(ConfigError, match="is missing, and"):
        world.hospital("a")
    folder.request.unlink()
    world.hospital("a")
    assert (folder.private / name).exists()


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_damaged_key_is_no_key(world: World, content: bytes) -> None:
    folder = world.hospital("a")
    for path in (folder.identity_key, folder.node_key):
        kept = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="private key"):
            world.hospital("a")
        path.write_bytes(kept)
    for path in (world.coordinator.authority_key, world.coordinator.coordinator_key):
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="private key"):
        world.coordinator.signer()
    with pytest.raises(ConfigError, match="private key"):
        keys.load_tls_key(world.coordinator.authority_key)


def test_what_a_hospital_sends_says_nothing_beyond_its_name_and_public_keys(world: World) -> None:
    folder = world.hospital("a")
    assert set(world.requests["a"].document()) == {
        "version", "name", "identity", "node", "nonce", "time", "identity-signature",
        "node-signature",
    }  # fmt: skip
    assert str(world.root) not in folder.request.read_text()


def test_a_kit_is_the_same_for_every_hospital_but_its_readme(world: World) -> None:
    for name in ("a", "b"):
        world.hospital(name)
        world.admit(name)
    kits = [Kit.read(world.coordinator.kits / name).contents for name in ("a", "b")]
    differing = {name for name in kits[0] if kits[0][name] != kits[1][name]}
    assert differing == {"README.txt"}


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("one")
    (tmp_path / "file").write_text("two")
    for name in ("thesis", "file"):
        with pytest.raises(ConfigError, match=r"not empty|no folder"):
            federation.init(FederationFolder(tmp_path / name), settings(), NOW, days=1)
        with pytest.raises(ConfigError, match=r"not empty|no folder"):
            hospital.init(HospitalFolder(tmp_path / name), "a", NOW)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]

"""Starting a node: the house must be in order, one node a folder, and its state tells how it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from client_app.hospital import Hospital
from client_app.hospital_file import HospitalFile, HospitalFolder
from common.config import RunConfig
from common.errors import ConfigError, ConsiliumError
from deploy.node.launch import explain, preflight
from deploy.node.state import SILENCE, NodeState
from deploy.node.unit import unit
from deploy.provision.demo import Demo, make


@pytest.fixture
def folder(tmp_path: Path) -> HospitalFolder:
    demo = Demo(hospitals=2, name="demo", address="127.0.0.1:1", hosts=["127.0.0.1"], data=None,
                images=96, image_size=16)  # fmt: skip
    return HospitalFolder(make(tmp_path / "f", demo, datetime.now(UTC).replace(microsecond=0))[0])


def test_a_house_in_order_passes_without_asking_the_server(folder: HospitalFolder) -> None:
    preflight(folder)


def test_a_node_does_not_start_with_a_key_that_others_may_read(folder: HospitalFolder) -> None:
    folder.node_key.chmod(0o644)
    with pytest.raises(ConfigError, match="permissions") as refused:
        preflight(folder)
    assert "chmod 600" in refused.value.remedy


def test_a_node_does_not_start_without_its_kit(folder: HospitalFolder) -> None:
    shutil.rmtree(folder.kit)
    with pytest.raises(ConfigError, match="kit"):
        preflight(folder)


def test_what_a_run_leaves_does_not_keep_a_node_from_starting_again(
    folder: HospitalFolder,
) -> None:
    before = os.umask(0o022)  # whatever the machine's is
    try:
        hospital = Hospital("hospital-00", folder.root, RunConfig.parse({}), 0, 1)
        with hospital.alone_in("20260101-120000-1a2b3c4d") as directory:
            assert hospital.made_directory("20260101-120000-1a2b3c4d") == directory
            for path in (directory, directory.parent, *(folder.root / "locks").rglob("*")):
                assert path.stat().st_mode & 0o077 == 0
    finally:
        os.umask(before)
    preflight(folder)


def test_an_unmapped_class_is_an_error_before_the_start(folder: HospitalFolder) -> None:
    text = folder.file.read_text().replace("[classes]", '[classes]\n"mine" = "no such class"')
    folder.file.write_text(text)
    with pytest.raises(ConfigError, match="no such class"):
        preflight(folder)


def test_one_node_a_folder(folder: HospitalFolder) -> None:
    state = NodeState.of(folder)
    with (
        state.alone(),
        pytest.raises(ConfigError, match="running already"),
        NodeState.of(folder).alone(),
    ):
        pass
    with state.alone():  # free again
        pass


def test_a_node_is_healthy_while_the_server_answers(folder: HospitalFolder) -> None:
    state = NodeState.of(folder)
    with pytest.raises(ConsiliumError, match="at all"):
        state.health()
    state.connected(12)
    assert state.health() < 5.0
    assert state.node_id() == 12
    long_ago = time.time() - SILENCE - 10
    os.utime(state.root / "contact", (long_ago, long_ago))
    with pytest.raises(ConsiliumError, match=f"for {SILENCE + 10:.0f} s"):
        state.health()


def test_the_secret_between_the_processes_is_new_at_each_start_and_the_owners(
    folder: HospitalFolder,
) -> None:
    state = NodeState.of(folder)
    state.make_secret()
    first = state.secret.read_text()
    state.make_secret()
    assert len(first) == 64 and state.secret.read_text() != first
    assert state.secret.stat().st_mode & 0o777 == 0o600


def test_flowers_words_are_explained_where_they_mean_something() -> None:
    meaning = explain("Exit Code: 305 … [code: 2004] Failed to activate SuperNode.")
    assert meaning is not None and "revoked" in meaning
    assert explain("SuperNode ID: 17") is None


def test_the_systemd_unit_is_one_that_systemd_takes(folder: HospitalFolder, tmp_path: Path) -> None:
    text = unit(HospitalFile.load(folder.file), folder, "daemon")
    assert "ProtectSystem=strict" in text and f"ReadWritePaths={folder.root}" in text
    assert f"{sys.executable} -m deploy.cli hospital start {folder.root}" in text
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here: the unit's syntax is not checked")
    path = tmp_path / "consilium-test.service"
    path.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False
    )
    assert str(path) not in done.stderr, done.stderr

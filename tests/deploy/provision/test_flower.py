"""Flower 1.41 accepts the keys as they are made, and no others."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from client_app.hospital_file import HospitalFolder
from deploy.provision import keys
from deploy.provision.keys import load_node_key
from deploy.runtime.ports import free_port
from tests.deploy.provision.conftest import World

BIN = Path(sys.executable).parent


def test_flower_reads_the_node_keys_as_they_are_made(world: World) -> None:
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication

    folder = world.hospital("a")
    world.admit("a")
    arguments = argparse.Namespace(
        auth_supernode_private_key=str(folder.node_key), auth_supernode_public_key=None
    )
    pair = _try_setup_client_authentication(arguments)
    assert pair is not None
    registered = try_load_public_key(world.coordinator.hospitals / "a.pub")
    assert load_pem_public_key(registered) == pair[1] == load_node_key(folder.node_key).public_key()


def test_openssh_reads_the_node_keys_too(world: World) -> None:
    keygen = shutil.which("ssh-keygen")
    if keygen is None:
        pytest.skip("ssh-keygen is not installed")
    folder = world.hospital("a")
    answer = subprocess.run(
        [keygen, "-y", "-f", folder.node_key], capture_output=True, text=True, check=True
    )
    assert answer.stdout.split()[:2] == world.requests["a"].node.split()


@contextmanager
def process(log: Path, *words: object, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {
        "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }  # fmt: skip
    with log.open("wb") as file:
        command = [str(BIN / str(words[0])), *map(str, words[1:])]
        running = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            yield running
        finally:
            running.terminate()
            running.wait(30)


def wait_for(log: Path, text: str, running: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if text in log.read_text(errors="replace"):
            return
        assert running.poll() is None, log.read_text(errors="replace")
        time.sleep(0.1)
    raise AssertionError(f"{text!r} never came:\n{log.read_text(errors='replace')}")


@pytest.mark.slow
def test_a_real_superlink_lets_in_the_registered_node_only(tmp_path: Path) -> None:
    port, runtime, home = free_port(), free_port(), tmp_path / "flwr"
    demo = tmp_path / "demo"
    subprocess.run(
        [BIN / "consilium", "federation", "demo", demo, "--hospitals", "2", "--images", "200",
         "--address", f"localhost:{port}"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    fed, own = demo / "coordinator", HospitalFolder(demo / "hospital-00")
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "fl"\n[superlink.fl]\naddress = "localhost:{port}"\n'
        f'root-certificates = "{fed / "ca.crt"}"\n'
    )
    stranger = tmp_path / "stranger.key"
    stranger.write_bytes(keys.new_node_key())
    links = tmp_path / "superlink.log"
    with process(
        links, "flower-superlink", "--ssl-certfile", fed / "tls.crt", "--ssl-keyfile",
        fed / "private" / "tls.key", "--ssl-ca-certfile", fed / "ca.crt",
        "--enable-supernode-auth", "--host", "127.0.0.1", "--port", port, "--isolation", "process",
        home=home,
    ) as link:  # fmt: skip
        wait_for(links, "Uvicorn running", link)
        log = tmp_path / "register.log"
        with process(
            log, "flwr", "supernode", "register", fed / "hospitals" / "hospital-00.pub", "fl",
            home=home,
        ) as register:  # fmt: skip
            assert register.wait(60) == 0, log.read_text()

        def node(name: str, key: Path) -> tuple[Path, tuple[object, ...]]:
            return tmp_path / f"{name}.log", (
                "flower-supernode", "--superlink", f"localhost:{port}", "--root-certificates",
                own.authority, "--auth-supernode-private-key", key, "--isolation", "process",
                "--port", runtime, "--max-retries", 1,
            )  # fmt: skip

        log, words = node("admitted", own.node_key)
        with process(log, *words, home=home) as running:
            wait_for(log, "SuperNode ID", running)
        log, words = node("stranger", stranger)
        with process(log, *words, home=home) as running:
            assert running.wait(60) != 0
        assert "No SuperNode found with the given public key" in links.read_text()

"""What another account of the coordinator's machine can do to a federation that is served there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.fab import Fab
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from deploy.runtime.ports import free_port
from deploy.server.control import Control
from deploy.server.launch import APP
from deploy.server.layout import Server, ServerFolder
from deploy.server.run import CONNECTION, flowers_own
from tests.deploy.server.conftest import Federation, until

NOBODY = 65534


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Federation]:
    fed = Federation(tmp_path_factory.mktemp("machine"), free_port())
    fed.admit("a")
    fed.start()
    try:
        yield fed
    finally:
        if fed.process is not None:
            fed.stop()


def control(fed: Federation) -> Control:
    return Control.of(Server.read(ServerFolder(fed.folder.root).control))


def ports(pid: int) -> list[int]:
    """The TCP ports on which a process listens."""
    own = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(str(entry.readlink()))
        except OSError:
            continue
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in map(str.split, Path(table).read_text().splitlines()[1:]):
            if row[3] == "0A" and f"socket:[{row[9]}]" in own:
                found.append(int(row[1].split(":")[1], 16))
    return found


def test_no_process_of_the_server_has_a_port_but_the_gate(served: Federation) -> None:
    found = {name: ports(served.service(name)) for name in ("gate", "superlink", "executor")}
    assert found == {"gate": [served.port], "superlink": [], "executor": []}


def test_the_control_api_is_a_socket_of_the_coordinators_account(served: Federation) -> None:
    path = Path(Server.read(ServerFolder(served.folder.root).control).socket)
    assert stat.S_ISSOCK(path.stat().st_mode) and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.stat().st_uid == path.parent.stat().st_uid == os.getuid()


def as_nobody(action: Callable[[], object]) -> object:
    """What ``action`` gives, called by another account of this machine."""
    if os.getuid() != 0:
        pytest.skip("only root can be another account: nobody's attempts are not made here")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(writing, json.dumps(action()).encode())
        except BaseException as error:
            os.write(writing, json.dumps(f"{type(error).__name__}: {error}").encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with open(reading, "rb") as said:
        return json.loads(said.read())


CALLS = ("list-runs", "list-nodes", "start-run", "stop-run", "register-node", "unregister-node")


def test_another_account_neither_starts_nor_stops_nor_lists_anything(served: Federation) -> None:
    server = Server.read(ServerFolder(served.folder.root).control)
    listening = [p for pid in served.commands() for p in ports(pid)]
    sockets = [str(p) for p in served.folder.root.rglob("*") if p.is_socket()]

    def attempts() -> object:
        reached = []
        for path in (server.socket, *sockets):
            with socket.socket(socket.AF_UNIX) as tried:
                try:
                    tried.connect(path)
                    reached.append(path)
                except OSError:
                    pass
        for port in listening:
            for call in CALLS:
                try:
                    answer = httpx.post(
                        f"https://localhost:{port}/v1/control/{call}", content=b"", verify=False,
                        headers={"content-type": PROTOBUF_MEDIA_TYPE}, timeout=20,
                    )  # fmt: skip
                except httpx.HTTPError:
                    continue
                if answer.status_code not in (401, 403, 404):
                    reached.append(f"{call}: {answer.status_code}")
        for name in ("control.json", "secret", "tls/superlink.key", "superlink.db"):
            if os.access(served.folder.root / "state" / name, os.R_OK):
                reached.append(name)
        return reached

    assert listening == [served.port]
    assert as_nobody(attempts) == []
    with control(served) as calls:  # the coordinator's own calls are answered
        assert [node.gone for node in calls.nodes()] == [False]


def test_even_whoever_reaches_the_control_api_starts_no_app_of_their_own(
    served: Federation, tmp_path: Path
) -> None:
    for name in ("common", "client_app", "server_app"):
        shutil.copytree(APP / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(APP / name, tmp_path / name)
    mark = tmp_path / "it ran"
    app = tmp_path / "server_app" / "app.py"
    app.write_text(f"{app.read_text()}\nopen({str(mark)!r}, 'w').close()\n")
    archive = build_fab_from_disk(tmp_path)
    fab = Fab(hashlib.sha256(archive).hexdigest(), archive, {})
    with control(served) as calls:
        run = calls._client.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id

        def over() -> bool:
            status = calls.status(run)
            return status is not None and status.ended

        until(over, 120)
        status = calls.status(run)
    assert status is not None and status.text == "finished:failed"
    assert "not the one that is installed" in status.details and "app.py" in status.details
    assert "refused a run" in served.said() and not mark.exists()
    # Flower's own command, which `consilium run` starts runs by, comes by the socket, too.
    folder = ServerFolder(served.folder.root)
    flwr, environment = flowers_own(folder, Server.read(folder.control))
    done = subprocess.run(
        [*flwr, "ls", CONNECTION, "--format", "json"], env=environment,
        capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert [row["run-id"] for row in json.loads(done.stdout)["runs"]] == [str(run)]
    assert not list((served.folder.root / "state" / "flower-app").glob("apps/*"))

"""Outsiders who hold on to a gate, with real sockets and TLS, while a node goes on with its work.

The server is started with room for 1,024 open files, as most systems start one.
"""

from __future__ import annotations

import resource
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from deploy.provision import keys
from deploy.runtime.kit_request import PATH as KIT
from deploy.runtime.kit_request import headers_for
from deploy.runtime.limits import raise_open_files
from deploy.runtime.ports import free_port
from deploy.server.door import NEWCOMERS_OF_ONE
from tests.deploy.server.conftest import Federation, now

SLOW_POST = (
    b"POST /v1/fleet/activate-node HTTP/1.1\r\nHost: x\r\n"
    b"Content-Type: application/x-protobuf\r\nContent-Length: 100000\r\n\r\nA"
)
USUAL = 1024


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Federation]:
    fed = Federation(tmp_path_factory.mktemp("outsiders"), free_port())
    fed.admit("a")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(USUAL, soft), hard))
    try:
        fed.start()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if raise_open_files(4096) < 3000:
            pytest.skip(f"this machine lets a process open {hard} files: too few for an outsider")
        yield fed
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if fed.process is not None:
            fed.stop()


def connect(fed: Federation) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", fed.port), 30)
    made.settimeout(30)
    return made


TRUSTING = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
TRUSTING.check_hostname, TRUSTING.verify_mode = False, ssl.CERT_NONE


def tls(fed: Federation) -> ssl.SSLSocket:
    return TRUSTING.wrap_socket(connect(fed))


def idle(fed: Federation) -> socket.socket:
    return connect(fed)


def half_a_handshake(fed: Federation) -> socket.socket:
    made = connect(fed)
    made.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")  # a ClientHello's first bytes
    return made


def half_a_head(fed: Federation) -> socket.socket:
    made = tls(fed)
    made.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nX-")
    return made


def slow_body(fed: Federation) -> socket.socket:
    made = tls(fed)
    made.sendall(SLOW_POST)
    return made


def work(fed: Federation) -> None:
    """All that a node does at a gate, and what anybody may ask; each must be answered."""
    from client_app.hospital_file import HospitalFolder

    folder = HospitalFolder(fed.root / "a")
    node = int(fed.nodes()["a"])
    fed.pull(folder, node)
    assert fed.ask("GET", "/health").status_code == 200
    identity = keys.load_identity(folder.identity_key)
    headers = headers_for("blood", "a", identity, now())
    assert fed.ask("GET", KIT, headers=headers).status_code == 200


def told(fed: Federation) -> int:
    log = fed.folder.root / "state" / "logs" / "gate.log"
    return log.read_text().count("\n")


@pytest.mark.parametrize(
    ("hold", "count"),
    [(slow_body, 210), (half_a_head, 210), (half_a_handshake, 1100), (idle, 1100)],
)
def test_a_node_works_on_while_outsiders_hold_what_they_can(
    served: Federation, hold: Callable[[Federation], socket.socket], count: int
) -> None:
    from client_app.hospital_file import HospitalFolder

    folder = HospitalFolder(served.root / "a")
    with suppress(Exception):  # signed off from the test before
        served.activate(folder)
    work(served)
    before = told(served)
    with ExitStack() as held:
        for number in range(count):
            try:
                held.enter_context(hold(served))
            except OSError:  # shown the door already
                continue
            if number % 100 == 99:
                work(served)  # meanwhile, too
        for _ in range(3):
            work(served)
        assert told(served) - before < 20, "a line for each would fill the disk"
        gate = served.service("gate")
        limit = int(Path(f"/proc/{gate}/limits").read_text().split("Max open files")[1].split()[0])
        assert limit > USUAL
        assert len(list(Path(f"/proc/{gate}/fd").iterdir())) < NEWCOMERS_OF_ONE + 100
    work(served)


def test_a_members_connection_outlives_every_newcomer(served: Federation) -> None:
    """It is the newcomers that go, and whoever has shown a key stays."""
    from client_app.hospital_file import HospitalFolder

    folder = HospitalFolder(served.root / "a")
    node = int(served.nodes()["a"])
    from flwr.proto.fleet_pb2 import PullMessagesRequest
    from flwr.proto.node_pb2 import Node

    with served.node(folder) as client, ExitStack() as held:
        request = PullMessagesRequest(node=Node(node_id=node))
        client.PullMessages(request)
        (pool,) = [client._client._transport._pool]  # type: ignore[attr-defined]
        (mine,) = pool.connections
        for _ in range(NEWCOMERS_OF_ONE + 50):
            with suppress(OSError):
                held.enter_context(idle(served))
        client.PullMessages(request)
        assert pool.connections == [mine] and not mine.is_closed()


def test_who_asks_for_its_health_all_day_writes_nothing_to_a_log(served: Federation) -> None:
    logs = served.folder.root / "state" / "logs"

    def size() -> int:
        return sum(path.stat().st_size for path in logs.iterdir())

    served.ask("GET", "/health")
    before = size()
    with tls(served) as connection:
        for _ in range(30):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
    assert size() - before < 1000


def test_a_call_without_a_key_is_answered_and_shown_the_door_at_once(served: Federation) -> None:
    begun = time.monotonic()
    with tls(served) as connection:
        connection.sendall(SLOW_POST)
        with suppress(ConnectionResetError):
            answer = connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 412")
            while connection.recv(4096):
                pass
    assert time.monotonic() - begun < 25, "long before the body's or the head's time is over"

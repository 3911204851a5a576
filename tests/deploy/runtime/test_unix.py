"""A Unix socket for Flower's server and its clients."""

from __future__ import annotations

import http.server
import socket
import socketserver
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from flwr.proto.control_pb2 import ListRunsRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.runtime import RuntimeHttpClient

from common.errors import ConfigError
from deploy.runtime import unix


class Answers(http.server.BaseHTTPRequestHandler):
    """An empty message for whatever is asked."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


@pytest.fixture
def answering(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "s"
    with Server(str(path), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield path
        server.shutdown()


def test_a_socket_is_its_owners_alone_from_its_first_moment(tmp_path: Path) -> None:
    for _ in range(2):  # one that a dead process left is replaced
        with unix.listening(tmp_path / "s") as made:
            assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600
            made.listen()


def test_a_socket_lies_in_its_folder_and_goes_at_the_end(tmp_path: Path) -> None:
    with unix.place(tmp_path, "s") as path:
        assert path == tmp_path / "s" and not path.exists()
        unix.listening(path).close()
    assert not path.exists()


def test_where_the_path_is_too_long_it_lies_in_a_private_folder_that_goes_too(
    tmp_path: Path,
) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with unix.place(folder, "s") as path:
        assert path.parent != folder and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        unix.listening(path).close()
    assert not path.parent.exists()


def test_where_there_is_no_place_at_all_it_is_said_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(ConfigError, match="no Unix socket") as refused, unix.place(folder, "s"):
        pass
    assert "TMPDIR" in refused.value.remedy


def test_flowers_clients_come_by_the_socket_whatever_address_or_proxy_is_set(
    answering: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    client = ControlHttpClient("http://no-host.invalid")
    with client:
        with pytest.raises(httpx.TransportError):
            client.ListRuns(ListRunsRequest())
        unix.redirect(client, answering, False)
        assert not client.ListRuns(ListRunsRequest()).run_dict


def test_every_client_that_flower_makes_in_a_process_can_be_sent_to_the_socket(
    answering: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProtobufClient, "__init__", ProtobufClient.__init__)
    unix.redirect_all(answering)
    for kind in (ControlHttpClient, RuntimeHttpClient):  # all that the server's processes make
        client = kind.from_server_address(unix.NOWHERE, True, None, interceptors=[])
        with client:
            assert isinstance(client, ProtobufClient)
            answer = client._client.post("http://no-host.invalid/", content=b"")
            assert answer.status_code == 200


def test_another_client_than_flowers_is_noticed() -> None:
    client = ControlHttpClient("http://no-host.invalid")
    client.close()
    del client._client
    with pytest.raises(RuntimeError, match="httpx"):
        unix.redirect(client, Path("s"), False)


def test_nobody_listens_by_mistake_on_what_flower_is_told() -> None:
    from deploy.server.superlink import arguments

    words = arguments(Path("/fed"))
    host = words[words.index("--host") + 1]
    assert "--port" not in words
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo(host, 1)

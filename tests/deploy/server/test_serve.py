"""One server for these tests, in their order: each leaves it running, for the next."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from client_app.hospital_file import HospitalFolder
from deploy.provision import hospital, keys
from deploy.provision.kit import SIGNED, Kit
from deploy.runtime.kit_request import PATH, headers_for
from deploy.runtime.ports import free_port
from deploy.server.control import Control
from deploy.server.layout import Server, ServerFolder
from tests.deploy.server.conftest import CONSILIUM, Federation, alive, now, until

FLEET = "/v1/fleet/pull-messages"
KIND = {"content-type": PROTOBUF_MEDIA_TYPE}


def folder(fed: Federation, name: str) -> HospitalFolder:
    return HospitalFolder(fed.root / name)


def control(fed: Federation) -> Control:
    return Control.of(Server.read(ServerFolder(fed.folder.root).control))


def test_hospitals_that_were_admitted_may_connect_under_their_own_names(served: Federation) -> None:
    nodes = served.nodes()
    assert set(nodes) == {"a", "b"}
    assert served.activate(folder(served, "a")) == int(nodes["a"])


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/list-nodes"), ("POST", "/v1/control/register-node"),
        ("POST", "/v1/runtime/acquire-task"), ("GET", "/docs"), ("GET", "/openapi.json"),
        ("GET", "/"), ("GET", FLEET), ("PUT", FLEET), ("POST", "/health"),
        ("POST", "/v1/fleet/"), ("POST", "/v1/fleet/a/b"), ("POST", "/V1/fleet/pull-messages"),
        ("POST", "/v1/fleet/%2e%2e%2fcontrol%2flist-nodes"), ("POST", "/v1/fleet/..;/docs"),
        ("POST", "//v1/control/list-nodes"), ("POST", "/v1/consilium/kit"),
        ("POST", "/v1/fleet/pull-messages%00"),
    ],
)  # fmt: skip
def test_the_gate_lets_nothing_through_but_fleet_calls(
    served: Federation, method: str, path: str
) -> None:
    # As written: a client library would tidy the path up.
    connection = http.client.HTTPSConnection("localhost", served.port, context=served.context())
    connection.putrequest(method, path, skip_accept_encoding=True)
    connection.putheader("content-length", "0")
    connection.endheaders()
    assert connection.getresponse().status == 404
    connection.close()


def test_fleet_calls_reach_the_superlink_which_knows_who_asks(served: Federation) -> None:
    answer = served.ask("POST", FLEET, headers=KIND)
    assert answer.status_code == 401
    assert served.ask("GET", "/health").status_code == 200


def test_a_body_is_passed_on_up_to_the_limit_and_refused_beyond_it(served: Federation) -> None:
    # A chunk of Flower's: no message, so the SuperLink refuses it, having read it.
    most = bytes(5 * 1024 * 1024 + 4096)
    headers = KIND | served.headers(folder(served, "a"))
    assert served.ask("POST", FLEET, content=most, headers=headers).status_code in (400, 401, 422)
    for size in (8 * 1024 * 1024 + 1, 1 << 40):
        connection = http.client.HTTPSConnection("localhost", served.port, context=served.context())
        connection.putrequest("POST", FLEET)
        for header in headers.items():
            connection.putheader(*header)
        connection.putheader("content-length", str(size))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()

    def endless() -> object:
        for _ in range(100):
            yield bytes(100_000)

    # Told while still sending, or only by the end of the connection.
    with suppress(httpx.WriteError, httpx.RemoteProtocolError, httpx.ReadError):
        answer = served.ask("POST", FLEET, content=endless(), headers=headers)
        assert answer.status_code == 413
    assert served.ask("GET", "/health").status_code == 200


def test_headers_without_end_are_refused(served: Federation) -> None:
    with (
        socket.create_connection(("localhost", served.port)) as plain,
        served.context().wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n")
        sent = 0
        with suppress(OSError):
            for _ in range(500):
                connection.sendall(b"x-much: " + b"x" * 60_000 + b"\r\n")
                sent += 1
    assert sent < 500, "the connection was closed"
    assert served.ask("GET", "/health").status_code == 200


def kit_headers(fed: Federation, name: str, seconds: int = 0) -> dict[str, str]:
    identity = keys.load_identity(folder(fed, name).identity_key)
    at = now().timestamp() + seconds
    return headers_for("blood", name, identity, now().fromtimestamp(at, tz=now().tzinfo))


def test_a_member_gets_its_newest_kit_and_is_told_when_it_has_it(
    served: Federation, tmp_path: Path
) -> None:
    answer = served.ask("GET", PATH, headers=kit_headers(served, "a"))
    assert answer.status_code == 200
    for name, text in answer.json()["files"].items():
        (tmp_path / name).write_bytes(base64.b64decode(text))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted(SIGNED)
    Kit.read(tmp_path).verify(served.folder.public_key(), now())
    etag = f'"{hashlib.sha256((tmp_path / "federation.json").read_bytes()).hexdigest()}"'
    assert answer.headers["etag"] == etag
    again = served.ask("GET", PATH, headers=kit_headers(served, "a") | {"if-none-match": etag})
    assert (again.status_code, again.content) == (304, b"")


def test_anybody_else_gets_no_kit_and_is_told_nothing(served: Federation) -> None:
    served.admit("leaver")
    good = kit_headers(served, "leaver")
    assert served.ask("GET", PATH, headers=good).status_code == 200
    served.revoke("leaver")
    stranger = HospitalFolder(served.root / "stranger")
    hospital.init(stranger, "stranger", now())
    mine = kit_headers(served, "a")
    refused = [
        served.ask("GET", PATH, headers=headers)
        for headers in (
            {}, good, kit_headers(served, "stranger"), kit_headers(served, "a", -400),
            kit_headers(served, "a", 400), mine | {"consilium-hospital": "b"},
            mine | {"consilium-signature": "AAAA"},
            mine | {"consilium-time": str(int(mine["consilium-time"]) + 1)},
        )
    ]  # fmt: skip
    assert {answer.status_code for answer in refused} == {403}
    assert len({answer.text for answer in refused}) == 1


def test_a_hospital_that_is_admitted_meanwhile_may_connect_within_seconds(
    served: Federation,
) -> None:
    late = served.admit("late")
    took = until(lambda: "late" in served.nodes())
    assert took < 5
    assert served.activate(late) == int(served.nodes()["late"])


def test_a_hospital_that_is_revoked_is_cut_off_within_seconds_and_stays_out(
    served: Federation,
) -> None:
    out = served.admit("out")
    until(lambda: "out" in served.nodes())
    node = served.activate(out)
    served.pull(out, node)
    served.revoke("out")
    took = until(lambda: "out" not in served.nodes())
    assert took < 5
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        served.pull(out, node)
    with pytest.raises(httpx.HTTPStatusError, match="412"):
        served.activate(out)
    assert f"out may connect no more (node {node})" in served.said()


def test_a_second_server_is_refused(served: Federation) -> None:
    answer = subprocess.run(
        [CONSILIUM, "federation", "serve", served.folder.root, "--port", str(free_port())],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert answer.returncode == 1
    assert "runs for" in answer.stderr and "what to do:" in answer.stderr
    assert served.ask("GET", "/health").status_code == 200


def test_health_is_of_the_gate_and_what_is_behind_it(served: Federation) -> None:
    def code(*more: str) -> tuple[int, str]:
        answer = subprocess.run(
            [CONSILIUM, "federation", "health", served.folder.root, *more],
            capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
        return answer.returncode, answer.stderr

    assert code() == (0, "")
    failed, said = code("--port", str(free_port()))
    assert failed == 1 and "what to do:" in said


def test_without_the_superlink_the_gate_says_502_or_503_and_it_comes_back_with_the_same_nodes(
    served: Federation,
) -> None:
    before = served.nodes()
    node = int(before["a"])
    os.kill(served.service("superlink"), signal.SIGKILL)
    seen = set()

    def answers() -> bool:
        seen.add(served.ask("GET", "/health").status_code)
        return 200 in seen

    seen.add(served.ask("POST", FLEET, content=b"x").status_code)
    until(answers, 60)
    assert seen <= {200, 502, 503, 401} and seen & {502, 503}
    served.pull(folder(served, "a"), node)  # the node that was online still is
    with control(served) as calls:
        listed = {str(n.id) for n in calls.nodes() if not n.gone}
    assert listed == set(before.values())


def test_the_control_api_is_what_our_code_takes_it_for(served: Federation) -> None:
    with control(served) as calls:
        key = served.folder.hospitals.joinpath("a.pub").read_text().strip()
        known = {node.key: node for node in calls.nodes()}
        assert str(known[key].id) == served.nodes()["a"] and not known[key].gone
        assert calls.register("again", key) is None
        gone = [node for node in calls.nodes() if node.gone]
        assert gone, "unregistered nodes are listed, too"
        calls.unregister(gone[0].id)
        assert calls.register("again", gone[0].key) is None, "never taken again"
        assert calls.status(123) is None
        assert calls.stop(123) is False


def test_a_lost_table_of_nodes_is_made_anew_from_what_flower_knows(served: Federation) -> None:
    before = served.nodes()
    (served.folder.root / "state" / "nodes.json").unlink()
    served.admit("newest")
    until(lambda: set(served.nodes()) == {*before, "newest"})
    assert {name: served.nodes()[name] for name in before} == before


def test_a_renewed_certificate_is_taken_without_a_restart(served: Federation) -> None:
    def shown() -> str:
        return ssl.get_server_certificate(("localhost", served.port))

    before = shown()
    subprocess.run([CONSILIUM, "federation", "renew", served.folder.root, "--days", "77"],
                   check=True, capture_output=True, timeout=30)  # fmt: skip
    until(lambda: shown() != before)
    assert served.ask("GET", "/health").status_code == 200


def test_nothing_secret_is_in_arguments_output_or_logs(served: Federation) -> None:
    state = served.folder.root / "state"
    secrets = [(state / "secret").read_bytes().strip()]
    for path in (served.folder.server_key, state / "tls" / "superlink.key"):
        secrets.append(path.read_bytes().splitlines()[1])
    secrets.append(base64.b64encode(served.folder.coordinator_key.read_bytes()))
    arguments = b"\n".join(b" ".join(words) for words in served.commands().values())
    logs = b"".join(path.read_bytes() for path in (state / "logs").iterdir())
    assert len(served.commands()) == 4 and logs
    for secret in secrets:
        for text in (arguments, logs, served.output.read_bytes()):
            assert secret not in text
    assert b"consilium-signature" not in logs and b"flwr-signature" not in logs


def test_only_its_owner_reads_the_servers_state(served: Federation) -> None:
    state = served.folder.root / "state"
    assert state.stat().st_mode & 0o777 == 0o700
    private = ["secret", "superlink.db", "control.json", "tls/superlink.key", "serve.lock"]
    assert {(state / name).stat().st_mode & 0o077 for name in private} == {0}


def test_it_all_ends_when_told_to(served: Federation) -> None:
    everything = list(served.commands())
    assert len(everything) == 4
    code, seconds = served.stop()
    assert code == 0 and seconds < 10
    until(lambda: not any(alive(pid) for pid in everything), 2)
    assert not (served.folder.root / "state" / "control.json").exists()
    assert json.loads((served.folder.root / "state" / "nodes.json").read_text())["version"] == 1

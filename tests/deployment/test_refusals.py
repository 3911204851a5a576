"""Who is not admitted, or is not whom they say, does not get in; hospitals reach the gate only."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from deploy.runtime.flower import command, environment
from deploy.runtime.ports import free_port
from tests.deployment.house import House, until

Make = Callable[..., House]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    made = House(tmp_path_factory.mktemp("refusals") / "f").make(2, images=200)
    made.serve()
    yield made
    made.close()


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory, house: House) -> House:
    """Another federation, whose hospitals want in here."""
    return House(tmp_path_factory.mktemp("others") / "g", port=house.port).make(1, images=100)


def supernode(house: House, *arguments: str, seconds: float = 120.0) -> tuple[int | None, str]:
    """A stock SuperNode; its exit status (None: it did not end) and what it printed."""
    try:
        done = subprocess.run(
            [command("flower-supernode"), "--superlink", f"localhost:{house.port}", "--isolation",
             "process", "--port", str(free_port()), *arguments],
            env=environment(house.root / "flower-of-a-stranger"), capture_output=True, text=True,
            timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        return None, (error.stdout or b"").decode() + (error.stderr or b"").decode()
    return done.returncode, done.stdout + done.stderr


def test_a_key_that_is_not_registered_is_refused(house: House, stranger: House) -> None:
    status, said = supernode(
        house, "--root-certificates", str(house.coordinator.authority),
        "--auth-supernode-private-key", str(stranger.hospital("hospital-00").node_key),
    )  # fmt: skip
    assert status == 1 and "[code: 2004]" in said


def test_a_node_without_a_key_is_refused(house: House) -> None:
    status, said = supernode(house, "--root-certificates", str(house.coordinator.authority))
    assert status == 1 and "must be registered" in said


def test_a_hospital_with_another_authority_does_not_talk_to_this_server(
    house: House, stranger: House
) -> None:
    name = "hospital-00"  # of the other federation: its kit has another authority
    stranger.open(name)
    until(lambda: "CERTIFICATE_VERIFY_FAILED" in stranger.said(name), "the refusal", 60)
    until(lambda: "`consilium hospital check` says which" in stranger.said(name), "its meaning", 30)
    assert not stranger.is_connected(name)
    stranger.end(name)


def test_a_plain_text_client_gets_nowhere(house: House) -> None:
    status, said = supernode(house, "--insecure", seconds=8.0)
    assert status != 0 and "SuperNode ID" not in said
    with socket.create_connection(("127.0.0.1", house.port), 5) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        plain.settimeout(5)
        try:
            answer = plain.recv(100)
        except (ConnectionError, TimeoutError):
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 200")


def test_the_gate_has_no_way_to_the_control_api(house: House) -> None:
    context = ssl.create_default_context(cafile=str(house.coordinator.authority))
    with httpx.Client(verify=context, base_url=f"https://localhost:{house.port}") as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/control/list-nodes", "/v1/control/register-node",
                     "/v1/runtime/acquire-task", "/docs", "/openapi.json",
                     "/v1/fleet/../control/list-nodes", "/v1/fleet/%2e%2e/control/list-nodes",
                     "//v1/control/list-nodes"):  # fmt: skip
            for ask in (client.get, client.post):
                assert ask(path).status_code in (404, 405), path


def test_a_revoked_hospital_is_cut_off_at_once_and_stays_out(new_house: Make) -> None:
    house = new_house(hospitals=2, images=200)
    house.serve()
    name = house.names[0]
    house.open(name)
    until(lambda: house.is_connected(name), "the hospital")
    house.call("federation", "revoke", str(house.coordinator.root), name, "--reason", "test")
    until(lambda: "told to stop, by the server" in house.said(name), "the end of its node", 30)
    until(lambda: "[code: 2004]" in house.said(name), "its refusal", 60)
    house.call("federation", "admit", str(house.coordinator.root),
               str(house.hospital(name).request), "--fingerprint", "0", status=1)  # fmt: skip


def _namespace(name: str, commands: list[str]) -> None:
    for line in commands:
        done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespaces here: {line}: {done.stderr.strip()}")


def test_from_another_machine_only_the_gate_can_be_reached(new_house: Make) -> None:
    if shutil.which("ip") is None:
        pytest.skip("iproute2 is not installed here: no second machine to try from")
    name, here, there = "consilium-test", "10.231.77.1", "10.231.77.2"
    house = new_house(hospitals=1, images=100)
    try:
        _namespace(name, [
            f"ip netns add {name}",
            "ip link add consilium-a type veth peer name consilium-b",
            f"ip link set consilium-b netns {name}",
            f"ip addr add {here}/30 dev consilium-a",
            "ip link set consilium-a up",
            f"ip -n {name} addr add {there}/30 dev consilium-b",
            f"ip -n {name} link set consilium-b up",
        ])  # fmt: skip
        house.start("serve", "federation", "serve", str(house.coordinator.root), "--host", here,
                    "--port", str(house.port))  # fmt: skip
        until(lambda: "ready:" in house.said("serve"), "the server")
        tried = subprocess.run(
            ["ip", "netns", "exec", name, "timeout", "5", "bash", "-c",
             f"exec 3<>/dev/tcp/{here}/{house.port}"],
            capture_output=True, check=False,
        )  # fmt: skip
        assert tried.returncode == 0
        _only_the_gate_has_a_port(house)
    finally:
        house.close()
        subprocess.run(["ip", "link", "del", "consilium-a"], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _only_the_gate_has_a_port(house: House) -> None:
    """Not even one of loopback, which is every account's."""
    ports = _listening(Path("/proc/net/tcp")) + _listening(Path("/proc/net/tcp6"))
    listens = {}
    for module in ("gate", "superlink", "executor"):
        own = _sockets(int(house.process_of(f"deploy.server.{module}") or 0))
        listens[module] = sum(inode in own for _, inode in ports)
    assert listens == {"gate": 1, "superlink": 0, "executor": 0}


def test_the_coordinators_machine_has_no_port_but_the_gates(house: House) -> None:
    _only_the_gate_has_a_port(house)


def test_no_process_of_a_hospital_listens_beyond_loopback(house: House) -> None:
    name = house.names[1]
    house.open(name)
    until(lambda: house.is_connected(name), "the hospital")
    ports = _listening(Path("/proc/net/tcp")) + _listening(Path("/proc/net/tcp6"))
    node = house.node(name)
    own = _sockets(node)
    assert any(inode in own for _, inode in ports)  # its runtime port, for the app next door
    assert all(address in ("0100007F", "0" * 24 + "0100007F") for address, i in ports if i in own)
    house.end(name)


def _listening(table: Path) -> list[tuple[str, str]]:
    rows = [line.split() for line in table.read_text().splitlines()[1:]]
    return [(row[1].split(":")[0], row[9]) for row in rows if row[3] == "0A"]


def _sockets(pid: int) -> set[str]:
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(descriptor.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found

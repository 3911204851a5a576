"""Real servers on loopback, ended by their ids."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.empty_pb2 import Empty

from client_app.hospital_file import HospitalFolder
from deploy.provision import federation, hospital, keys, members
from deploy.provision.federation import FederationFolder, make_settings
from deploy.runtime.ports import free_port

CONSILIUM = str(Path(sys.executable).parent / "consilium")


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def until(happens: Callable[[], object], seconds: float = 30.0) -> float:
    """Seconds that it took."""
    begun = time.monotonic()
    while not happens():
        assert time.monotonic() - begun < seconds, "it did not happen"
        time.sleep(0.05)
    return time.monotonic() - begun


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@dataclass
class Federation:
    """A coordinator's folder with hospitals beside it, and its server while there is one."""

    root: Path
    port: int
    process: subprocess.Popen[bytes] | None = None
    output: Path = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.root / "serve.log"
        self.folder = FederationFolder(self.root / "fed")
        settings = make_settings(
            name="blood", address=f"localhost:{self.port}", hosts=["127.0.0.1"],
            classes=["a", "b"], image_size=28, channels=3,
        )  # fmt: skip
        federation.init(self.folder, settings, now(), days=30)

    def admit(self, name: str) -> HospitalFolder:
        folder = HospitalFolder(self.root / name)
        request = hospital.init(folder, name, now())
        members.admit(self.folder, request, now(), days=30)
        return folder

    def revoke(self, name: str) -> None:
        members.revoke(self.folder, name, now(), "")

    def start(self) -> None:
        """A server, ready."""
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [CONSILIUM, "federation", "serve", str(self.folder.root), "--host", "127.0.0.1"],
                stdout=output, stderr=output, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        said = self.said().count("ready:")

        def ready() -> bool:
            assert self.process is not None and self.process.poll() is None, self.said()
            return self.said().count("ready:") > said

        until(ready, 60)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, float]:
        """Exit code, and seconds that it took."""
        assert self.process is not None
        begun = time.monotonic()
        self.process.send_signal(number)
        code = self.process.wait(30)
        self.process = None
        return code, time.monotonic() - begun

    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def children(self) -> list[int]:
        """Processes of the server, by its folder in their arguments."""
        return [pid for pid, words in self.commands().items()
                if any(b"deploy.server." in word for word in words)]  # fmt: skip

    def commands(self) -> dict[int, list[bytes]]:
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if str(self.folder.root).encode() in words and alive(int(entry.name)):
                    found[int(entry.name)] = words
        return found

    def service(self, name: str) -> int:
        """The id of a service's process."""
        (pid,) = [pid for pid, words in self.commands().items()
                  if f"deploy.server.{name}".encode() in words]  # fmt: skip
        return pid

    def nodes(self) -> dict[str, str]:
        path = self.folder.root / "state" / "nodes.json"
        rows = json.loads(path.read_text())["nodes"] if path.exists() else {}
        return {name: row["node-id"] for name, row in rows.items()}

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder.authority))

    def ask(self, method: str, path: str, **more: object) -> httpx.Response:
        """At the gate."""
        with httpx.Client(verify=self.context(), trust_env=False, timeout=20) as client:
            url = f"https://localhost:{self.port}{path}"
            return client.request(method, url, **more)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def node(self, folder: HospitalFolder) -> Iterator[FleetHttpClient]:
        """What a SuperNode with the hospital's key speaks with; it tries once."""
        key = keys.load_node_key(folder.node_key)
        with FleetHttpClient.from_server_address(
            f"localhost:{self.port}",
            False,
            self.folder.authority.read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        ) as client:
            yield client

    def headers(self, folder: HospitalFolder) -> dict[str, str]:
        """Those of a call by the hospital's node, signed now."""
        return signed(keys.load_node_key(folder.node_key))

    def activate(self, folder: HospitalFolder) -> int:
        """The node's id; HTTPStatusError if it is not let in."""
        key = keys.load_node_key(folder.node_key).public_key()
        with self.node(folder) as client:
            answer = client.ActivateNode(
                ActivateNodeRequest(public_key=public_key_to_bytes(key), heartbeat_interval=30)
            )
        return int(answer.node_id)

    def pull(self, folder: HospitalFolder, node: int) -> None:
        """HTTPStatusError if the node is not known."""
        with self.node(folder) as client:
            client.PullMessages(PullMessagesRequest(node=Node(node_id=node)))


def signed(key: EllipticCurvePrivateKey, at: datetime | None = None) -> dict[str, str]:
    """The headers of a node's call, as Flower's own client makes them."""
    asked = httpx.Request("POST", "https://nobody/")
    context = ProtobufRequestContext("", Empty(), asked)
    with pytest.MonkeyPatch.context() as patch:
        if at is not None:
            patch.setattr(node_auth_http_interceptor, "now", lambda: at)
        NodeAuthHttpInterceptor(key, key.public_key()).intercept(
            context, lambda context: httpx.Response(200)
        )
    return {name: asked.headers[name] for name in asked.headers if name.startswith("flwr-")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """$CONSILIUM_HOME of a module's server."""
    path = tmp_path_factory.mktemp("home")
    before = os.environ.get("CONSILIUM_HOME")
    os.environ["CONSILIUM_HOME"] = str(path)
    yield path
    if before is None:
        del os.environ["CONSILIUM_HOME"]
    else:
        os.environ["CONSILIUM_HOME"] = before


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Iterator[Federation]:
    """A federation with the hospitals a and b, served as long as the module's tests run."""
    fed = Federation(tmp_path_factory.mktemp("served"), free_port())
    fed.admit("a")
    fed.admit("b")
    fed.start()
    try:
        yield fed
    finally:
        if fed.process is not None:
            fed.stop()


@pytest.fixture
def fed(tmp_path: Path) -> Iterator[Federation]:
    """A federation that a test serves as it likes."""
    made = Federation(tmp_path, free_port())
    try:
        yield made
    finally:
        if made.process is not None:
            made.stop()

"""A demonstration's hospital, joined, and a real TLS server on loopback for it to reach."""

from __future__ import annotations

import http.server
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from client_app.hospital_file import HospitalFolder
from deploy.doctor.checkup import examine
from deploy.provision.demo import Demo, make
from deploy.provision.federation import FederationFolder

BEGUN = datetime.now(UTC).replace(microsecond=0) - timedelta(days=40)
"""When the demonstration was made: admissions and certificates last for 365 days from then."""


@contextmanager
def serving(
    certificate: Path, key: Path, *, ahead: float = 0.0, status: int = 200, dated: bool = True
) -> Iterator[int]:
    """A TLS server on 127.0.0.1 that answers /health; its clock is ``ahead`` seconds; its port."""

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status if self.path == "/health" else 404)
            if dated:
                self.send_header("Date", self.date_time_string(time.time() + ahead))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@dataclass
class Ward:
    """One hospital to break, and its coordinator."""

    folder: HospitalFolder
    coordinator: FederationFolder
    serve: Callable[..., int]
    """Start a server, by default the coordinator's own, and send the hospital there."""

    def go_to(self, address: str) -> None:
        """Have the hospital use ``address``."""
        self.edit(self.folder.file, 'address = ""', f'address = "{address}"')

    def edit(self, path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def check(self) -> dict[str, Any]:
        return examine(self.folder, datetime.now(UTC))


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once; tests work on copies."""
    root = tmp_path_factory.mktemp("doctor") / "demo"
    asked = Demo(
        hospitals=2,
        name="demo",
        address="localhost:9092",
        hosts=["localhost", "127.0.0.1"],
        data=None,
        images=240,
        image_size=28,
    )
    make(root, asked, BEGUN)
    return root


@pytest.fixture
def ward(demonstration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ward]:
    """A hospital in which nothing is wrong; no server runs until ``serve()``."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    shutil.copytree(demonstration, tmp_path / "demo")
    coordinator = FederationFolder(tmp_path / "demo" / "coordinator")
    with ExitStack() as stack:

        def serve(
            certificate: Path = coordinator.server, host: str = "localhost", **how: Any
        ) -> int:
            port = stack.enter_context(serving(certificate, coordinator.server_key, **how))
            made.go_to(f"{host}:{port}")
            return port

        made = Ward(HospitalFolder(tmp_path / "demo" / "hospital-00"), coordinator, serve)
        yield made


def row(document: dict[str, Any], name: str) -> dict[str, str]:
    """One check of the document."""
    (found,) = (r for r in document["checks"] if r["name"] == name)
    return dict(found)


def skipped(document: dict[str, Any]) -> dict[str, str]:
    """Check that could not be made → because of which."""
    mark = "not checked: see "
    return {
        r["name"]: r["found"].removeprefix(mark)
        for r in document["checks"]
        if r["found"].startswith(mark)
    }


MACHINE = ("versions", "memory", "shared memory", "disk")
"""What hangs on where the tests run."""


def wrong(document: dict[str, Any]) -> dict[str, str]:
    """Check → status of all that is not PASS and was made, the machine's own left out."""
    out = {*skipped(document), *MACHINE}
    return {
        r["name"]: r["status"]
        for r in document["checks"]
        if r["status"] != "PASS" and r["name"] not in out
    }

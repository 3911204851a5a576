"""The federation in containers, for real: `make test-containers`. Minutes.

Each test needs a Docker engine and the image of deploy/Dockerfile; `tests/containers/engine.sh`
makes both. Without them all are skipped.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.containers.stack import (
    HOSPITALS,
    IMAGE,
    SERVICES,
    Stack,
    eventually,
    federation,
    missing,
    run,
)

pytestmark = [pytest.mark.slow, pytest.mark.containers, pytest.mark.timeout(1800)]

SETTINGS: dict[str, Any] = {"model_width": 0.125, "epsilon": 3.0}
VECTORS_POLICY = """version = 1
[aggregation]
secagg = "optional"
[privacy]
total-epsilon = 60.0
[vectors]
send = "private"
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    if reason := missing():
        pytest.skip(reason)
    with federation(tmp_path_factory.mktemp("containers")) as made:
        yield made


def test_five_hospitals_complete_a_secure_private_run(stack: Stack) -> None:
    before = stack.runs()
    with stack.training(rounds=2, **SETTINGS) as training:
        said, _ = training.communicate(timeout=900)
    assert training.returncode == 0, said
    (made,) = stack.runs() - before
    config = json.loads((made / "config.json").read_text())
    assert config["secagg"] is True and config["privacy"] == "local"
    assert [r["status"] for r in stack.rounds(made)] == ["ok", "ok"]
    for record in stack.rounds(made):
        assert record["contributed"] == list(HOSPITALS) and record["dropped"] == []
    assert (made / "model.safetensors").exists() and (made / "report.html").exists()
    for hospital in HOSPITALS:
        told = stack.consilium(hospital, "ledger", "show", "--home", "/hospital", "--json")
        (pictures,) = json.loads(told)["data_sets"]
        assert pictures["spent"]["runs"] == [made.name]
        assert 0 < pictures["spent"]["epsilon"] <= SETTINGS["epsilon"]


def test_a_run_that_cannot_be_fails_with_its_exit_status(stack: Stack) -> None:
    with stack.training(rounds=1, epsilon=500.0, model_width=0.125) as training:
        said, _ = training.communicate(timeout=600)
    assert training.returncode == 1, said


def test_a_hospital_that_was_killed_returns_and_contributes_again(stack: Stack) -> None:
    """Its restart policy brings it back, and the run goes on with four meanwhile."""
    killed = "hospital-03"
    before = stack.runs()
    starts = stack.inspect(killed)["RestartCount"]
    with stack.training(rounds=5, stage_timeout=30, **SETTINGS) as training:
        eventually("the run has begun", lambda: len(stack.runs() - before) == 1, 180)
        (made,) = stack.runs() - before
        eventually("a round is complete", lambda: bool(stack.rounds(made)), 300)
        # From outside, as the kernel does when memory is short: a kill by the engine's own command
        # counts as the operator's wish, and then no policy starts it again.
        os.kill(stack.inspect(killed)["State"]["Pid"], signal.SIGKILL)
        eventually("the engine has started it again",
                   lambda: stack.inspect(killed)["RestartCount"] > starts, 30)  # fmt: skip
        said, _ = training.communicate(timeout=1200)
    assert training.returncode == 0, said
    took_part = [killed in record["contributed"] for record in stack.rounds(made)]
    assert len(took_part) == 5
    assert took_part[0] and took_part[-1]
    for record in stack.rounds(made):
        assert record["status"] == "ok"
        # Nobody else is lost by it, and who is missing is named.
        assert set(record["contributed"]) >= set(HOSPITALS) - {killed}
        lost = {drop["hospital"] for drop in record["dropped"]}
        assert lost == set(HOSPITALS) - set(record["contributed"])


def test_a_hospital_that_the_operator_killed_is_back_after_a_start(stack: Stack) -> None:
    stopped = stack.container("hospital-01")
    run("docker", "kill", "--signal", "KILL", stopped)
    eventually("it is down", lambda: not stack.inspect("hospital-01")["State"]["Running"], 10)
    run("docker", "start", stopped)
    eventually("it is healthy", lambda: stack.healthy("hospital-01"), 120)


def test_task_vectors_become_bases_where_the_policies_allow_it(stack: Stack) -> None:
    """Last of the runs here: the hospitals' policies stay changed."""
    for hospital in HOSPITALS:
        (stack.demo / hospital / "policy.toml").write_text(VECTORS_POLICY)
    before = stack.runs()
    with stack.training(mode="vectors", secagg="false", allow_random_base="true", publish_every=3,
                        versions=2, **SETTINGS) as training:  # fmt: skip
        said, _ = training.communicate(timeout=900)
    assert training.returncode == 0, said
    (made,) = stack.runs() - before
    summary = json.loads((made / "summary.json").read_text())
    assert (summary["status"], summary["bases"]) == ("completed", 2)
    place = ("--federation", "/federation")
    told = stack.consilium("server", "vectors", "list", made.name, *place, "--format", "json")
    found = json.loads(told)["vectors"]
    merged = {v["hospital"] for v in found if v["published_in"] is not None}
    assert len(merged) >= 3 and merged <= set(HOSPITALS)
    assert all(0 < v["epsilon"] <= SETTINGS["epsilon"] for v in found)
    rebuilt = stack.consilium("server", "vectors", "rebuild", made.name, *place)
    assert "every base is what its vectors make" in rebuilt


def test_from_a_hospital_only_the_gate_can_be_reached(stack: Stack) -> None:
    """Not the control API, no other port of the server, no other hospital, nobody outside."""
    server = stack.addresses("server")
    for name in HOSPITALS:
        own = server[name]
        elsewhere = [
            address
            for service in (*HOSPITALS, "server")
            for network, address in stack.addresses(service).items()
            if network != name
        ]
        found = stack.python(
            name,
            f"""
import json, socket

def answers(host, port, patience):
    with socket.socket() as s:
        s.settimeout(patience)
        return s.connect_ex((host, port)) == 0

def known(host):
    try:
        return bool(socket.getaddrinfo(host, None))
    except OSError:
        return False

print(json.dumps({{
    "open": [port for port in range(1, 65536) if answers({own!r}, port, 1.0)],
    "elsewhere": [host for host in {elsewhere!r} if answers(host, 9092, 0.3)],
    "known": [host for host in {list(SERVICES)!r} if known(host)],
}}))
""",
        )
        assert found == {"open": [9092], "elsewhere": [], "known": ["server", name]}


def test_the_gate_lets_hospitals_to_no_control_api(stack: Stack) -> None:
    """Flower's paths for control and executors, by the gate that hospitals must reach."""
    found = stack.python(
        "hospital-00",
        """
import http.client, json, ssl

def status(method, path):
    trusted = ssl.create_default_context(cafile="/hospital/kit/ca.crt")
    connection = http.client.HTTPSConnection("server", 9092, context=trusted, timeout=10)
    connection.request(method, path, body=b"" if method == "POST" else None)
    return connection.getresponse().status

print(json.dumps({
    "health": status("GET", "/health"),
    "closed": [status(method, path) for method in ("GET", "POST") for path in (
        "/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs",
        "/openapi.json", "/v1/fleet/../control/list-runs", "/v1/fleet/%2e%2e/control/list-runs")],
}))
""",
    )
    assert found["health"] == 200
    assert set(found["closed"]) <= {400, 404, 405}, found


def test_the_server_answers_on_its_published_port_and_only_by_tls(stack: Stack) -> None:
    """What a hospital elsewhere would meet, from this machine, under the federation's authority."""
    host, _, port = stack.environment["CONSILIUM_PUBLISH"].rpartition(":")
    trusted = ssl.create_default_context(cafile=str(stack.demo / "coordinator" / "ca.crt"))
    url = f"https://{host}:{port}/health"
    assert httpx.get(url, verify=trusted, timeout=10).status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(url, timeout=10)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{host}:{port}/health", timeout=10)


def test_no_process_is_root_or_can_write_outside_its_folder(stack: Stack) -> None:
    uid = int(stack.environment["CONSILIUM_UID"])
    for service in SERVICES:
        own = "/federation" if service == "server" else "/hospital"
        found = stack.python(
            service,
            f"""
import json, os, pathlib

def field(process, name):
    text = (process / "status").read_text()
    return next(line.split()[1:] for line in text.splitlines() if line.startswith(name + ":"))

def writable(folder):
    probe = pathlib.Path(folder) / ".probe"
    try:
        probe.write_text("x")
        probe.unlink()
        return True
    except OSError:
        return False

processes = [p for p in pathlib.Path("/proc").iterdir() if p.name.isdigit()]
read = []
for process in processes:
    try:
        read.append((field(process, "Uid"), field(process, "CapEff"), field(process, "CapBnd"),
                     field(process, "NoNewPrivs")))
    except OSError:
        pass  # ended meanwhile
folders = ["/", "/app", "/app/client_app", "/etc", "/opt/consilium/bin", "/usr/bin", "/var/tmp",
           "/root", "/home", "/hospital/data", {own!r}, "/tmp"]
print(json.dumps({{
    "uids": sorted({{int(number) for row in read for number in row[0]}}),
    "capabilities": sorted({{int(row[i][0], 16) for row in read for i in (1, 2)}}),
    "may gain": sorted({{int(row[3][0]) == 0 for row in read}}),
    "processes": len(read),
    "writable": [folder for folder in folders if writable(folder)],
}}))
""",
        )
        assert found["processes"] >= 3
        assert found["uids"] == [uid] and found["capabilities"] == [0]
        assert found["may gain"] == [False]
        assert found["writable"] == [own, "/tmp"]


def test_a_stop_is_clean_within_its_grace(stack: Stack) -> None:
    """SIGTERM ends a node and a server before the engine has to kill; the federation returns."""
    for service in ("hospital-04", "server"):
        started = time.monotonic()
        run("docker", "stop", "--time", "20", stack.container(service))
        assert time.monotonic() - started < 15
        assert stack.inspect(service)["State"]["ExitCode"] in (0, 143)
    stack.compose("up", "--detach", "--no-build")
    for service in SERVICES:
        eventually(f"{service} is healthy", lambda s=service: stack.healthy(s), 480)


def test_no_key_is_in_any_layer_of_the_image(stack: Stack, tmp_path: Path) -> None:
    """Neither a federation's keys, nor anybody's, nor what pip was told to build it."""
    keys = [path.read_bytes() for path in stack.demo.rglob("private/*") if path.is_file()]
    assert len(keys) >= 2 * len(HOSPITALS) + 3
    archive = tmp_path / "image.tar"
    run("docker", "save", "--output", str(archive), IMAGE)
    seen = 0
    with tarfile.open(archive) as image:
        for layer in (m for m in image if m.name.endswith("layer.tar") or "/sha256/" in m.name):
            with tarfile.open(fileobj=image.extractfile(layer)) as files:
                for member in files:
                    seen += 1
                    inside = Path("/", member.name)
                    # mounted for pip at build time: not even its place may hold anything
                    assert not inside.is_relative_to("/run/secrets") or not member.size
                    assert str(inside) != "/etc/pip.conf" or not member.size
                    if not member.isfile():
                        continue
                    content = files.extractfile(member).read()  # type: ignore[union-attr]
                    assert not any(key in content for key in keys), inside
                    if not inside.is_relative_to("/usr") and "site-packages" not in inside.parts:
                        # (libraries carry keys of their own to test themselves with)
                        assert b"PRIVATE KEY-----\n" not in content, inside
    assert seen > 10_000
    history = run("docker", "history", "--no-trunc", "--format", "{{.CreatedBy}}", IMAGE)
    assert "://" not in history

"""A federation of `deploy/compose.yaml`, brought up for tests and taken down again."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

COMPOSE = ROOT / "deploy" / "compose.yaml"
IMAGE = os.environ.get("CONSILIUM_IMAGE", "consilium-test")
HOSPITALS = tuple(f"hospital-{number:02d}" for number in range(5))
SERVICES = ("server", *HOSPITALS)


def run(*command: str, input: str | None = None, **options: Any) -> str:
    """Standard output of a command; RuntimeError with everything it said if it failed."""
    done = subprocess.run(
        command, input=input, capture_output=True, text=True, check=False, timeout=600, **options
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-4000:]}"
                           f"\n{done.stderr[-4000:]}")  # fmt: skip
    return done.stdout


def compose_command() -> list[str] | None:
    """Compose v2 if it is there, else docker-compose 1.29, else None."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            asked = subprocess.run([*command, "version"], capture_output=True, check=False)
            if asked.returncode == 0:
                return command
    return None


def missing() -> str | None:
    """What these tests lack on this machine, or None."""
    if shutil.which("docker") is None or compose_command() is None:
        return "docker or docker compose is not installed"
    for question, answer in (
        (["docker", "info"], "no Docker engine answers: `tests/containers/engine.sh start`"),
        (["docker", "image", "inspect", IMAGE],
         f"there is no image {IMAGE}: `tests/containers/engine.sh image`"),
    ):  # fmt: skip
        if subprocess.run(question, capture_output=True, check=False).returncode:
            return answer
    return None


def eventually(what: str, holds: Callable[[], bool], patience: float) -> float:
    """Wait until ``holds()``; seconds that it took. AssertionError after ``patience`` seconds."""
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > patience:
            raise AssertionError(f"not within {patience:.0f} s: {what}")
        time.sleep(0.5)
    return time.monotonic() - started


def _time(text: str) -> datetime:
    """One of the engine's times, whose nine digits of a second Python does not read."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))


@dataclass
class Stack:
    """One federation in containers: the server and five hospitals."""

    demo: Path
    project: str
    environment: Mapping[str, str]

    def compose(self, *arguments: str, input: str | None = None) -> str:
        """Standard output of a compose command on this federation."""
        return run(*self._command(*arguments), input=input, env=self.environment)

    def _command(self, *arguments: str) -> list[str]:
        return [*(compose_command() or []), "-p", self.project, "-f", str(COMPOSE), *arguments]

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.compose("ps", "-q", service).strip()

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine knows of a service's container."""
        (found,) = json.loads(run("docker", "inspect", self.container(service)))
        return dict(found)

    def healthy(self, service: str) -> bool:
        """Whether the container runs, and a health check since its start says that it works."""
        state = self.inspect(service)["State"]
        checks = state["Health"]["Log"]
        if not (state["Running"] and checks and state["Health"]["Status"] == "healthy"):
            return False
        return _time(checks[-1]["Start"]) > _time(state["StartedAt"])

    def python(self, service: str, program: str) -> Any:
        """Run a Python program in a service's container; the JSON document that it prints."""
        return json.loads(self.compose("exec", "-T", service, "python", "-", input=program))

    def consilium(self, service: str, *arguments: str) -> str:
        """Run the consilium command in a service's container."""
        return self.compose("exec", "-T", service, "consilium", *arguments)

    def addresses(self, service: str) -> dict[str, str]:
        """A container's IP address by network, without the project's name."""
        networks = self.inspect(service)["NetworkSettings"]["Networks"]
        return {name.removeprefix(f"{self.project}_"): n["IPAddress"]
                for name, n in networks.items()}  # fmt: skip

    @contextmanager
    def training(self, **settings: Any) -> Iterator[subprocess.Popen[str]]:
        """`consilium run` in the server's container, as it goes on."""
        sets = [f"--set={name.replace('_', '-')}={value}" for name, value in settings.items()]
        command = self._command(
            "exec", "-T", "server", "consilium", "run", "--federation", "/federation", *sets
        )
        with subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        ) as process:  # fmt: skip
            try:
                yield process
            finally:
                process.kill()

    def runs(self) -> set[Path]:
        """The folders of all runs, at the coordinator."""
        return set((self.demo / "coordinator").glob("home/runs/*"))

    def rounds(self, run: Path) -> list[dict[str, Any]]:
        """The rounds of a run that are complete."""
        path = run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for line in lines if (record := json.loads(line))["round"] > 0]


@contextmanager
def federation(place: Path) -> Iterator[Stack]:
    """Make a demonstration in ``place``, bring it up, and take it down at the end."""
    demo = place / "demo"
    run(sys.executable, "-m", "deploy.cli", "federation", "demo", str(demo), "--hospitals", "5",
        "--address", "server:9092", "--images", "600", "--image-size", "28", cwd=ROOT)  # fmt: skip
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        uid = gid = 10001
        for path in (demo, *demo.rglob("*")):
            os.chown(path, uid, gid)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    stack = Stack(demo, f"consilium-test-{os.getpid()}", {
        **os.environ, "CONSILIUM_DEMO": str(demo), "CONSILIUM_IMAGE": IMAGE,
        "CONSILIUM_UID": str(uid), "CONSILIUM_GID": str(gid),
        "CONSILIUM_PUBLISH": f"127.0.0.1:{port}",
    })  # fmt: skip
    try:
        stack.compose("up", "--detach", "--no-build")
        for service in SERVICES:
            eventually(f"{service} is healthy", lambda s=service: stack.healthy(s), 480)
        yield stack
    finally:
        # Beside the demonstration, for whoever looks after a test that failed.
        (place / "containers.log").write_text(stack.compose("logs", "--no-color"))
        stack.compose("down", "--volumes", "--timeout", "20")

"""A real federation on loopback, for tests: its processes, what can befall them, what they did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from client_app.hospital_file import HospitalFolder
from deploy.provision.federation import FederationFolder
from deploy.runtime.ports import free_port

CLI = [sys.executable, "-m", "deploy.cli"]
PATIENCE = 180.0
REAL = Path(__file__).parents[3] / "shared" / "data" / "bloodmnist_rebuilt.npz"


def until(true: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Wait until ``true()`` is, and return it."""
    deadline = time.monotonic() + patience
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {patience:.0f} s: {what}"
        time.sleep(0.1)
    return found


def some_real_images(target: Path, count: int) -> Path | None:
    """The first ``count`` training pictures of the real file, or None where it is missing."""
    if not REAL.exists():
        return None
    with np.load(REAL, allow_pickle=False) as all_of_it:
        kept = {
            name: all_of_it[name][:count] if name.startswith("train") else all_of_it[name]
            for name in all_of_it.files
        }
    np.savez(target, **kept)
    return target


def processes() -> dict[int, tuple[int, list[str]]]:
    """Every process that is no zombie: its parent and its arguments."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if state != "Z":
                found[int(entry.name)] = (int(parent), words)
    return found


@dataclass
class House:
    """A coordinator and hospitals in one folder, each in processes of its own."""

    root: Path
    port: int = field(default_factory=free_port)
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    directory: Path = Path(__file__).parents[2]
    """Where commands run: whose copy of consilium they are."""

    def make(self, hospitals: int = 5, *, real: bool = False, images: int = 700) -> House:
        arguments = ["--hospitals", str(hospitals), "--address", f"localhost:{self.port}"]
        data = some_real_images(self.root.parent / "real.npz", images) if real else None
        arguments += ["--data", str(data)] if data else ["--images", str(images)]
        self.call("federation", "demo", str(self.root), *arguments)
        return self

    @property
    def coordinator(self) -> FederationFolder:
        return FederationFolder(self.root / "coordinator")

    @property
    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("hospital-*") if path.is_dir())

    def hospital(self, name: str) -> HospitalFolder:
        return HospitalFolder(self.root / name)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "CONSILIUM_HOME": str(self.root / "home"), "PYTHONUNBUFFERED": "1"}

    def call(self, *arguments: str, status: int = 0) -> str:
        """A `consilium` command to its end; what it printed."""
        done = subprocess.run(
            [*CLI, *arguments], env=self.environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """A `consilium` command in the background; its output goes to NAME.out."""
        with self.output(name).open("ab") as out:
            process = subprocess.Popen(
                [*CLI, *arguments], env=self.environment(), stdout=out, stderr=out,
                start_new_session=True, cwd=self.directory,
            )  # fmt: skip
        self.started[name] = process
        return process

    def output(self, name: str) -> Path:
        return self.root / f"{name}.out"

    def said(self, name: str) -> str:
        path = self.output(name)
        return path.read_text() if path.exists() else ""

    def has_said(self, name: str, words: str) -> bool:
        return words in self.said(name)

    def serve(self) -> None:
        self.start("serve", "federation", "serve", str(self.coordinator.root), "--host",
                   "127.0.0.1")  # fmt: skip
        until(self.is_up, "the server")

    def is_up(self) -> bool:
        return not subprocess.run(
            [*CLI, "federation", "health", str(self.coordinator.root)],
            env=self.environment(), capture_output=True, check=False,
        ).returncode  # fmt: skip

    def open(self, name: str) -> None:
        self.start(name, "hospital", "start", str(self.root / name))

    def open_all(self) -> None:
        for name in self.names:
            self.open(name)

    def is_connected(self, name: str) -> bool:
        return (self.root / name / "node" / "contact").exists()

    def run(self, name: str = "run", /, **values: object) -> subprocess.Popen[bytes]:
        """Start a run in the background."""
        arguments = ["run", "--federation", str(self.coordinator.root)]
        if resume := values.pop("resume", None):
            arguments += ["--resume", str(resume)]
        for key, value in values.items():
            arguments += ["--set", f"{key.replace('_', '-')}={value}"]
        return self.start(name, *arguments)

    def runs(self) -> list[Path]:
        return sorted((self.coordinator.root / "home" / "runs").glob("*"))

    def rounds(self, run: Path | None = None) -> list[dict[str, Any]]:
        """The complete rounds of a run (the newest), the 0th left out."""
        everything = [run] if run else self.runs()
        path = everything[-1] / "metrics.jsonl" if everything else None
        if path is None or not path.exists():
            return []
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [row for row in rows if row["round"] > 0]

    def wait_for_round(self, number: int, patience: float = PATIENCE) -> None:
        until(lambda: len(self.rounds()) >= number, f"round {number}\n{self.said('run')}", patience)

    def process_of(self, module: str, word: str = "") -> int | None:
        """The id of the process of ``python -m MODULE … WORD …``."""
        for pid, (_, words) in processes().items():
            ours = any(str(self.root) in w for w in words)
            if ours and module in words and (not word or any(word in w for w in words)):
                return pid
        return None

    def node(self, name: str) -> int:
        """The id of a hospital's SuperNode."""
        return int(until(lambda: self._of("deploy.node.supernode", name), f"node of {name}"))

    def _of(self, module: str, name: str) -> int | None:
        place = str(self.root / name)
        found = processes()
        rows = [p for p, (_, words) in found.items() if module in words and place in words]
        # A fork has its parent's arguments: the topmost is the process itself.
        return next((pid for pid in rows if found[pid][0] not in rows), None)

    def app_of(self, name: str) -> int | None:
        """The id of the fork in which a hospital answers a message just now."""
        apps = self._of("deploy.node.apps", name)
        found = processes()
        return next((pid for pid, (parent, _) in found.items() if apps and parent == apps), None)

    def serverapp(self) -> int | None:
        """The id of the fork in which the ServerApp runs."""
        executor = self.process_of("deploy.server.executor")
        found = processes()
        return next(
            (p for p, (parent, _) in found.items() if executor and parent == executor), None
        )

    def busy(self, name: str, seconds: float = 0.4) -> int:
        """Wait until a hospital has been at one message for ``seconds``: it trains; the fork."""
        since: dict[int, float] = {}

        def long_enough() -> int | None:
            pid = self.app_of(name)
            if pid is None:
                return None
            began = since.setdefault(pid, time.monotonic())
            return pid if time.monotonic() - began >= seconds else None

        return int(until(long_enough, f"{name} at work"))

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def end(self, name: str, number: int = signal.SIGTERM, patience: float = 20.0) -> int:
        """End a command that was started; its exit status."""
        process = self.started.pop(name)
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
        return process.wait(patience)

    def close(self) -> None:
        for name in list(self.started):
            process = self.started[name]
            try:
                self.end(name)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)

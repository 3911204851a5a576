"""Processes that are started again when they end, and that end together.

Each service is a child process. What it prints goes to its log file, which is rotated, and to our
own output with its name in front. One that ends is started again after a back-off that doubles
from 1 s to 30 s, and begins anew once it has lived for a minute. SIGTERM or SIGINT ends all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import FrameType

import deploy

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before a service is started again, at first and at most."""
SETTLED = 60.0
"""Seconds of life after which a service counts as well."""
LOG_BYTES, LOG_FILES = 10_000_000, 5
GRACE = 8.0
"""Seconds between asking a service to end and making it."""


@dataclass(frozen=True)
class Service:
    """A process to be kept alive."""

    name: str
    arguments: Sequence[str]
    """After the Python interpreter: ``-m``, a module, and what that takes."""
    environment: Mapping[str, str]
    explain: Callable[[str], str | None] = lambda line: None
    """What a line of its output means to a person, where that can be told."""
    before: Callable[[], None] | None = None
    """Called before each start."""


@dataclass
class _Running:
    service: Service
    log: logging.Logger
    process: subprocess.Popen[bytes] | None = None
    reader: threading.Thread | None = None
    started: float = 0.0
    due: float = 0.0
    pause: float = FIRST_PAUSE
    meanings: list[str] = field(default_factory=list)


class Supervisor:
    """Keeps services alive until it is told to stop."""

    def __init__(self, services: Sequence[Service], logs: Path, say: Callable[[str], None]) -> None:
        """``logs``: folder of the log files, made 0700. ``say``: one line for whoever watches."""
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._say = say
        self._running = [_Running(s, _logger(s.name, logs)) for s in services]
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let :meth:`run` end everything and return."""
        self._stop.set()

    def run(self) -> None:
        """Start all, and start again what ends; returns after SIGTERM, SIGINT or :meth:`stop`.

        In the main thread: the children live as long as the thread that started them.
        """
        before = {s: signal.signal(s, self._told) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self._stop.is_set():
                for running in self._running:
                    self._tend(running)
                self._stop.wait(0.2)
        finally:
            self._end_all()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _told(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()

    def _tend(self, running: _Running) -> None:
        process = running.process
        if process is not None:
            if process.poll() is None:
                return
            self._ended(running, process)
        if time.monotonic() >= running.due:
            self._start(running)

    def _start(self, running: _Running) -> None:
        service = running.service
        if service.before is not None:
            service.before()
        running.started, running.meanings = time.monotonic(), []
        running.process = subprocess.Popen(
            [*python(), *service.arguments],
            env=with_our_code(service.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # its children go with it: one group, one end
        )
        running.reader = threading.Thread(target=self._read, args=(running,), daemon=True)
        running.reader.start()

    def _read(self, running: _Running) -> None:
        process = running.process
        assert process is not None and process.stdout is not None
        with process.stdout as output:
            for raw in output:
                line = raw.decode(errors="replace").rstrip()
                running.log.info("%s", line)
                self._say(f"{running.service.name} | {line}")
                meaning = running.service.explain(line)
                if meaning is not None and meaning not in running.meanings:
                    running.meanings.append(meaning)

    def _ended(self, running: _Running, process: subprocess.Popen[bytes]) -> None:
        _kill_group(process.pid, signal.SIGKILL)  # what it has left behind
        if running.reader is not None:
            running.reader.join(2.0)
        now = time.monotonic()
        if now - running.started >= SETTLED:
            running.pause = FIRST_PAUSE
        running.due, running.process = now + running.pause, None
        how = f"signal {-process.returncode}" if process.returncode < 0 else process.returncode
        self._note(running, f"{running.service.name} has ended ({how}); "
                            f"it is started again in {running.pause:.0f} s")  # fmt: skip
        for meaning in running.meanings:
            self._note(running, meaning)
        running.pause = min(running.pause * 2, LONGEST_PAUSE)

    def _note(self, running: _Running, text: str) -> None:
        running.log.info("supervisor: %s", text)
        self._say(text)

    def _end_all(self) -> None:
        alive = [r.process for r in self._running if r.process is not None]
        for process in alive:
            _kill_group(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for process in alive:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            _kill_group(process.pid, signal.SIGKILL)
            process.wait()
        for running in self._running:
            if running.reader is not None:
                running.reader.join(2.0)
            for handler in running.log.handlers:
                handler.close()


class _PrivateFiles(RotatingFileHandler):
    """Its files are their owner's only, the rotated ones too."""

    def _open(self) -> TextIOWrapper:
        stream = super()._open()
        os.fchmod(stream.fileno(), 0o600)
        return stream


def python() -> list[str]:
    """This interpreter, which takes no module from the folder that it is started in.

    ``-m`` alone looks there first: in /tmp, or a shared folder, that is anybody's code.
    """
    return [sys.executable, "-P"]


def with_our_code(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` with this very copy of the packages before any other that is installed."""
    root = str(Path(deploy.__file__).resolve().parent.parent)
    given = environment.get("PYTHONPATH", "")
    return {**environment, "PYTHONPATH": f"{root}{os.pathsep}{given}" if given else root}


def _kill_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it
        os.killpg(group, number)


def _logger(name: str, folder: Path) -> logging.Logger:
    logger = logging.Logger(f"consilium.{name}")  # not of the tree: it has this one handler
    path = folder / f"{name}.log"
    handler = _PrivateFiles(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    return logger

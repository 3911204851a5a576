"""Runs the apps that Flower's process isolation hands out, each in a fork of this process.

It does what ``flower-superexec`` does, with three differences. It asks for one kind of task only,
so that no other entry of an app is ever run here. It starts an app by fork, with everything
imported already: that saves an interpreter's start for each message. And at a hospital it runs
one app at a time: the next one begins only when the last has handed its state back, which
Flower alone does not see to (docs/flower.md, §8).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.interceptors import (
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

from deploy.runtime.flower import Patience, die_with_parent

log = logging.getLogger("consilium.executor")

SERVER, HOSPITAL = "flwr-serverapp", "flwr-clientapp"
"""Flower's names of the two kinds of tasks."""
PAUSE = 0.5
"""Seconds between attempts while nobody answers."""
GRACE = 5.0
"""Seconds that an app has to end."""
_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})


@dataclass(frozen=True)
class Runtime:
    """Where tasks come from."""

    address: str
    secret: Path
    """The file of the secret that whoever asks for a task must know."""
    certificates: bytes | None
    """PEM; None: without TLS, on loopback."""

    def client(self) -> RuntimeHttpClient:
        """A client that may ask for tasks."""
        secret = load_superexec_auth_secret(secret_file=str(self.secret))
        assert secret is not None  # the file was named
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=self.certificates is None,
            root_certificates=self.certificates,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRE),
            ],
        )


class Executor:
    """Asks ``runtime`` for tasks of ``kind`` and gives each token to ``work`` in a fork."""

    def __init__(
        self, runtime: Runtime, kind: str, work: Callable[[Runtime, str], None], *, at_once: int
    ) -> None:
        """``work(runtime, token)`` runs the app; ``at_once``: how many apps may run."""
        self._runtime, self._kind, self._work = runtime, kind, work
        self._at_once = at_once
        self._children: set[int] = set()
        self._stopping = False

    def run(self) -> None:
        """Until SIGTERM or SIGINT; then the apps that run are ended, too."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told)
        patience = Patience(least=0.02, longest=0.5)
        with self._runtime.client() as client:
            while not self._stopping:
                if self._reap():
                    patience.found()
                try:
                    token = self._acquire(client)
                except httpx.HTTPError as error:
                    self._alone(error)
                    continue
                if token:
                    patience.found()
                    self._start(token)
                else:
                    time.sleep(patience.seconds())
        self._end_children()

    def _told(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _acquire(self, client: RuntimeHttpClient) -> str:
        if len(self._children) >= self._at_once:
            return ""
        asked = AcquireTaskRequest(supported_task_types={self._kind}, agentapp_fab_hashes=set())
        answer = client.AcquireTask(asked)
        return str(answer.token) if answer.HasField("task") else ""

    def _alone(self, error: httpx.HTTPError) -> None:
        """Nobody answers: whatever runs can hand its result to nobody any more."""
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == 401:
            raise SystemExit("the secret that tasks are given for is another one than ours")
        if self._children and isinstance(error, httpx.ConnectError) and self._kind != SERVER:
            log.warning("the node has ended: so do the apps that worked for it")
            self._end_children()
        time.sleep(PAUSE)

    def _start(self, token: str) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._children.add(pid)
            return
        status = 1
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            die_with_parent()
            if os.getppid() == parent:
                self._work(self._runtime, token)
                status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            log.exception("the app could not be run")
        finally:
            _leave(status)

    def _reap(self) -> bool:
        """Note the apps that have ended; whether there were any."""
        before = len(self._children)
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._children.discard(pid)
                if os.WIFSIGNALED(status):
                    log.warning("an app was ended by signal %d", os.WTERMSIG(status))
        return len(self._children) < before

    def _end_children(self) -> None:
        deadline = time.monotonic() + GRACE
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._children:
                os.kill(pid, number)  # not reaped yet, so the number is still theirs
            while self._children and (number == signal.SIGKILL or time.monotonic() < deadline):
                self._reap()
                time.sleep(0.02)


def _leave(status: int) -> NoReturn:
    """End the fork without the parent's clean-up, and with all that was printed."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)

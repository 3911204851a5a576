"""Flower 1.41 as our processes use it: its environment, what it waits for and leaves behind.

Flower has no setting for these waits (docs/flower.md, §5): a SuperNode that has nothing to do
sleeps 3 s, an object that is not there yet is asked for again after 1 s, a server that is away
after up to 20 s. Here they follow the time
that there was nothing: a process that has waited for *t* seconds looks again after a twentieth of
*t*. So an answer comes at most 5 % later than it could, and an idle hospital does not
busy the server. tests/deploy/runtime hold every name that is replaced here.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

SWITCHES = {
    # Nothing is fetched, nothing is told to anyone, while a run goes on.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    # A hospital's thread count is the run's `threads`, not what a library finds.
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
"""Environment of every process that Flower's code runs in."""

OBJECT_BACKOFF = 0.05
"""Seconds until an object that was not there is asked for again; Flower doubles it each time."""

RETRY_PAUSE = 5
"""Most seconds between two attempts to reach a server that does not answer."""

EXPIRY = 1.0
"""Seconds between two looks for tasks that expired."""

NEXT_DOOR = 0.05
"""Seconds between two looks for the answer of an app on the same machine; Flower takes 0.5."""

SHARE, LEAST_WAIT, LONGEST_WAIT = 0.05, 0.1, 3.0
"""Part of the time without work after which is looked again; its bounds in seconds."""

_LOOPBACK = "localhost,127.0.0.1,::1"
_IDLE = 3
"""What ``start_client_internal`` gives to ``time.sleep`` when there was no message."""


def environment(flower_home: Path, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for one of Flower's processes, with a ``FLWR_HOME`` of its own."""
    commands = Path(sys.executable).parent
    found = {**(os.environ if base is None else base), **SWITCHES, "FLWR_HOME": str(flower_home)}
    # This environment's commands first: Flower finds its helpers there.
    found["PATH"] = f"{commands}{os.pathsep}{found.get('PATH', '')}"
    loopback_directly(found)
    return found


def loopback_directly(environment: MutableMapping[str, str]) -> None:
    """Let nothing on this machine be asked for through a proxy, whatever proxy is set."""
    for name in ("NO_PROXY", "no_proxy"):
        said = environment.get(name, "")
        if "127.0.0.1" not in said.split(","):
            environment[name] = f"{said},{_LOOPBACK}" if said else _LOOPBACK


def command(name: str) -> str:
    """The path of one of Flower's commands in this environment."""
    return str(Path(sys.executable).parent / name)


class Patience:
    """How long to wait before looking again: a share of the time that there was nothing."""

    def __init__(self, least: float = LEAST_WAIT, longest: float = LONGEST_WAIT) -> None:
        self._least, self._longest = least, longest
        self.found()

    def found(self) -> None:
        """There was something: the next looks are quick."""
        self._since = time.monotonic()

    def seconds(self) -> float:
        """Until the next look."""
        idle = time.monotonic() - self._since
        return min(max(idle * SHARE, self._least), self._longest)


def prompt_objects() -> None:
    """Shorten the first wait for an object of a message: a default argument of two functions."""
    from flwr.supercore.inflatable import inflatable_utils

    for function in (
        inflatable_utils.pull_objects,
        inflatable_utils.pull_and_inflate_object_from_tree,
    ):
        defaults = function.__kwdefaults__
        if not defaults or "initial_backoff" not in defaults:
            raise RuntimeError(f"Flower's {function.__name__} has no initial_backoff any more")
        defaults["initial_backoff"] = OBJECT_BACKOFF


def prompt_retries() -> None:
    """Try again after 5 s at most while a server is away: Flower's pauses grow to 20 s."""
    from flwr.supercore.retry import http_retry

    if not hasattr(http_retry, "MAX_RETRY_DELAY"):
        raise RuntimeError("Flower's http_retry has no MAX_RETRY_DELAY any more")
    vars(http_retry)["MAX_RETRY_DELAY"] = RETRY_PAUSE


def prompt_supernode() -> None:
    """Let a SuperNode look for messages as :class:`Patience` says, instead of each 3 s."""
    from flwr.supernode import start_client_internal

    patience = Patience()
    receive_and_store = start_client_internal._pull_and_store_message
    wait_and_send = start_client_internal._push_messages

    def pull(*args: Any, **kwargs: Any) -> int | None:
        run = receive_and_store(*args, **kwargs)
        if run is not None:
            patience.found()
        return run

    def push(*args: Any, **kwargs: Any) -> None:
        wait_and_send(*args, **kwargs)
        patience.found()  # who has answered is soon asked for more

    def sleep(seconds: float) -> None:
        if seconds == _IDLE:
            time.sleep(patience.seconds())
        else:  # for an answer of the app next door, or for an object of it
            time.sleep(min(seconds, NEXT_DOOR))

    # The module's own names only: nothing else of the process sleeps less.
    start_client_internal._pull_and_store_message = pull
    start_client_internal._push_messages = push
    names = {name: getattr(time, name) for name in dir(time) if not name.startswith("_")}
    vars(start_client_internal)["time"] = SimpleNamespace(**names | {"sleep": sleep})


def drop_what_ended() -> None:
    """Let a SuperNode forget a message whose run ended while its objects were fetched.

    Flower leaves the message and its task there, without the objects. The app that has taken the
    task asks for them for hours, and no other message is answered meanwhile.
    """
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode import start_client_internal

    receive_and_store = start_client_internal._pull_and_store_message

    def ordinary(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*args: Any) -> Any:
            try:
                return call(*args)
            except RunNotRunningException:  # no Exception: Flower's own clean-up lets it through
                raise RuntimeError("the run has ended") from None

        return made

    def pull(**kwargs: Any) -> int | None:
        for name in ("pull_object", "confirm_message_received"):
            kwargs[name] = ordinary(kwargs[name])
        return receive_and_store(**kwargs)

    vars(start_client_internal)["_pull_and_store_message"] = pull


def seldom_expiry(seconds: float = EXPIRY) -> None:
    """Look for tasks that nobody works on any more once in ``seconds``, not at every call.

    Flower's database state does so whenever a run's status is asked for, with two updates: each
    call at the server (several for every message) then waits for SQLite's one write lock: in a
    profile of a round more threads were there than anywhere else. A task expires after some 30 s
    without a sign of life, so that a second more changes nothing.
    """
    from flwr.supercore.corestate.sql_corestate import SqlCoreState

    look = SqlCoreState._cleanup_expired_task_tokens
    if getattr(look, "seldom", False):
        return
    looked: WeakKeyDictionary[SqlCoreState, float] = WeakKeyDictionary()

    def seldom(self: SqlCoreState) -> None:
        now = time.monotonic()
        if now - looked.get(self, -seconds) >= seconds:
            looked[self] = now
            look(self)

    vars(seldom)["seldom"] = True
    SqlCoreState._cleanup_expired_task_tokens = seldom  # type: ignore[method-assign]


def die_with_parent() -> None:
    """Have the kernel end this process when the one that started it ends, however it ends.

    Linux only; elsewhere nothing is done. To be called first in a new process.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it had ended before
        os.kill(os.getpid(), signal.SIGTERM)

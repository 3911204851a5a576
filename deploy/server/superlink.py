"""Flower's SuperLink, on a Unix socket: ``python -m deploy.server.superlink DIR SOCKET``.

It listens on no port: its control and runtime APIs ask nobody who they are, and any account of the
machine may connect to a port of loopback (:mod:`deploy.runtime.unix`).
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.runtime.flower import die_with_parent, seldom_expiry
from deploy.runtime.limits import raise_open_files
from deploy.runtime.unix import listening

GRACE = 4.0
"""Seconds to end by itself once whoever started it is gone."""
_CONTROL_LAYERS = frozenset(
    {
        "ControlSensitiveResponseMiddleware", "ControlAuthenticationMiddleware",
        "ControlLicenseMiddleware", "ControlEventLogMiddleware",
    }
)  # fmt: skip
"""What Flower lets every call pass; each looks at paths under /v1/control/ alone."""


_NO_HOST = "no-port.invalid"
"""What Flower is told to listen on: a name that nobody has (RFC 6761), were it to try."""
_OTHER_PORTS = ("FLWR_INTERNAL_GRPC_CONTROL_API", "FLWR_INTERNAL_GRPC_FLEET_API")
"""With these in its environment Flower opens ports beside the one that it is told of."""


def arguments(root: Path) -> list[str]:
    """Of ``flower-superlink``; nothing in them is secret."""
    from deploy.server.layout import ServerFolder

    folder = ServerFolder(root)
    return [
        "--ssl-ca-certfile", str(folder.authority), "--ssl-certfile", str(folder.certificate),
        "--ssl-keyfile", str(folder.key), "--enable-supernode-auth",
        "--database", str(folder.database), "--isolation", "process",
        "--superexec-auth-secret-file", str(folder.secret),
        "--disable-runtime-dependency-installation", "--host", _NO_HOST,
    ]  # fmt: skip


def leave_when_alone(grace: float = GRACE) -> None:
    """Leave for certain ``grace`` seconds after our parent: an open stream would keep us."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(grace)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class OnlyFor:
    """ASGI: requests under ``prefix`` go through ``middleware``, the others past it."""

    def __init__(self, app: ASGIApp, *, middleware: Callable[[ASGIApp], ASGIApp], prefix: str):
        self._through, self._past, self._prefix = middleware(app), app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; a connection that is no request goes through."""
        past = scope["type"] == "http" and not scope["path"].startswith(self._prefix)
        await (self._past if past else self._through)(scope, receive, send)


def short_way() -> None:
    """Let the hospitals' calls and the run's past the four layers that are for control alone.

    Each is a task group and two streams for every call, to find that there is nothing to do; and
    the SuperLink, one Python process, is what bounds a stage.
    """
    from flwr.superlink import main as superlink
    from starlette.middleware import Middleware

    layers = superlink._get_middleware

    def fewer() -> list[Middleware]:
        found = layers()
        control = [m for m in found if getattr(m.cls, "__name__", "") in _CONTROL_LAYERS]
        if len(control) != len(_CONTROL_LAYERS):
            raise RuntimeError("Flower's SuperLink has other layers than we know")
        return [
            Middleware(OnlyFor, middleware=m.cls, prefix="/v1/control/") if m in control else m
            for m in found
        ]

    superlink._get_middleware = fewer


def only_at(path: Path) -> None:
    """Have Flower's SuperLink serve on the socket at ``path``, mode 0600, and nowhere else."""
    import uvicorn

    # The package has a function of this module's name under its name.
    module = importlib.import_module("flwr.superlink.cli.flower_superlink")
    for name in _OTHER_PORTS:
        os.environ.pop(name, None)

    def run(app: Any, *, host: str, port: int, reload: bool, workers: int, **rest: Any) -> None:
        if reload or workers != 1:
            raise RuntimeError("Flower's SuperLink would share its socket")
        server = uvicorn.Server(uvicorn.Config(app, **rest))  # it also sets the loggers up
        logging.getLogger("uvicorn.access").addFilter(_no_health)
        server.run(sockets=[listening(path)])

    if getattr(module, "uvicorn", None) is not uvicorn:
        raise RuntimeError("Flower's SuperLink is served by something else than uvicorn")
    # The module's own name only. Were it not used, Flower would find no such host, and end.
    vars(module)["uvicorn"] = SimpleNamespace(run=run)


def _no_health(record: logging.LogRecord) -> bool:
    """Anybody may ask for /health: a line for each would push the others out of the log."""
    return " /health " not in record.getMessage()


def main() -> None:
    """Until told to stop."""
    die_with_parent()
    leave_when_alone()
    os.umask(0o077)  # Flower makes its database readable to all
    raise_open_files()
    root, path = Path(sys.argv[1]), Path(sys.argv[2])
    sys.argv = ["flower-superlink", *arguments(root)]
    from flwr.superlink.cli.flower_superlink import flower_superlink

    seldom_expiry()
    short_way()
    only_at(path)
    flower_superlink()


if __name__ == "__main__":
    main()

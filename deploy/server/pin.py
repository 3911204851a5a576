"""Which app the server runs: the one that is installed beside it, and nothing else.

As at a hospital (:mod:`deploy.node.code`), nothing of a run's archive (FAB) is unpacked or
imported. Flower builds the same bytes from the same tree, so the archive of a run must be, byte for
byte, what Flower builds from the installation that serves; then that installation's ServerApp runs.
Whoever gets to start a run, by whatever way, chooses a run config, and no code.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import ConsiliumError
from deploy.server.launch import APP

log = logging.getLogger("consilium.executor")


class PinError(ConsiliumError):
    """A run's app is not the one that is installed at the server."""

    code = "code"


def installed(app: Path = APP) -> str:
    """SHA-256, in hexadecimal digits, of the archive that Flower builds from ``app``."""
    from flwr.cli.build import build_fab_from_disk

    return hashlib.sha256(build_fab_from_disk(app)).hexdigest()


def check(archive: bytes, own: str, now: str) -> None:
    """PinError unless a run's ``archive`` is the installed app.

    ``own``: of :func:`installed` when the server was started; ``now``: the same at this moment.
    """
    if now != own:
        raise PinError(
            "the installed code has changed since the server was started",
            "start the server again (consilium federation serve), then the run",
        )
    shown = hashlib.sha256(archive).hexdigest()
    if shown != own:
        raise PinError(
            f"the app of this run ({shown[:16]}…) is not the one that is installed at the server "
            f"({own[:16]}…); nothing of it was unpacked or run",
            "start the run from the server's own installation; if nobody here started it, see who "
            "has access to the coordinator's account",
        )


def pin(module: Any, own: str, app: Path = APP) -> None:
    """Have Flower's ``module`` that runs a ServerApp (``run_serverapp``) run the installed one.

    Three of its names are replaced: what unpacks the archive, where it would lie, and what loads
    and runs an app from there. RuntimeError if Flower has other names.
    """
    names: dict[str, Any] = vars(module)
    replaced: dict[str, Callable[..., Any]] = {
        "install_from_fab": lambda archive, **rest: _check_aloud(archive, own, app),
        "get_project_dir": lambda *which: app,
        "run_": _run,
    }
    if missing := sorted(set(replaced) - set(names)):
        raise RuntimeError(f"Flower's run_serverapp has no {missing[0]} any more")
    names.update(replaced)


def _check_aloud(archive: bytes, own: str, app: Path) -> None:
    try:
        check(archive, own, installed(app))
    except PinError as error:
        log.error("refused a run: %s", error)
        raise


def _run(*, grid: Any, server_app_dir: str, server_app_attr: str, context: Any) -> Any:
    """As Flower's: run the app on ``context``; but the installed one, whatever the names say."""
    from server_app.app import app

    app(grid=grid, context=context)
    return context

"""Which app the server runs: the one that is installed beside it, and nothing else.

As at a hospital (:mod:`deploy.node.code`), nothing of a run's archive (FAB) is unpacked or
imported. Its code must be, file by file, what Flower packs of the installation that serves; then
that installation's ServerApp runs. Whoever gets to start a run, by whatever way, chooses a run
config, and no code.
"""

from __future__ import annotations

import hashlib
import io
import logging
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import ConsiliumError
from deploy.server.launch import APP

log = logging.getLogger("consilium.executor")

CODE = ("common/", "server_app/", "client_app/", "pyproject.toml")
"""What an archive's paths begin with where they decide what runs."""
Files = Mapping[str, tuple[int, bytes]]
"""Of each such file by its path: its size, and its SHA-256."""


class PinError(ConsiliumError):
    """A run's app is not the one that is installed at the server."""

    code = "code"


def installed(app: Path = APP) -> dict[str, tuple[int, bytes]]:
    """The code that Flower packs of the installation at ``app``, as it is on the disk now."""
    from flwr.cli.build import build_fab_from_disk

    found = {}
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))) as packed:
        for name in packed.namelist():
            if name.startswith(CODE):
                content = packed.read(name)
                found[name] = len(content), hashlib.sha256(content).digest()
    return found


def check(archive: bytes, own: Files, now: Files) -> None:
    """PinError unless the code in a run's ``archive`` is the installed one.

    ``own``: of :func:`installed` when the server was started; ``now``: the same at this moment.
    """
    if changed := _differing(own, now):
        raise PinError(
            f"the installed code has changed since the server was started: {changed}",
            "start the server again (consilium federation serve), then the run",
        )
    if differing := _differing(own, _shipped(archive, own)):
        raise PinError(
            f"the app of this run is not the one that is installed at the server: {differing} "
            "differ; nothing of it was unpacked or run",
            "start the run from the server's own installation; if nobody here started it, see who "
            "has access to the coordinator's account",
        )


def _shipped(archive: bytes, own: Files) -> Files:
    """The same of an archive from anywhere: no more is read of a file than our own has."""
    found: dict[str, tuple[int, bytes]] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as packed:
            for entry in packed.infolist():
                name = entry.filename
                if not name.startswith(CODE):
                    continue
                size = own[name][0] if name in own and name not in found else -1
                if entry.file_size != size:  # unknown, twice, or of another size: not to be read
                    found[name] = entry.file_size, b""
                    continue
                with packed.open(entry) as file:
                    content = file.read(size + 1)
                found[name] = len(content), hashlib.sha256(content).digest()
    except Exception as error:  # zipfile raises many kinds for what is no archive
        raise PinError(
            f"the app of this run is no archive that can be read ({type(error).__name__}); nothing "
            "of it was run",
            "start the run with `consilium run` at the server",
        ) from None
    return found


def _differing(own: Files, other: Files) -> str:
    """Up to three paths at which the two differ, or ""."""
    paths = sorted(path for path in {*own, *other} if own.get(path) != other.get(path))
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(ascii(path) for path in paths[:3]) + more


def pin(module: Any, own: Files, app: Path = APP) -> None:
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


def _check_aloud(archive: bytes, own: Files, app: Path) -> None:
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

"""Runs the ServerApps of runs. ``python -m deploy.server.executor DIR SOCKET``.

``SOCKET`` is the SuperLink's. What runs is the installed app, and only for a run whose archive is
that very app (:mod:`deploy.server.pin`). Nothing of ``server_app`` is imported here: each run's
fork imports it, as it is on the disk then.
"""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from queue import Queue

from flwr.supercore.logger import LOGGER_NAME, mirror_output_to_queue
from flwr.superlink.grid import http_grid

from deploy.runtime.executor import SERVER, Executor, Runtime
from deploy.runtime.flower import die_with_parent, prompt_objects, prompt_retries
from deploy.runtime.limits import raise_open_files
from deploy.runtime.unix import NOWHERE, redirect_all
from deploy.server.layout import ServerFolder
from deploy.server.pin import Files, installed, pin
from deploy.server.push import forgive_lost_answers

AT_ONCE = 4
"""Runs that may go on at the same time."""


def work(own: Files, runtime: Runtime, token: str) -> None:
    """One ServerApp, to its end, in this process; what it prints goes to the run's log too.

    ``own``: the app that was installed when the server was started; see :mod:`deploy.server.pin`.
    """
    lines: Queue[str | None] = Queue()
    mirror_output_to_queue(lines)
    prompt_objects()
    prompt_retries()
    forgive_lost_answers(http_grid)
    # The package has a function of this module's name under its name.
    module = importlib.import_module("flwr.superlink.runtime.run_serverapp")
    pin(module, own)
    # Libraries of the app give the root logger a handler: no line twice.
    logging.getLogger(LOGGER_NAME).propagate = False
    module.run_serverapp(
        runtime_api_address=runtime.address,
        log_queue=lines,
        token=token,
        insecure=False,
        certificates=runtime.certificates,
        parent_pid=os.getppid(),
        runtime_dependency_install=False,
    )


def main() -> None:
    """Until told to stop."""
    die_with_parent()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    raise_open_files()
    folder = ServerFolder(Path(sys.argv[1]))
    redirect_all(Path(sys.argv[2]))
    # Of versions before this one, which unpacked apps and ran them.
    shutil.rmtree(Path(os.environ["FLWR_HOME"]) / "apps", ignore_errors=True)
    runtime = Runtime(NOWHERE, folder.secret, folder.authority.read_bytes())
    Executor(runtime, SERVER, partial(work, installed()), at_once=AT_ONCE).run()


if __name__ == "__main__":
    main()

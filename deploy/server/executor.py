"""Runs the ServerApps of runs. ``python -m deploy.server.executor DIR PORT``.

Nothing of ``common`` or ``server_app`` is imported here: an app's own copy is what runs.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from pathlib import Path
from queue import Queue

from flwr.supercore.logger import LOGGER_NAME, mirror_output_to_queue
from flwr.superlink.grid import http_grid
from flwr.superlink.runtime.run_serverapp import run_serverapp

from deploy.runtime.executor import SERVER, Executor, Runtime
from deploy.runtime.flower import die_with_parent, prompt_objects, prompt_retries
from deploy.server.push import forgive_lost_answers

AT_ONCE = 4
"""Runs that may go on at the same time."""


def work(runtime: Runtime, token: str) -> None:
    """One ServerApp, to its end, in this process; what it prints goes to the run's log too."""
    lines: Queue[str | None] = Queue()
    mirror_output_to_queue(lines)
    prompt_objects()
    prompt_retries()
    forgive_lost_answers(http_grid)
    # Libraries of the app give the root logger a handler: no line twice.
    logging.getLogger(LOGGER_NAME).propagate = False
    run_serverapp(
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
    state, port = Path(sys.argv[1]) / "state", int(sys.argv[2])
    # Flower runs an unpacked app that it finds as it is: none that lay there is run.
    shutil.rmtree(Path(os.environ["FLWR_HOME"]) / "apps", ignore_errors=True)
    runtime = Runtime(
        f"127.0.0.1:{port}", state / "secret", (state / "tls" / "ca.crt").read_bytes()
    )
    Executor(runtime, SERVER, work, at_once=AT_ONCE).run()


if __name__ == "__main__":
    main()

"""The process that runs a hospital's app: ``python -m deploy.node.apps DIR HOST:PORT``.

It is the only one that reads pictures, ledger and identity key. It reaches the SuperNode on
this machine and needs no other network.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp
from flwr.clientapp.client_app import LoadClientAppError

from client_app.hospital_file import HospitalFolder
from deploy.node.code import CodeError, check, installed
from deploy.node.state import NodeState
from deploy.runtime.executor import HOSPITAL, Executor, Runtime
from deploy.runtime.flower import die_with_parent, prompt_objects, prompt_retries

log = logging.getLogger("consilium.apps")

PRELOADED = (
    "client_app.work", "client_app.tuning", "client_app.private", "client_app.secagg",
    "client_app.egress", "common.datasets", "PIL.Image", "cryptography.hazmat.backends.openssl",
    "encodings.cp437", "_strptime",
)  # fmt: skip
"""Imported once, before the forks: with torch and Opacus they take seconds."""


def run_installed(own: Mapping[str, bytes], app: ClientApp, runtime: Runtime, token: str) -> None:
    """Answer one message with ``app``, if the archive that came with it says ``own``.

    Flower's own function does the talking; three names in its module are replaced: what unpacks
    the archive, where it would have been unpacked, and what loads an app from there.
    """
    from flwr.supernode.runtime import run_clientapp

    def check_only(archive: bytes, *args: Any, **kwargs: Any) -> None:
        try:
            check(archive, own)
        except CodeError as error:
            log.error("%s", error)
            # Flower then tells the server that the app was not loaded, and no more.
            raise LoadClientAppError("refused") from None

    patched: dict[str, Any] = vars(run_clientapp)
    patched["install_from_fab"] = check_only
    patched["get_project_dir"] = lambda *args, **kwargs: Path(os.devnull)
    patched["get_load_client_app_fn"] = lambda *args, **kwargs: lambda *which: app
    run_clientapp.run_clientapp(
        runtime_api_address=runtime.address,
        token=token,
        insecure=runtime.certificates is None,
        certificates=runtime.certificates,
        parent_pid=os.getppid(),
        runtime_dependency_install=False,
    )


def main(arguments: list[str]) -> None:
    """Run apps until told to stop."""
    die_with_parent()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("consilium").setLevel(logging.INFO)
    folder, address = arguments
    state = NodeState.of(HospitalFolder(Path(folder)))
    own = installed()
    for module in PRELOADED:
        importlib.import_module(module)
    from PIL import Image

    from client_app.app import app

    Image.init()  # Pillow's readers of all formats

    prompt_objects()
    prompt_retries()
    runtime = Runtime(address, state.secret, certificates=None)
    log.info("ready: %d files of installed code", len(own))
    Executor(runtime, HOSPITAL, partial(run_installed, own, app), at_once=1).run()


if __name__ == "__main__":
    main(sys.argv[1:])

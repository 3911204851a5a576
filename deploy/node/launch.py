"""``consilium hospital start``: check the house, then keep the node's processes alive."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime

from client_app.hospital_file import HospitalFile, HospitalFolder
from common.errors import ConfigError, ConsiliumError
from deploy.doctor.checkup import CHECKS, examine
from deploy.node import kits
from deploy.node.state import NodeState
from deploy.runtime.flower import environment
from deploy.runtime.ports import free_port
from deploy.runtime.supervisor import Service, Supervisor

REMOTE = {"server address", "server TLS", "server certificate", "server health", "clock", "proxy",
          "roster age"}  # fmt: skip
"""Checks that may fail for a while by nobody's fault here: a node that starts waits for them."""
SLOW = {"pictures", "split", "patients", "delta"}
"""Checks that read every picture: `consilium hospital check` makes them."""
KIT_PERIOD = 60.0
"""Seconds between two looks for a newer kit."""


def preflight(folder: HospitalFolder) -> list[str]:
    """What a person should see to, from the quick checks of this machine.

    ConfigError for what would keep the node from ever taking part.
    """
    checks = [check for check in CHECKS if check.name not in REMOTE | SLOW]
    document = examine(folder, datetime.now(UTC).replace(microsecond=0), checks)
    failed = [row for row in document["checks"] if row["status"] == "FAIL"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ConfigError(
            f"{failed[0]['name']}: {failed[0]['found']}{more}",
            f"{failed[0]['remedy']}; `consilium hospital check {folder.root}` shows everything",
        )
    warned = [row for row in document["checks"] if row["status"] == "WARN"]
    return [f"{row['name']}: {row['found']}. {row['remedy']}" for row in warned]


def start(folder: HospitalFolder, server: str, say: Callable[[str], None]) -> None:
    """Run the node in the foreground until SIGTERM or SIGINT.

    ``server``: ``HOST:PORT``, or "" for what hospital.toml and the kit say. ConfigError if the
    house is not in order or the node runs already.
    """
    os.umask(0o077)  # whatever a process of the node writes is its owner's
    state = NodeState.of(folder)
    for warning in preflight(folder):
        say(f"! {warning}")
    with state.alone():
        state.make_secret()
        file = HospitalFile.load(folder.file)
        address = server or file.address or folder.load_federation().description.address
        runtime = f"127.0.0.1:{free_port()}"
        root, surroundings = str(folder.root.absolute()), environment(state.flower_home)
        node = Service(
            "node",
            ["-m", "deploy.node.supernode", root, address, runtime.rpartition(":")[2]],
            surroundings,
            explain=explain,
        )
        apps = Service("apps", ["-m", "deploy.node.apps", root, runtime], surroundings)
        supervisor = Supervisor([node, apps], folder.root / "logs", say)
        say(f"{file.name} connects to {address}; logs are in {folder.root / 'logs'}")
        over = threading.Event()
        keeper = threading.Thread(
            target=_keep_kit, args=(folder, address, over, say), name="kit", daemon=True
        )
        keeper.start()
        try:
            supervisor.run()
        finally:
            over.set()
            keeper.join(5.0)
    say(f"{file.name} has stopped")


def _keep_kit(
    folder: HospitalFolder, address: str, over: threading.Event, say: Callable[[str], None]
) -> None:
    """Install newer kits as they come; says each trouble once."""
    told = ""
    while not over.is_set():
        try:
            for line in kits.update(folder, address):
                say(line)
            told = ""
        except ConsiliumError as error:
            if error.what != told:
                say(f"kit: {error.what}. {error.remedy}")
            told = error.what
        except Exception as error:  # a thread that dies of it would never look again
            if type(error).__name__ != told:
                say(f"kit: not looked for ({type(error).__name__})")
            told = type(error).__name__
        over.wait(KIT_PERIOD)


_MEANINGS = (
    ("[code: 2004]", "the server does not take this node: it was revoked or never admitted, or "
     "another process uses its key. Ask the coordinator; it is tried again"),
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate is not one of the kit's authority for "
     "that name: `consilium hospital check` says which"),
    ("terminated gracefully", "the node was told to stop, by the server (revoked) or from here"),
    ("not in `RUNNING` status", "the run has ended meanwhile"),
    ("Connection attempt failed", "the server does not answer; it is tried again"),
)  # fmt: skip


def explain(line: str) -> str | None:
    """What one of Flower's lines means to a hospital, where that is known."""
    return next((meaning for sign, meaning in _MEANINGS if sign in line), None)

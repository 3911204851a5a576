"""Flower's SuperLink, on loopback. ``python -m deploy.server.superlink DIR PORT``."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from deploy.runtime.flower import die_with_parent

GRACE = 4.0
"""Seconds to end by itself once whoever started it is gone."""


def arguments(root: Path, port: int) -> list[str]:
    """Of ``flower-superlink``; nothing in them is secret."""
    from deploy.server.layout import LOOPBACK, ServerFolder

    folder = ServerFolder(root)
    return [
        "--ssl-ca-certfile", str(folder.authority), "--ssl-certfile", str(folder.certificate),
        "--ssl-keyfile", str(folder.key), "--enable-supernode-auth",
        "--database", str(folder.database), "--isolation", "process",
        "--superexec-auth-secret-file", str(folder.secret),
        "--disable-runtime-dependency-installation", "--host", LOOPBACK, "--port", str(port),
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


def main() -> None:
    """Until told to stop."""
    die_with_parent()
    leave_when_alone()
    os.umask(0o077)  # Flower makes its database readable to all
    root, port = Path(sys.argv[1]), int(sys.argv[2])
    sys.argv = ["flower-superlink", *arguments(root, port)]
    from flwr.superlink.cli.flower_superlink import flower_superlink

    flower_superlink()


if __name__ == "__main__":
    main()

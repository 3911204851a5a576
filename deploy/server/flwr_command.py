"""Flower's own ``flwr``, by a server's socket: ``python -m deploy.server.flwr_command SOCKET …``.

What follows the socket is what ``flwr`` takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deploy.runtime.unix import redirect_all


def main() -> None:
    """One command; exits as it does."""
    redirect_all(Path(sys.argv[1]))
    sys.argv = ["flwr", *sys.argv[2:]]
    from flwr.cli.app import app

    app()


if __name__ == "__main__":
    main()

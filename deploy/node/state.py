"""What a node keeps in ``DIR/node``: a secret between its two processes, and how it stands.

``secret`` (0600) is what the app's process shows to the SuperNode to be given work, made anew at
each start. ``id`` is the node's number at the server, ``contact`` is touched whenever the server
has answered, ``lock`` is held by the one launcher that may run.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client_app.hospital_file import HospitalFolder
from common.errors import ConfigError, ConsiliumError
from common.files import atomic_write
from deploy.provision.files import private_folder

SILENCE = 90.0
"""Seconds without an answer of the server after which a node counts as cut off.

A node that trains is heard of by its heartbeat, each 17 to 23 s."""


@dataclass(frozen=True)
class NodeState:
    """The files in ``DIR/node``."""

    root: Path

    @classmethod
    def of(cls, folder: HospitalFolder) -> NodeState:
        """A hospital's; its folder is made."""
        return cls(private_folder(folder.root.absolute() / "node"))

    @property
    def secret(self) -> Path:
        """The file that both processes read."""
        return self.root / "secret"

    @property
    def flower_home(self) -> Path:
        """``FLWR_HOME`` of both."""
        return self.root / "flower"

    def make_secret(self) -> None:
        """A new one: 32 random bytes, in hexadecimal digits."""
        atomic_write(self.secret, secrets.token_hex(32), mode=0o600)

    def node_id(self) -> int | None:
        """The number that the server gave, or None before the first contact."""
        try:
            return int((self.root / "id").read_text())
        except (OSError, ValueError):
            return None

    def connected(self, node_id: int) -> None:
        """The server knows this node by ``node_id``."""
        atomic_write(self.root / "id", f"{node_id}\n")
        self.heard()

    def heard(self) -> None:
        """The server has answered just now."""
        (self.root / "contact").touch(mode=0o600)

    def silent_for(self) -> float | None:
        """Seconds since the server's last answer; None if there was none."""
        try:
            return max(0.0, time.time() - (self.root / "contact").stat().st_mtime)
        except OSError:
            return None

    def health(self) -> float:
        """Seconds since the server's last answer; ConsiliumError if that is too long ago."""
        silent = self.silent_for()
        if silent is None or silent > SILENCE:
            how = "at all since the start" if silent is None else f"for {silent:.0f} s"
            raise ConsiliumError(
                f"the node has not heard of the server {how}",
                f"read {self.root.parent / 'logs' / 'node.log'}, or run `consilium hospital check`",
            )
        return silent

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else starts this node meanwhile; ConfigError if somebody has."""
        with open(os.open(self.root / "lock", os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"the node of {self.root.parent} is running already",
                    "leave it, or end it first (its log is in the folder logs)",
                ) from None
            (self.root / "contact").unlink(missing_ok=True)
            yield

"""Where the server keeps what it needs, and how others find it.

```
DIR/state/               0700; may be deleted between two serves, at a price: the nodes' database
  serve.lock             held while a server runs
  control.json           where its control API is, for `consilium run`: see Server
  link.sock              0600: all that Flower's SuperLink listens on; see deploy.runtime.unix
  nodes.json             which node each hospital is; see deploy.server.registrar
  superlink.db           Flower's database: nodes, runs, messages that wait
  secret                 0600: whoever runs ServerApps must know it; new at each serve
  tls/                   authority, certificate and key of that socket; new at each serve
  logs/                  one file for each service
  flower/ flower-app/ flower-cli/   FLWR_HOME of each role
DIR/home/                $CONSILIUM_HOME of the runs: home/runs/RUN
```
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import ConfigError
from common.federation_file import read_limited, strict_json
from common.files import atomic_write, consilium_home, read_json, write_json

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServerFolder:
    """Where everything of the server lies in a coordinator's folder ``root`` (absolute)."""

    root: Path

    @property
    def state(self) -> Path:
        """What the server needs between two starts, and while it runs."""
        return self.root / "state"

    @property
    def home(self) -> Path:
        """``$CONSILIUM_HOME`` of the runs."""
        return self.root / "home"

    @property
    def lock(self) -> Path:
        """Locked while a server runs."""
        return self.state / "serve.lock"

    @property
    def control(self) -> Path:
        """Where a running server's control API is."""
        return self.state / "control.json"

    @property
    def nodes(self) -> Path:
        """Which node each hospital is."""
        return self.state / "nodes.json"

    @property
    def database(self) -> Path:
        """Flower's."""
        return self.state / "superlink.db"

    @property
    def secret(self) -> Path:
        """Hexadecimal; whoever runs ServerApps must know it."""
        return self.state / "secret"

    @property
    def tls(self) -> Path:
        """Folder of the loopback's own authority and certificate."""
        return self.state / "tls"

    @property
    def authority(self) -> Path:
        """The loopback's authority."""
        return self.tls / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The SuperLink's certificate on loopback."""
        return self.tls / "superlink.crt"

    @property
    def key(self) -> Path:
        """The key of :attr:`certificate`."""
        return self.tls / "superlink.key"

    @property
    def logs(self) -> Path:
        """A log file for each service."""
        return self.state / "logs"

    def flower_home(self, role: str) -> Path:
        """``FLWR_HOME`` of ``role``: each has its own."""
        return self.state / role


@dataclass(frozen=True)
class Server:
    """A running server, as ``control.json`` has it."""

    socket: str
    """Path of the Unix socket that the control API is on."""
    authority: str
    """Path of the certificate that the control API's is checked against."""
    gate_host: str
    gate_port: int
    pid: int
    version: int = 2

    def write(self, path: Path) -> None:
        """Tell others."""
        write_json(path, asdict(self), mode=0o600)

    @classmethod
    def read(cls, path: Path) -> Server:
        """ConfigError where no server has told where it is."""
        if not path.exists():
            raise ConfigError(
                f"no server runs for {path.parent.parent}",
                f"start it: consilium federation serve {path.parent.parent}",
            )
        document = strict_json(read_limited(path), str(path), "start the server again")
        try:
            return cls(**document)
        except TypeError:
            raise ConfigError(f"{path} is malformed", "start the server again") from None


@contextmanager
def only_server(folder: ServerFolder) -> Iterator[None]:
    """Be the one server of ``folder``; ConfigError if there is one. A dead one holds no lock."""
    descriptor = os.open(folder.lock, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = file.read(20).strip()
            raise ConfigError(
                f"a server runs for {folder.root} already (process {pid or 'unknown'})",
                "use that one, or stop it first (SIGTERM, or Ctrl-C where it runs)",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def remember(name: str, folder: Path) -> None:
    """Let ``consilium run --federation NAME`` find ``folder``."""
    write_json(_known(name), {"folder": str(folder)})


def find(federation: str) -> Path:
    """The folder (absolute) of a federation: a path, or the name of one that was served here."""
    path = Path(federation).expanduser()
    if (path / "federation.toml").exists():
        return path.resolve()
    known = _known(federation)
    if "/" not in federation and known.exists():
        return Path(str(read_json(known)["folder"]))
    raise ConfigError(
        f"{federation!r} is neither a federation's folder nor the name of one that was served here",
        "give the folder of `consilium federation init`",
    )


def _known(name: str) -> Path:
    return consilium_home() / "federations" / f"{name}.json"


def write_private(path: Path, content: bytes | str) -> None:
    """A file that only its owner reads."""
    atomic_write(path, content, mode=0o600)

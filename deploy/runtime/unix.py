"""A Unix socket between processes of one account, where a TCP port would be every account's.

Any account of a machine may connect to a port of its loopback; a socket in the file system answers
whoever its mode and its folder let in (unix(7)). Flower 1.41 has no setting for it: here its server
is given a socket to listen on, and its clients one to connect to. tests/deploy/runtime/test_unix.py
hold what is replaced.
"""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from common.errors import ConfigError

if TYPE_CHECKING:
    from flwr.supercore.protobuf.client import ProtobufClient

NOWHERE = "localhost:1"
"""Where Flower's clients are told that the server is: a name for TLS; the socket is what counts."""


@contextmanager
def place(folder: Path, name: str) -> Iterator[Path]:
    """A path for a socket that only this account reaches, and none there: in ``folder`` (0700).

    Where that cannot be, since the path is too long for a socket (107 bytes on Linux) or the file
    system has none (some shared folders of virtual machines), in a temporary folder of its own
    (0700), which goes at the end. ConfigError if there is no place at all.
    """
    path = folder / name
    if _possible(path):
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory(prefix="consilium-") as other:  # 0700: mkdtemp's
        if not _possible(Path(other) / name):
            raise ConfigError(
                f"no Unix socket can be made, neither in {folder} nor in {other}",
                "set TMPDIR to a folder with a short path on a local disk",
            )
        yield Path(other) / name


def listening(path: Path) -> socket.socket:
    """A socket bound to ``path`` that its owner alone may connect to; what lay there is replaced.

    OSError where it cannot be.
    """
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)  # from the first moment on: a chmod alone would come too late
    try:
        made.bind(str(path))
        path.chmod(0o600)
    except BaseException:
        made.close()
        raise
    finally:
        os.umask(before)
    return made


def _possible(path: Path) -> bool:
    try:
        listening(path).close()
    except OSError:
        return False
    with suppress(OSError):
        path.unlink()
    return True


def redirect(client: ProtobufClient, path: Path, verify: ssl.SSLContext | str | bool) -> None:
    """Have one of Flower's clients connect to the socket at ``path``, and never to its address.

    ``verify``: as httpx has it. RuntimeError if Flower's client is another than we know.
    """
    before = getattr(client, "_client", None)
    if not isinstance(before, httpx.Client):
        raise RuntimeError("Flower's ProtobufClient has no httpx client any more")
    client._client = httpx.Client(
        # With a transport of its own no proxy of the environment is asked.
        transport=httpx.HTTPTransport(uds=str(path), verify=verify),
        timeout=before.timeout,
        follow_redirects=False,
    )
    before.close()


def redirect_all(path: Path) -> None:
    """The same for every client that Flower makes in this process from now on."""
    from flwr.supercore.protobuf.client import ProtobufClient

    make = ProtobufClient.__init__

    def made(self: ProtobufClient, base_url: str, **rest: Any) -> None:
        make(self, base_url, **rest)
        redirect(self, path, rest.get("verify", True))

    ProtobufClient.__init__ = made  # type: ignore[method-assign]

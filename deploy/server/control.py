"""Flower's control API: the nodes that may connect, the runs and their logs.

The one place that knows its messages (Flower 1.41; tests/deploy/server holds them). It has no
authentication, which is why it is on a socket of the coordinator's account alone
(:mod:`deploy.runtime.unix`), on no port, and not behind the gate.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
)
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StopRunRequest,
    StreamLogsRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from common.errors import ConfigError
from deploy.provision.keys import node_line, read_node_line
from deploy.runtime import unix
from deploy.server.layout import Server


@dataclass(frozen=True)
class Node:
    """A node that the SuperLink knows."""

    id: int
    key: str
    """One line of OpenSSH; "" for a key of another kind than ours."""
    gone: bool
    """Whether it was unregistered: its key is never taken again."""
    status: str
    """Flower's: ``registered``, ``online``, ``offline`` or ``unregistered``."""


@dataclass(frozen=True)
class Status:
    """How a run stands."""

    text: str
    """Such as ``running`` or ``finished:completed``."""
    details: str

    @property
    def ended(self) -> bool:
        """Whether nothing will change any more."""
        return self.text.startswith("finished")


class Control:
    """Calls of the control API. Each may raise ``httpx.HTTPError`` while nobody answers."""

    def __init__(self, address: str, authority: bytes | None, socket: Path | None = None) -> None:
        """``authority``: PEM of the certificate to check against; None: without TLS.

        ``socket``: the Unix socket to connect to, whatever ``address`` says; None: by TCP.
        """
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=authority is None,
            root_certificates=authority,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )
        if socket is not None:
            verify = authority is not None and _trusting(authority)
            unix.redirect(self._client, socket, verify)

    @classmethod
    def of(cls, server: Server) -> Self:
        """Of a server that ``control.json`` tells of."""
        try:
            authority = Path(server.authority).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{server.authority} cannot be read ({error.strerror})", "start the server again"
            ) from None
        return cls(unix.NOWHERE, authority, Path(server.socket))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def nodes(self) -> list[Node]:
        """All nodes that ever were, those that were unregistered included."""
        answer = self._client.ListNodes(ListNodesRequest())
        return [
            Node(n.node_id, _line(n.public_key), n.status == "unregistered", n.status)
            for n in answer.nodes_info
        ]

    def register(self, name: str, key: str) -> int | None:
        """Let a node connect under ``key`` (OpenSSH); its id, or None if the key is in use."""
        pem = read_node_line(key).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        try:
            answer = self._client.RegisterNode(RegisterNodeRequest(public_key=pem, name=name))
        except httpx.HTTPStatusError as error:
            if _code(error) == ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                return None
            raise
        return int(answer.node_id)

    def unregister(self, node: int) -> None:
        """Let the node connect no more, for ever; nothing happens if it is gone already."""
        try:
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))
        except httpx.HTTPStatusError as error:
            if _code(error) != ApiErrorCode.NODE_NOT_FOUND:
                raise

    def status(self, run: int) -> Status | None:
        """How a run stands; None if there is no such run."""
        try:
            answer = self._client.ListRuns(ListRunsRequest(run_id=run))
        except httpx.HTTPStatusError as error:
            if _code(error) == ApiErrorCode.RUN_ID_NOT_FOUND:
                return None
            raise
        found = answer.run_dict[run].status
        text = f"{found.status}:{found.sub_status}" if found.sub_status else found.status
        return Status(text, found.details)

    def stop(self, run: int) -> bool:
        """Stop a run; whether it was stopped."""
        try:
            return bool(self._client.StopRun(StopRunRequest(run_id=run)).success)
        except httpx.HTTPStatusError as error:
            if _code(error) is None:
                raise
            return False

    def log(self, run: int, after: float) -> Iterator[tuple[str, float]]:
        """Pieces of a run's log, each with the time to go on ``after``; ends when the run ends."""
        for piece in self._client.StreamLogs(StreamLogsRequest(run_id=run, after_timestamp=after)):
            yield piece.log_output, piece.latest_timestamp


def _trusting(authority: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.decode("ascii"))
    return context


def _code(error: httpx.HTTPStatusError) -> int | None:
    """Flower's code of what went wrong, if it gave one."""
    with suppress(httpx.HTTPError):
        error.response.read()
    found = FlowerError.from_json(error.response.text)
    return None if found is None else found.code


def _line(pem: bytes) -> str:
    try:
        key = load_pem_public_key(pem)
    except ValueError:
        return ""
    return node_line(key) if isinstance(key, EllipticCurvePublicKey) else ""

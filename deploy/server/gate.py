"""The one port that hospitals reach: ``python -m deploy.server.gate DIR HOST PORT SUPERLINK_PORT``.

It ends the federation's TLS and lets through three things: ``POST /v1/fleet/*`` and
``GET /health`` go to the SuperLink on loopback, over TLS of its own; ``GET /v1/consilium/kit`` is
answered here (:mod:`deploy.server.kits`). Everything else is 404: the SuperLink's one port also
serves the control API, which asks nobody who they are.

Bodies are passed on as they come, so memory does not grow with them. Nothing of a request is
logged. Any trouble is 502 or 503, never 500: a SuperNode tries again after those two, and
hangs after any other (docs/flower.md, §0).
"""

from __future__ import annotations

import asyncio
import re
import ssl
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.provision.federation import FederationFolder
from deploy.runtime.flower import die_with_parent
from deploy.runtime.kit_request import PATH as KIT
from deploy.server.kits import Kits
from deploy.server.layout import LOOPBACK, ServerFolder
from deploy.server.superlink import leave_when_alone

MOST_BYTES = 8 * 1024 * 1024
"""Of a request's body. Flower sends 5 MiB at once, and a little around it."""
MOST_CONNECTIONS, MOST_FORWARDED = 2000, 200
HEADER_SECONDS, PIECE_SECONDS, REQUEST_SECONDS = 20.0, 30.0, 300.0
"""To send a request's head; to send or take the next piece of a body; for all of it."""
RELOAD_SECONDS = 2.0
_FLEET = re.compile(r"/v1/fleet/[a-z-]{1,64}")
_HOP_BY_HOP = frozenset({
    "connection", "content-length", "expect", "host", "keep-alive", "proxy-authenticate",
    "proxy-authorization", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
"""RFC 9110, 7.6.1, and what the next connection says anew."""


class _TooLarge(Exception):
    pass


class Gate:
    """The ASGI application."""

    def __init__(self, superlink: httpx.AsyncClient, kits: Kits) -> None:
        self._superlink, self._kits = superlink, kits
        self._forwarded = asyncio.Semaphore(MOST_FORWARDED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        begun = False

        async def noting(message: Any) -> None:
            nonlocal begun
            begun = True
            await asyncio.wait_for(send(message), PIECE_SECONDS)

        answer: Response | None = None
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                answer = await self._answer(Request(scope, receive), noting)
        except ClientDisconnect:
            return
        except _TooLarge:
            answer = _text("the request is too large", 413)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            answer = _text("the SuperLink is away", 503)
        except (httpx.HTTPError, TimeoutError):
            answer = _text("no answer in time", 502)
        except Exception as error:
            print(f"a request failed ({type(error).__name__})", flush=True)
            answer = _text("no answer", 502)
        # An answer that broke off is left so: the connection is closed, and whoever asked sees it.
        if answer is not None and not begun:
            with suppress(Exception):
                await answer(scope, receive, noting)

    async def _answer(self, request: Request, send: Send) -> Response | None:
        method, path = request.method, request.scope["path"]
        if method == "GET" and path == KIT:
            return await asyncio.to_thread(self._kits.answer, dict(request.headers))
        if (method == "POST" and _FLEET.fullmatch(path)) or (method, path) == ("GET", "/health"):
            if self._forwarded.locked():
                return _text("too many requests at once", 503)
            async with self._forwarded:
                await self._forward(request, path, send)
            return None
        return _text("not found", 404)

    async def _forward(self, request: Request, path: str, send: Send) -> None:
        headers = list(passed_on(request.headers.items()))
        length = request.headers.get("content-length", "")
        if length:
            if not length.isdigit() or int(length) > MOST_BYTES:
                raise _TooLarge
            headers.append(("content-length", length))
        body = _limited(request) if request.method == "POST" else None
        asked = self._superlink.build_request(request.method, path, headers=headers, content=body)
        reply = await self._superlink.send(asked, stream=True)
        try:
            status = reply.status_code
            if status >= 500 and status not in (502, 503, 504):
                status = 502
            fields = [(k.encode(), v.encode("latin-1")) for k, v in passed_on(reply.headers.items())
                      if k != "date"]  # fmt: skip
            if "content-length" in reply.headers:
                fields.append((b"content-length", reply.headers["content-length"].encode()))
            await send({"type": "http.response.start", "status": status, "headers": fields})
            async for piece in reply.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await reply.aclose()


def passed_on(headers: Iterable[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    """The headers that are not about one connection only."""
    pairs = [(name.lower(), value) for name, value in headers]
    named = {part.strip().lower() for name, value in pairs if name == "connection"
             for part in value.split(",")}  # fmt: skip
    return [(n, v) for n, v in pairs if n not in _HOP_BY_HOP and n not in named]


async def _limited(request: Request) -> AsyncIterator[bytes]:
    """The body, piece by piece; _TooLarge once it is."""
    size = 0
    pieces = aiter(request.stream())
    while True:
        try:
            piece = await asyncio.wait_for(anext(pieces), PIECE_SECONDS)
        except StopAsyncIteration:
            return
        size += len(piece)
        if size > MOST_BYTES:
            raise _TooLarge
        if piece:
            yield piece


def _text(text: str, status: int) -> Response:
    return PlainTextResponse(text + "\n", status)


class Impatient(H11Protocol):
    """HTTP/1.1 whose requests' heads must come soon: uvicorn alone waits for ever."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEADER_SECONDS, self._late)

    def data_received(self, data: bytes) -> None:
        """As uvicorn's."""
        super().data_received(data)
        between = self.cycle is None or self.cycle.response_complete
        if between and self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._late)
        elif not between:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's."""
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


async def _reload(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """Take a renewed certificate for new connections as soon as it is there."""
    before = _stamp(certificate, key)
    while True:
        await asyncio.sleep(RELOAD_SECONDS)
        if (after := _stamp(certificate, key)) == before:
            continue
        before = after
        try:
            context.load_cert_chain(certificate, key)
            print("the renewed certificate is in use", flush=True)
        except (OSError, ssl.SSLError):
            print("! the new certificate cannot be used; the old one stays", flush=True)


def _stamp(*paths: Path) -> list[tuple[int, int] | None]:
    stamps: list[tuple[int, int] | None] = []
    for path in paths:
        try:
            stat = path.stat()
            stamps.append((stat.st_mtime_ns, stat.st_ino))
        except OSError:
            stamps.append(None)
    return stamps


async def serve(root: Path, host: str, port: int, superlink_port: int) -> None:
    """Until SIGTERM or SIGINT."""
    folder, federation = ServerFolder(root), FederationFolder(root)
    inside = ssl.create_default_context(cafile=str(folder.authority))
    superlink = httpx.AsyncClient(
        base_url=f"https://{LOOPBACK}:{superlink_port}",
        verify=inside,
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(connect=5.0, read=120.0, write=PIECE_SECONDS, pool=10.0),
        # Sooner than the SuperLink, which closes idle connections after 5 s.
        limits=httpx.Limits(max_connections=MOST_FORWARDED, keepalive_expiry=2.0),
        headers={"accept-encoding": "identity"},
    )
    config = uvicorn.Config(
        Gate(superlink, Kits(federation, lambda line: print(line, flush=True))),
        host=host,
        port=port,
        http=Impatient,
        ws="none",
        lifespan="off",
        ssl_certfile=str(federation.server),
        ssl_keyfile=str(federation.server_key),
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
    )
    config.load()
    assert config.ssl is not None  # a certificate was named
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    async with superlink, _beside(_reload(config.ssl, federation.server, federation.server_key)):
        await uvicorn.Server(config).serve()


@asynccontextmanager
async def _beside(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def main() -> None:
    """Until told to stop."""
    die_with_parent()
    leave_when_alone()
    root, host, port, superlink_port = sys.argv[1:]
    asyncio.run(serve(Path(root), host, int(port), int(superlink_port)))


if __name__ == "__main__":
    main()

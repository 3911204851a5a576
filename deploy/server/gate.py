"""The one port that hospitals reach: ``python -m deploy.server.gate DIR HOST PORT SOCKET``.

It ends the federation's TLS and lets through three things: ``POST /v1/fleet/*``, signed by a
member's node (:mod:`deploy.server.callers`), and ``GET /health`` go to the SuperLink by its Unix
``SOCKET``; ``GET /v1/consilium/kit`` is answered here (:mod:`deploy.server.kits`). Everything else
is 404: the SuperLink also serves the control API, which asks nobody who they are.

**What somebody without a member's key can take up** is bounded before anything is spent on it:
connections (:mod:`deploy.server.door`), no body and no slot at all, one question at a time to the
SuperLink for all who ask for ``/health``, a few threads for kits, and a line of the log now and
then. A member's node has at most :data:`MOST_OF_ONE` calls passed on at once.

Bodies are passed on as they come, so memory does not grow with them. Nothing of a request is
logged. Any trouble is 502 or 503, never 500: a SuperNode tries again after those two, and
hangs after any other (docs/flower.md, §0).
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.error.catalog import API_ERROR_MAP
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.provision.federation import FederationFolder
from deploy.runtime.flower import die_with_parent
from deploy.runtime.kit_request import PATH as KIT
from deploy.runtime.limits import raise_open_files
from deploy.runtime.seldom import Seldom, SeldomFilter
from deploy.runtime.unix import NOWHERE
from deploy.server.callers import Callers, NotReady, Unknown
from deploy.server.door import NEWCOMERS, NEWCOMERS_OF_ONE, Door, Guest, Guests, listen
from deploy.server.kits import Kits
from deploy.server.layout import ServerFolder
from deploy.server.superlink import leave_when_alone

MOST_BYTES = 8 * 1024 * 1024
"""Of a request's body. Flower sends 5 MiB at once, and a little around it."""
MOST_FORWARDED, MOST_OF_ONE, MOST_KITS = 200, 24, 4
"""Calls that are passed on at once, those of one member's key among them, and kits."""
HEADER_SECONDS, PIECE_SECONDS, BODY_SECONDS, REQUEST_SECONDS = 10.0, 30.0, 120.0, 300.0
"""For all of a request's head; to send or take the next piece of a body; for all of a request's
body; for request and answer."""
TURN_SECONDS = 20.0
"""That a member's call waits for one of the above."""
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

    def __init__(
        self,
        superlink: httpx.AsyncClient,
        kits: Kits,
        callers: Callers,
        guests: Guests | None = None,
    ) -> None:
        """``guests``: whoever is connected; told who of them is a member."""
        self._superlink, self._kits, self._callers = superlink, kits, callers
        self._guests = Guests() if guests is None else guests
        self._say = Seldom(lambda line: print(line, flush=True))
        self._forwarded = asyncio.Semaphore(MOST_FORWARDED)
        self._of_one: dict[str, asyncio.Semaphore] = {}
        self._kits_at_once = asyncio.Semaphore(MOST_KITS)
        self._health: asyncio.Task[Response] | None = None

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
            self._say(f"a request failed ({type(error).__name__})")
            answer = _text("no answer", 502)
        # An answer that broke off is left so: the connection is closed, and whoever asked sees it.
        if answer is not None and not begun:
            with suppress(Exception):
                await answer(scope, receive, noting)

    async def _answer(self, request: Request, send: Send) -> Response | None:
        method, path = request.method, request.scope["path"]
        if method == "GET" and path == KIT:
            async with self._kits_at_once:
                return await asyncio.to_thread(self._kits.answer, dict(request.headers))
        if (method, path) == ("GET", "/health"):
            return await self._healthy()
        if method != "POST" or not _FLEET.fullmatch(path):
            return _closing(_text("not found", 404))
        try:
            key = self._callers.verify(request.headers)
        except NotReady:
            return _closing(_text("the server is just starting", 503))
        except Unknown:
            self._say("a call was refused: it is not signed, in time, by a node that may connect")
            return _closing(_refusal(path))
        guest = request.scope.get("state", {}).get("guest")
        if guest is not None:
            self._guests.recognise(guest, key)
        mine = self._of_one.setdefault(key, asyncio.Semaphore(MOST_OF_ONE))
        try:
            await asyncio.wait_for(_both(mine, self._forwarded), TURN_SECONDS)
        except TimeoutError:
            return _closing(_text("too many requests at once", 503))
        try:
            await self._forward(request, path, send)
        finally:
            self._forwarded.release()
            mine.release()
        return None

    async def _healthy(self) -> Response:
        """What the SuperLink says now: it is asked once for all who are waiting to hear it."""
        if self._health is None or self._health.done():
            self._health = asyncio.create_task(self._ask_health())
            self._health.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._health)

    async def _ask_health(self) -> Response:
        reply = await self._superlink.get("/health")
        kind = reply.headers.get("content-type")
        return Response(reply.content, _status(reply.status_code), media_type=kind)

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
            status = _status(reply.status_code)
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
    """The body, piece by piece; _TooLarge once it is, TimeoutError once it has taken too long."""
    size = 0
    pieces = aiter(request.stream())
    loop = asyncio.get_running_loop()
    end = loop.time() + BODY_SECONDS
    while True:
        try:
            patience = min(PIECE_SECONDS, end - loop.time())
            piece = await asyncio.wait_for(anext(pieces), patience)
        except StopAsyncIteration:
            return
        size += len(piece)
        if size > MOST_BYTES:
            raise _TooLarge
        if piece:
            yield piece


async def _both(first: asyncio.Semaphore, second: asyncio.Semaphore) -> None:
    """Acquire both, or neither."""
    await first.acquire()
    try:
        await second.acquire()
    except BaseException:
        first.release()
        raise


def _status(status: int) -> int:
    """What a SuperNode may see: it hangs after a 500."""
    return 502 if status >= 500 and status not in (502, 503, 504) else status


def _text(text: str, status: int) -> Response:
    return PlainTextResponse(text + "\n", status)


def _closing(response: Response) -> Response:
    """The connection ends with it: whatever body still comes is not read."""
    response.headers["connection"] = "close"
    return response


_REFUSALS = {
    "/v1/fleet/activate-node": ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED,
    "/v1/fleet/register-node": ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED,
}


def _refusal(path: str) -> Response:
    """What the SuperLink itself would say to a node that it does not know."""
    if path not in _REFUSALS:
        return JSONResponse({"detail": "Invalid SuperNode authentication"}, 401)
    code = _REFUSALS[path]
    said = API_ERROR_MAP[code]
    return JSONResponse({"code": code, "detail": said.public_message}, said.http_status_code)


class Impatient(H11Protocol):
    """HTTP/1.1 whose requests' heads must come soon: uvicorn alone waits for ever.

    ``app_state`` may have ``guest`` and ``guests``: who is connected, and all who are.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's."""
        super().connection_made(transport)
        if (guest := self.app_state.get("guest")) is not None:
            guest.end = transport.abort
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
        if (guest := self.app_state.get("guest")) is not None:
            self.app_state["guests"].leave(guest)
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


class _Server(uvicorn.Server):
    """uvicorn's, which is handed connections by a door instead of accepting them itself."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket, guests: Guests) -> None:
        super().__init__(config)
        assert config.ssl is not None  # a certificate was named
        self._listener, self._guests = listener, guests
        self._door = Door(listener, config.ssl, guests, self._protocol)
        self._open: asyncio.Task[None] | None = None

    def _protocol(self, guest: Guest) -> asyncio.Protocol:
        state = {"guest": guest, "guests": self._guests}
        return Impatient(self.config, self.server_state, state)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        await super().startup(sockets=[])
        self._open = asyncio.create_task(self._door.run())
        self._open.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():  # nobody gets in any more: let the supervisor begin anew
            print(f"! the gate accepts no more ({type(task.exception()).__name__})", flush=True)
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        if self._open is not None:
            self._open.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._open
        self._listener.close()
        await super().shutdown(sockets=[])


async def serve(root: Path, host: str, port: int, socket_path: Path) -> None:
    """Until SIGTERM or SIGINT."""
    folder, federation = ServerFolder(root), FederationFolder(root)
    inside = ssl.create_default_context(cafile=str(folder.authority))
    superlink = httpx.AsyncClient(
        base_url=f"https://{NOWHERE}",
        transport=httpx.AsyncHTTPTransport(
            uds=str(socket_path),
            verify=inside,
            # One more, for /health. Sooner than the SuperLink, which closes idle ones after 5 s.
            limits=httpx.Limits(max_connections=MOST_FORWARDED + 1, keepalive_expiry=2.0),
        ),
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(connect=5.0, read=120.0, write=PIECE_SECONDS, pool=10.0),
        headers={"accept-encoding": "identity"},
    )
    guests = Guests(*room(raise_open_files()))
    kits = Kits(federation, lambda line: print(line, flush=True))
    try:
        listener = listen(host, port)
    except OSError as error:
        sys.exit(f"the gate cannot listen on {host}, port {port}: {error}")
    config = uvicorn.Config(
        Gate(superlink, kits, Callers(folder.nodes), guests),
        http=Impatient,
        ws="none",
        lifespan="off",
        ssl_certfile=str(federation.server),
        ssl_keyfile=str(federation.server_key),
        access_log=False,
        log_level="warning",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
    )
    config.load()
    assert config.ssl is not None  # a certificate was named
    config.ssl.minimum_version = ssl.TLSVersion.TLSv1_2
    quiet()
    async with superlink, _beside(_reload(config.ssl, federation.server, federation.server_key)):
        await _Server(config, listener, guests).serve()


def room(descriptors: int) -> tuple[int, int]:
    """The most newcomers in all and of one address, where so many descriptors may be open.

    A quarter of them, so that members' connections and those to the SuperLink find some.
    """
    newcomers = max(16, min(NEWCOMERS, descriptors // 4))
    return newcomers, max(8, min(NEWCOMERS_OF_ONE, newcomers // 4))


def quiet() -> None:
    """Let nobody fill the log with what a library says of their connections."""
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(SeldomFilter())
    say = Seldom(lambda line: print(line, flush=True))

    def failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        say(f"a connection failed ({type(error).__name__ if error else context['message']})")

    asyncio.get_running_loop().set_exception_handler(failed)


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
    root, host, port, path = sys.argv[1:]
    asyncio.run(serve(Path(root), host, int(port), Path(path)))


if __name__ == "__main__":
    main()

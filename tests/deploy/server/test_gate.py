"""What the gate makes of a SuperLink that does wrong, and of clients that do nothing.

The SuperLink is a stand-in here: the real one (test_serve) cannot be made to fail so.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

from deploy.provision.federation import FederationFolder
from deploy.runtime.ports import free_port
from deploy.server import gate
from deploy.server.gate import Gate, Impatient, passed_on
from deploy.server.kits import Kits
from tests.deploy.server.conftest import until

Answer = Callable[[httpx.Request], httpx.Response]


def ask(answer: Answer, method: str = "POST", path: str = "/v1/fleet/x", **more: object) -> object:
    async def through() -> httpx.Response:
        kits = Kits(FederationFolder(Path("nowhere")), lambda line: None)
        inside = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="https://in")
        transport = httpx.ASGITransport(app=Gate(inside, kits))
        async with inside, httpx.AsyncClient(transport=transport, base_url="https://out") as client:
            return await client.request(method, path, **more)  # type: ignore[arg-type]

    return asyncio.run(through())


@given(st.integers(200, 599))
def test_a_node_never_sees_a_500(status: int) -> None:
    answer = ask(lambda request: httpx.Response(status, stream=httpx.ByteStream(b"said")))
    assert isinstance(answer, httpx.Response)
    retried = status >= 500 and status not in (502, 503, 504)
    assert answer.status_code == (502 if retried else status)
    assert answer.content == b"said"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (httpx.ConnectError("x"), 503), (httpx.ConnectTimeout("x"), 503),
        (httpx.PoolTimeout("x"), 503), (httpx.ReadTimeout("x"), 502), (httpx.ReadError("x"), 502),
        (httpx.RemoteProtocolError("x"), 502), (ValueError("x"), 502), (RuntimeError("x"), 502),
    ],
)  # fmt: skip
def test_whatever_goes_wrong_is_tried_again(error: Exception, status: int) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise error

    answer = ask(fail)
    assert isinstance(answer, httpx.Response) and answer.status_code == status


def test_an_answer_that_takes_too_long_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "REQUEST_SECONDS", 0.1)

    async def slow(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(5)
        return httpx.Response(200)

    answer = ask(slow)  # type: ignore[arg-type]
    assert isinstance(answer, httpx.Response) and answer.status_code == 502


def test_what_is_signed_and_said_reaches_the_other_side_and_hop_by_hop_does_not() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        headers = {"x-said": "1", "connection": "x-hop", "x-hop": "1"}
        return httpx.Response(200, headers=headers, stream=httpx.ByteStream(b""))

    said = {"flwr-signature": "s", "x-hop": "1", "connection": "x-hop, close", "upgrade": "h2c"}
    back = ask(answer, content=b"body", headers=said)
    assert isinstance(back, httpx.Response)
    (request,) = seen
    assert request.headers["flwr-signature"] == "s" and request.content == b"body"
    assert request.headers["host"] == "in" and request.headers["content-length"] == "4"
    assert not {"x-hop", "upgrade"} & set(request.headers)
    assert back.headers["x-said"] == "1" and "x-hop" not in back.headers


@given(st.lists(st.tuples(st.sampled_from(["Host", "TE", "x-a", "X-B", "Connection"]),
                          st.sampled_from(["x-a", "close", "", "X-B"]))))  # fmt: skip
def test_no_header_is_made_up_and_none_that_is_named_is_passed_on(
    headers: list[tuple[str, str]],
) -> None:
    passed = list(passed_on(headers))
    named = {value.lower() for name, value in headers if name == "Connection"}
    assert passed == [(n.lower(), v) for n, v in headers
                      if n.lower() in {"x-a", "x-b"} - named]  # fmt: skip


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A port on which somebody listens who waits half a second for a request's head."""
    monkeypatch.setattr(gate, "HEADER_SECONDS", 0.5)
    port = free_port()
    config = uvicorn.Config(
        PlainTextResponse("ok"), host="127.0.0.1", port=port, http=Impatient, ws="none",
        lifespan="off", log_level="error", timeout_keep_alive=30,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield port
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"])
@pytest.mark.parametrize("then", [b"GET / HT", b"GET / HTTP/1.1\r\nx: "])
def test_who_sends_no_whole_request_is_cut_off(impatient: int, first: bytes, then: bytes) -> None:
    with socket.create_connection(("127.0.0.1", impatient), timeout=5) as connection:
        if first:
            connection.sendall(first)
            assert connection.recv(1000)
        begun = time.monotonic()
        connection.sendall(then)
        with suppress(ConnectionResetError):
            while connection.recv(1000):
                pass
        assert 0.3 < time.monotonic() - begun < 3


def test_who_sends_whole_requests_is_not(impatient: int) -> None:
    with httpx.Client(trust_env=False) as client:
        for _ in range(4):
            assert client.get(f"http://127.0.0.1:{impatient}/").status_code == 200
            time.sleep(0.2)

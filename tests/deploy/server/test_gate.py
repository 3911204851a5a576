"""What the gate makes of a SuperLink that does wrong, and of clients that do nothing.

The SuperLink is a stand-in here: the real one (test_serve) cannot be made to fail so.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, generate_private_key
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

from common.files import write_json
from deploy.provision.federation import FederationFolder
from deploy.provision.keys import node_line
from deploy.runtime.ports import free_port
from deploy.server import gate
from deploy.server.callers import Callers
from deploy.server.gate import Gate, Impatient, passed_on
from deploy.server.kits import Kits
from tests.deploy.server.conftest import signed, until

Answer = Callable[[httpx.Request], httpx.Response]


def ok() -> httpx.Response:
    return httpx.Response(200, stream=httpx.ByteStream(b""))


NODES = [generate_private_key(SECP384R1()) for _ in range(2)]
"""Keys of nodes that may connect."""


@asynccontextmanager
async def gate_before(
    answer: Answer, table: Path | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gate that lets ``NODES`` through, to ``answer``."""
    with TemporaryDirectory() as folder:
        nodes = Path(folder) / "nodes.json"
        rows = {str(i): {"node-id": str(i), "key": node_line(key.public_key())}
                for i, key in enumerate(NODES)}  # fmt: skip
        write_json(nodes, {"version": 1, "nodes": rows})
        kits = Kits(FederationFolder(Path("nowhere")), lambda line: None)
        inside = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="https://in")
        transport = httpx.ASGITransport(app=Gate(inside, kits, Callers(table or nodes)))
        async with inside, httpx.AsyncClient(transport=transport, base_url="https://out") as client:
            yield client


def ask(answer: Answer, method: str = "POST", path: str = "/v1/fleet/x", **more: object) -> object:
    async def through() -> httpx.Response:
        async with gate_before(answer) as client:
            client.headers.update(signed(NODES[0]))
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

    said = signed(NODES[0])
    said |= {"x-hop": "1", "connection": "x-hop, close", "upgrade": "h2c"}
    back = ask(answer, content=b"body", headers=said)
    assert isinstance(back, httpx.Response)
    (request,) = seen
    assert (
        request.headers["flwr-signature"] == said["flwr-signature"] and request.content == b"body"
    )
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


def test_a_call_that_no_members_node_signed_is_refused_before_its_body_is_read() -> None:
    seen: list[httpx.Request] = []
    read: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return ok()

    async def body() -> AsyncIterator[bytes]:
        for _ in range(3):
            read.append(b"x")
            yield b"x"

    good, stranger = signed(NODES[0]), signed(generate_private_key(SECP384R1()))
    old = signed(NODES[0], datetime.now(UTC) - timedelta(seconds=400))
    early = signed(NODES[0], datetime.now(UTC) + timedelta(seconds=60))
    mixed = good | {"flwr-public-key": signed(NODES[1])["flwr-public-key"]}
    refused: list[dict[str, str]] = [
        {}, stranger, old, early, mixed, good | {"flwr-signature": "AAAA"},
        good | {"flwr-signature": "*"}, good | {"flwr-timestamp": "now"},
        good | {"flwr-timestamp": "9" * 2000}, good | {"flwr-public-key": "A" * 100_000},
        {name: value for name, value in good.items() if name != "flwr-timestamp"},
    ]  # fmt: skip

    async def through() -> None:
        async with gate_before(answer) as client:
            for headers in refused:
                reply = await client.post("/v1/fleet/x", headers=headers, content=body())
                assert reply.status_code == 401 and reply.headers["connection"] == "close"
            told = await client.post("/v1/fleet/activate-node", headers=stranger)
            assert told.status_code == 412 and told.json()["code"] == 2004  # as the SuperLink's
            told = await client.post("/v1/fleet/register-node")
            assert told.status_code == 412 and told.json()["code"] == 2001
            assert not seen and not read
            for headers in (good, signed(NODES[1])):
                assert (await client.post("/v1/fleet/x", headers=headers)).status_code == 200

    asyncio.run(through())
    assert len(seen) == 2


def test_until_the_members_are_known_every_node_is_told_to_try_again() -> None:
    async def through() -> httpx.Response:
        async with gate_before(lambda request: ok(), Path("nowhere")) as client:
            return await client.post("/v1/fleet/x", headers=signed(NODES[0]))

    assert asyncio.run(through()).status_code == 503


def test_one_members_node_cannot_hold_all_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MOST_FORWARDED", 4)
    monkeypatch.setattr(gate, "MOST_OF_ONE", 3)
    monkeypatch.setattr(gate, "TURN_SECONDS", 0.2)
    held: list[str] = []

    async def through() -> None:
        free = asyncio.Event()

        async def answer(request: httpx.Request) -> httpx.Response:
            if request.url.path == "/v1/fleet/slow":
                held.append(request.url.path)
                await free.wait()
            return ok()

        async with gate_before(answer) as client:  # type: ignore[arg-type]
            greedy, modest = signed(NODES[0]), signed(NODES[1])
            calls = [asyncio.create_task(client.post("/v1/fleet/slow", headers=greedy))
                     for _ in range(5)]  # fmt: skip
            while len(held) < 3:
                await asyncio.sleep(0.01)
            assert (await client.post("/v1/fleet/x", headers=modest)).status_code == 200
            assert (await client.get("/health")).status_code == 200
            done, waiting = await asyncio.wait(calls, timeout=10, return_when="FIRST_COMPLETED")
            while len(done) < 2:  # the two that were too many
                more, waiting = await asyncio.wait(waiting, timeout=10,
                                                   return_when="FIRST_COMPLETED")  # fmt: skip
                done |= more
            assert {call.result().status_code for call in done} == {503} and len(held) == 3
            free.set()
            assert {(await call).status_code for call in waiting} == {200}
            # Nothing is left behind of what was held or given up.
            again = [client.post("/v1/fleet/x", headers=greedy) for _ in range(8)]
            assert {reply.status_code for reply in await asyncio.gather(*again)} == {200}

    asyncio.run(through())


def test_however_many_ask_for_its_health_the_superlink_is_asked_once_at_a_time() -> None:
    at_once: list[int] = [0]
    most: list[int] = [0]

    async def answer(request: httpx.Request) -> httpx.Response:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        await asyncio.sleep(0.02)
        at_once[0] -= 1
        return httpx.Response(200, text="OK")

    async def through() -> None:
        async with gate_before(answer) as client:  # type: ignore[arg-type]
            replies = await asyncio.gather(*(client.get("/health") for _ in range(50)))
            assert {(reply.status_code, reply.text) for reply in replies} == {(200, "OK")}

    asyncio.run(through())
    assert most == [1]


def test_a_body_that_trickles_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.2)

    async def answer(request: httpx.Request) -> httpx.Response:
        async for _ in request.stream:  # type: ignore[union-attr]
            pass
        return ok()

    async def trickle() -> AsyncIterator[bytes]:
        for _ in range(100):
            await asyncio.sleep(0.05)
            yield b"x"

    reply = ask(answer, content=trickle())  # type: ignore[arg-type]
    assert isinstance(reply, httpx.Response) and reply.status_code == 502

"""What we replace in Flower 1.41, and rely on, is there and works as we found it."""

from __future__ import annotations

import asyncio
import inspect
import time

import pytest
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.corestate.sql_corestate import SqlCoreState
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.supercore.retry import http_retry
from flwr.superlink import main as superlink
from flwr.supernode import start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.runtime import run_clientapp
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.runtime.flower import (
    EXPIRY,
    LEAST_WAIT,
    NEXT_DOOR,
    OBJECT_BACKOFF,
    RETRY_PAUSE,
    Patience,
    prompt_objects,
    prompt_retries,
    prompt_supernode,
    seldom_expiry,
)
from deploy.server.superlink import short_way


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back afterwards what a patch replaces."""
    for name in ("time", "_pull_and_store_message", "_push_messages"):
        monkeypatch.setattr(start_client_internal, name, getattr(start_client_internal, name))
    for function in (
        inflatable_utils.pull_objects,
        inflatable_utils.pull_and_inflate_object_from_tree,
    ):
        kept = dict(function.__kwdefaults__)
        monkeypatch.setattr(function, "__kwdefaults__", kept)


def test_a_supernode_without_messages_sleeps_three_seconds_in_its_own_module() -> None:
    source = inspect.getsource(start_client_internal.start_client_internal)
    assert "time.sleep(3)" in source
    assert "_pull_and_store_message(" in source and "_push_messages(" in source


def test_an_object_that_is_late_is_asked_for_again_soon(untouched: None) -> None:
    prompt_objects()
    content = b"object"
    object_id, asked = get_object_id(content), []

    def pull(wanted: str) -> bytes:
        asked.append(time.monotonic())
        if len(asked) == 1:
            raise ObjectUnavailableError(wanted)
        return content

    assert inflatable_utils.pull_objects([object_id], pull) == {object_id: content}
    assert asked[1] - asked[0] < 10 * OBJECT_BACKOFF < 1.0


def test_a_supernode_looks_again_soon_after_a_message_and_seldom_when_idle(
    untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(
        start_client_internal, "_pull_and_store_message", lambda *args, **kwargs: None
    )
    prompt_supernode()
    monkeypatch.setattr(time, "sleep", slept.append)
    start_client_internal.time.sleep(3)  # nothing came just now
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 20.0)
    start_client_internal.time.sleep(3)
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600.0)
    start_client_internal.time.sleep(3)
    start_client_internal.time.sleep(0.5)  # for an app next door
    assert slept[0] == LEAST_WAIT and slept[3] == NEXT_DOOR
    assert slept[1] == pytest.approx(1.0, abs=0.01)
    assert slept[2] == 3.0


def test_a_server_that_is_away_is_asked_again_within_seconds(
    untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_retry, "MAX_RETRY_DELAY", http_retry.MAX_RETRY_DELAY)
    prompt_retries()
    pauses = http_retry.make_simple_http_retry_invoker().wait_gen_factory()
    assert max(next(pauses) for _ in range(12)) == RETRY_PAUSE


def test_expired_tasks_are_looked_for_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    monkeypatch.setattr(SqlCoreState, "_cleanup_expired_task_tokens", looks.append)
    seldom_expiry(seconds=0.2)
    seldom_expiry(seconds=0.2)  # a second time changes nothing
    one, other = object.__new__(SqlLinkState), object.__new__(SqlLinkState)
    for _ in range(10):
        one._cleanup_expired_task_tokens()
    other._cleanup_expired_task_tokens()
    assert looks == [one, other]
    time.sleep(0.25)
    one._cleanup_expired_task_tokens()
    assert looks == [one, other, one]


def test_an_expired_task_outlives_the_look_by_far() -> None:
    assert HEARTBEAT_DEFAULT_INTERVAL * HEARTBEAT_PATIENCE > 10 * EXPIRY
    assert "_cleanup_expired_task_tokens()" in inspect.getsource(SqlLinkState.get_run_status)


def test_control_calls_go_through_every_layer_and_the_others_past_controls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = superlink._get_middleware()
    monkeypatch.setattr(superlink, "_get_middleware", superlink._get_middleware)
    short_way()
    short = superlink._get_middleware()
    assert len(short) == len(whole)
    passed: list[str] = []

    class Layer:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            passed.append(scope["path"])
            await self.app(scope, receive, send)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append("app")

    replaced = [m for m, before in zip(short, whole, strict=True) if m.cls is not before.cls]
    assert {m.kwargs["prefix"] for m in replaced} == {"/v1/control/"}
    ours = replaced[0].cls(app, middleware=Layer, prefix="/v1/control/")
    for path in ("/v1/control/list-nodes", "/v1/fleet/pull-messages"):
        asyncio.run(ours({"type": "http", "path": path}, None, None))  # type: ignore[arg-type]
    assert passed == ["/v1/control/list-nodes", "app", "app"]


def test_patience_costs_a_twentieth_of_the_time_waited() -> None:
    patience = Patience(least=0.0, longest=100.0)
    time.sleep(0.2)
    assert 0.01 <= patience.seconds() <= 0.05
    patience.found()
    assert patience.seconds() < 0.01


def test_the_names_that_a_hospital_replaces_are_the_ones_that_flower_calls() -> None:
    source = inspect.getsource(run_clientapp.run_clientapp)
    for call in ("install_from_fab(fab.content", "get_project_dir(", "get_load_client_app_fn("):
        assert call in source, call
        assert hasattr(run_clientapp, call.split("(")[0])
    assert source.index("install_from_fab(fab.content") < source.index("load_client_app_fn(")


def test_a_supernode_calls_the_server_by_the_methods_that_we_watch() -> None:
    for name in ("ActivateNode", "DeactivateNode", "SendNodeHeartbeat", "PullMessages"):
        assert list(inspect.signature(getattr(FleetHttpClient, name)).parameters) == [
            "self",
            "request",
        ]

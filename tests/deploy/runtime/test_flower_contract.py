"""What we replace in Flower 1.41, and rely on, is there and works as we found it."""

from __future__ import annotations

import inspect
import time

import pytest
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.supercore.retry import http_retry
from flwr.supernode import start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.runtime import run_clientapp

from deploy.runtime.flower import (
    OBJECT_BACKOFF,
    RETRY_PAUSE,
    Patience,
    prompt_objects,
    prompt_retries,
    prompt_supernode,
)


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
    assert slept[0] == slept[3] == 0.05
    assert slept[1] == pytest.approx(1.0, abs=0.01)
    assert slept[2] == 3.0


def test_a_server_that_is_away_is_asked_again_within_seconds(
    untouched: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_retry, "MAX_RETRY_DELAY", http_retry.MAX_RETRY_DELAY)
    prompt_retries()
    pauses = http_retry.make_simple_http_retry_invoker().wait_gen_factory()
    assert max(next(pauses) for _ in range(12)) == RETRY_PAUSE


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

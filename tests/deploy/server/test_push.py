"""Pushing an object to a store that takes each once, as Flower's does."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
from flwr.proto.message_pb2 import (
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable import inflatable_protobuf_utils
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from deploy.server.push import forgive_lost_answers


class Store:
    """Takes an object once; ``lost``: how many confirmations get lost on their way."""

    def __init__(self, *, lost: int, takes: bool = True) -> None:
        self.held: dict[str, bytes] = {}
        self.lost, self.takes = lost, takes

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse:
        while True:  # the sender's client asks again by itself where nothing comes back
            stored = self.takes and request.object_id not in self.held
            if stored:
                self.held[request.object_id] = request.object_content
            self.lost -= 1
            if self.lost < 0:
                return PushObjectResponse(stored=stored)

    def PullObject(self, request: PullObjectRequest) -> PullObjectResponse:
        content = self.held.get(request.object_id, b"")
        return PullObjectResponse(
            object_found=self.takes, object_available=bool(content), object_content=content
        )


def push(store: Store, module: ModuleType) -> None:
    make = module.make_push_object_fn_protobuf
    make(push_object_protobuf=store.PushObject, node=Node(node_id=1), run_id=1, session_id="s")(
        "id", b"content"
    )


@pytest.fixture
def patched() -> ModuleType:
    module = ModuleType("pushing")
    make = inflatable_protobuf_utils.make_push_object_fn_protobuf
    vars(module)["make_push_object_fn_protobuf"] = make
    forgive_lost_answers(module)
    return module


@pytest.mark.parametrize("lost", [0, 1, 5])
def test_a_lost_confirmation_is_no_failure(patched: ModuleType, lost: int) -> None:
    store = Store(lost=lost)
    push(store, patched)
    assert store.held == {"id": b"content"}
    if lost:
        with pytest.raises(ObjectPushError):
            push(Store(lost=lost), inflatable_protobuf_utils)  # what it is for


def test_an_object_that_was_refused_is_one(patched: ModuleType) -> None:
    with pytest.raises(ObjectPushError):
        push(Store(lost=0, takes=False), patched)
    store = Store(lost=0)
    store.held["id"] = b"another"
    with pytest.raises(ObjectPushError):
        push(store, patched)


@pytest.mark.parametrize(
    "name", ["flwr.superlink.grid.http_grid", "flwr.supernode.fleet_http_connection"]
)
def test_flowers_senders_have_the_function_under_its_name(name: str) -> None:
    assert callable(vars(importlib.import_module(name))["make_push_object_fn_protobuf"])
    with pytest.raises(RuntimeError):
        forgive_lost_answers(ModuleType("empty"))

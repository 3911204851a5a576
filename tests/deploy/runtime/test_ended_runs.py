"""A run that ends while its message is fetched leaves nothing for an app to wait for."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import Status
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode import start_client_internal
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from deploy.runtime.flower import drop_what_ended

RUN, NODE = 7, 5


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_pull_and_store_message"
    monkeypatch.setattr(start_client_internal, name, getattr(start_client_internal, name))
    for name, number in (("_task_id", 1), ("_run_id", RUN), ("_node_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, number)  # as the sender of the message


def fetch(ends: str) -> tuple[NodeState, int | None]:
    """Let a SuperNode fetch a message whose run ends at ``ends``; its state, and the run's id."""
    stores = ObjectStoreFactory()
    state = NodeStateFactory(stores).state()
    state.set_node_id(NODE)
    state.store_run(Run.create_empty(RUN))
    message = Message(RecordDict({"head": ConfigRecord({"round": 1})}), NODE, "train")
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = {k: v.deflate() for k, v in get_all_nested_objects(message).items()}

    def pull(run: int, object_id: str) -> bytes:
        if ends == "pull":
            raise RunNotRunningException
        return objects[object_id]

    def confirm(run: int, message_id: str) -> None:
        if ends == "confirm":
            raise RunNotRunningException

    found = start_client_internal._pull_and_store_message(
        state=state, object_store=stores.store(), node_config={},
        receive=lambda: (message, get_object_tree(message)), get_run=None, get_fab=None,
        pull_object=pull, confirm_message_received=confirm, trusted_entities=None,
    )  # type: ignore[arg-type]  # fmt: skip
    return state, found


def waiting(state: NodeState) -> int:
    """Tasks that an app could take or has taken, and messages that it would ask for."""
    tasks = state.get_tasks(statuses=[Status.PENDING, Status.STARTING, Status.RUNNING])
    return len(tasks) + len(state.get_messages_legacy(is_reply=False))


@pytest.mark.parametrize("ends", ["pull", "confirm"])
def test_a_message_whose_run_ends_while_it_comes_is_forgotten(ends: str) -> None:
    before, _ = fetch(ends)
    assert waiting(before) > 0  # Flower's own: an app would wait for its objects
    drop_what_ended()
    after, found = fetch(ends)
    assert found is None and waiting(after) == 0


def test_a_message_that_came_whole_waits_for_its_app() -> None:
    drop_what_ended()
    state, found = fetch("never")
    assert found == RUN and waiting(state) == 2

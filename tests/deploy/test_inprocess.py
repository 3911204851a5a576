"""The in-process grid answers as Flower's grids do."""

from __future__ import annotations

from flwr.app import Message, RecordDict

from client_app.app import app
from common.config import KEYS
from common.messages import Greeting
from deploy.inprocess import Fault, InProcessGrid

VALUES = {key.name: key.default for key in KEYS} | {"dataset": "synthetic"}


def greetings(grid: InProcessGrid) -> list[Message]:
    return [Message(RecordDict(), node, "query.greet") for node in grid.get_node_ids()]


def test_send_and_receive_gives_every_answer_once() -> None:
    grid = InProcessGrid(app, 3, VALUES)
    replies = grid.send_and_receive(greetings(grid), timeout=30)
    names = sorted(Greeting.from_record(reply.content).hospital for reply in replies)
    assert names == ["hospital-00", "hospital-01", "hospital-02"]


def test_send_and_receive_stops_at_its_timeout() -> None:
    lost = Fault(lambda kind, i, _: i == 1, drop_reply=True)
    grid = InProcessGrid(app, 3, VALUES, [lost])
    assert len(list(grid.send_and_receive(greetings(grid), timeout=2))) == 2


def test_an_answer_is_pulled_once() -> None:
    grid = InProcessGrid(app, 1, VALUES)
    (message_id,) = grid.push_messages(greetings(grid))
    grid.close()
    assert len(list(grid.pull_messages([message_id]))) == 1
    assert list(grid.pull_messages([message_id])) == []


def test_a_hospital_that_is_offline_is_sent_nothing() -> None:
    grid = InProcessGrid(app, 2, VALUES)
    messages = greetings(grid)
    grid.offline.add(0)
    ids = list(grid.push_messages(messages))
    assert ids[0] == ""
    assert ids[1] != ""

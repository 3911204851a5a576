"""Asking many: what one pull may bring, and that nobody who was asked is forgotten."""

from __future__ import annotations

import time
from collections.abc import Iterable

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from deploy.inprocess import Fault, InProcessGrid
from server_app.exchange import AT_ONCE, ask

HOSPITALS = 11


class WatchedGrid(InProcessGrid):
    """Remembers how many answers each pull brought."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As its parent."""
        found = list(super().pull_messages(message_ids))
        self.brought = [*getattr(self, "brought", []), len(found)]
        return found


@pytest.fixture
def grid() -> WatchedGrid:
    """Hospitals that answer at once, in one process."""
    app = ClientApp()

    @app.query("echo")
    def echo(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    return WatchedGrid(app, HOSPITALS, {})


def questions(grid: InProcessGrid) -> dict[str, tuple[int, RecordDict]]:
    """One for each hospital."""
    return {
        f"hospital-{i:02d}": (node, RecordDict({"number": ConfigRecord({"value": i})}))
        for i, node in enumerate(grid.get_node_ids())
    }


def test_however_many_have_answered_few_answers_are_held_at_once(grid: WatchedGrid) -> None:
    seen: dict[str, int] = {}

    def take(name: str, record: RecordDict) -> None:
        seen[name] = int(record.config_records["number"]["value"])  # type: ignore[arg-type]

    push = grid.push_messages

    def all_answered(messages: Iterable[Message]) -> Iterable[str]:
        ids = list(push(messages))
        grid.close()  # every answer is there before the first pull
        return ids

    grid.push_messages = all_answered  # type: ignore[method-assign]
    answers = ask(
        grid, questions(grid), message_type="query.echo", stage="echo", timeout=10, on_answer=take
    )
    assert max(grid.brought) <= AT_ONCE < HOSPITALS
    assert sum(grid.brought) == HOSPITALS
    assert seen == {f"hospital-{i:02d}": i for i in range(HOSPITALS)}
    assert not answers.absent and not answers.by_hospital


def test_who_does_not_answer_in_time_is_absent_and_the_wait_ends_at_the_deadline(
    grid: WatchedGrid,
) -> None:
    grid.faults.append(Fault(lambda kind, hospital, stage: hospital == 3, drop_reply=True))
    started = time.monotonic()
    answers = ask(grid, questions(grid), message_type="query.echo", stage="echo", timeout=0.4)
    assert time.monotonic() - started < 5
    assert [(a.hospital, a.reason) for a in answers.absent] == [
        ("hospital-03", "no answer within 0.4 s")
    ]
    assert sorted(answers.by_hospital) == [f"hospital-{i:02d}" for i in range(HOSPITALS) if i != 3]

"""One message at a time for each hospital, and nothing blocks: sent now, answered hours later.

Polls are short at first and back off while nothing comes. A hospital that fails is asked again
later, each time after a longer pause.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from common.errors import ConsiliumError
from common.messages import Refusal
from server_app.exchange import FIRST_WAIT, LONGEST_WAIT

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0
"""Seconds until a hospital that failed is asked again, at first and at most."""


@dataclass(frozen=True)
class Letter:
    """What a hospital was asked, and has not answered yet."""

    id: str
    hospital: str
    node: int
    kind: str
    version: int
    """Of the base at which it was asked."""
    deadline: float


@dataclass(frozen=True)
class Answer:
    """What came of a letter: a record, a refusal's code, or what went wrong on the way."""

    letter: Letter
    record: RecordDict | None = None
    refusal: Refusal | None = None
    problem: str = ""


class Post:
    """The letters that are under way, and when a hospital that failed may be asked again."""

    def __init__(self, grid: Grid, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._grid = grid
        self._clock = clock
        self._letters: dict[str, Letter] = {}  # by hospital
        self._again: dict[str, float] = {}
        self._pause: dict[str, float] = {}
        self._wait = FIRST_WAIT

    def open(self, kind: str | None = None) -> list[str]:
        """Hospitals that owe an answer (to a letter of ``kind``)."""
        return [n for n, x in self._letters.items() if kind is None or x.kind == kind]

    def free(self, hospital: str) -> bool:
        """Whether the hospital owes nothing and may be asked now."""
        return hospital not in self._letters and self._clock() >= self._again.get(hospital, 0.0)

    def send(
        self, hospital: str, node: int, kind: str, content: RecordDict, *,
        version: int, timeout: float,
    ) -> None:  # fmt: skip
        """Send a letter; if the node is not connected, the hospital counts as having failed."""
        message = Message(content, node, f"query.{kind}", group_id=str(version), ttl=timeout)
        (id_,) = list(self._grid.push_messages([message]))
        if not id_:
            self.failed(hospital)
            return
        deadline = self._clock() + timeout
        self._letters[hospital] = Letter(id_, hospital, node, kind, version, deadline)

    def failed(self, hospital: str) -> None:
        """Ask again later, and later each time."""
        pause = self._pause.get(hospital, FIRST_PAUSE)
        self._again[hospital] = self._clock() + pause
        self._pause[hospital] = min(2 * pause, LONGEST_PAUSE)

    def forget(self, hospital: str, node: int | None) -> None:
        """Drop a letter to another node than ``node``: the hospital has come back as that one."""
        letter = self._letters.get(hospital)
        if letter is not None and node is not None and letter.node != node:
            del self._letters[hospital]

    def collect(self) -> list[Answer]:
        """What has come, without waiting; the order of the hospitals' names."""
        by_id = {letter.id: letter for letter in self._letters.values()}
        answers = []
        for reply in self._grid.pull_messages(list(by_id)) if by_id else ():
            letter = by_id.pop(reply.metadata.reply_to_message_id, None)
            if letter is not None:
                answers.append(self._opened(letter, reply))
        answers += [
            Answer(letter, problem="no answer in time")
            for letter in by_id.values()
            if self._clock() >= letter.deadline
        ]
        for answer in answers:
            name = answer.letter.hospital
            del self._letters[name]
            if answer.problem:
                self.failed(name)
            else:
                self._pause.pop(name, None)
        self._wait = FIRST_WAIT if answers else min(self._wait * 1.5, LONGEST_WAIT)
        return sorted(answers, key=lambda a: a.letter.hospital)

    def rest(self) -> None:
        """Wait until the next look is worth while: longer, the longer nothing came."""
        time.sleep(self._wait)

    @staticmethod
    def _opened(letter: Letter, reply: Message) -> Answer:
        if reply.has_error():
            # The node's own text may quote its paths: only the code is repeated.
            return Answer(letter, problem=f"its node failed (Flower error {reply.error.code})")
        try:
            return Answer(letter, reply.content, Refusal.in_record(reply.content))
        except ConsiliumError as error:
            return Answer(letter, problem=error.what)

"""Ask many hospitals, collect what they answer until a deadline. No sleep of seconds.

``Grid.send_and_receive`` polls every 3 s; short protocol stages would spend their time
asleep. This loop polls quickly at first and backs off while hospitals train.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from common.errors import ConsiliumError
from common.messages import Refusal

FIRST_WAIT, SHARE, LONGEST_WAIT = 0.01, 0.05, 0.5
"""Seconds between polls at least, as a part of the time since the last answer, and at most: an
answer is seen at most a twentieth later than it came, and long training is not asked after often.
"""
AT_ONCE = 4
"""Answers that one pull may bring: a masked vector is as large as a model, and a pull of all
hospitals' would hold them all where the sum needs one at a time."""

_MEANINGS = {
    ErrorCode.LOAD_CLIENT_APP_EXCEPTION: "it did not load the app: a node runs only the code that "
    "it has installed",
    ErrorCode.NODE_UNAVAILABLE: "the node went away",
}
"""Of Flower's errors in a node's place; the others are told by their number."""


@dataclass(frozen=True)
class Absence:
    """Why one hospital gave nothing at one stage."""

    hospital: str
    stage: str
    reason: str

    def as_dict(self) -> dict[str, str]:
        """JSON-ready."""
        return {"hospital": self.hospital, "stage": self.stage, "reason": self.reason}


@dataclass
class Answers:
    """One stage's answers by hospital name, and who gave none and why."""

    by_hospital: dict[str, RecordDict] = field(default_factory=dict)
    absent: list[Absence] = field(default_factory=list)


def ask(
    grid: Grid,
    questions: Mapping[str, tuple[int, RecordDict]],
    *,
    message_type: str,
    stage: str,
    timeout: float,
    on_answer: Callable[[str, RecordDict], None] | None = None,
    instead: Callable[[str, str], RecordDict | None] | None = None,
) -> Answers:
    """Send each hospital (name → node id, content) its question; wait up to ``timeout`` s.

    Every hospital asked is either in the answers or among the absent, with the reason: an
    error of its node, a refusal (code and correlation id), or no answer in time. A second
    answer to one question is ignored. ``on_answer`` may take an answer as it comes (it is then
    not kept); a ConsiliumError that it raises makes the hospital absent with that reason.
    ``instead`` (hospital, code of its refusal) may give another question to whoever refused the
    first one: within the same time, and once.
    """
    answers = Answers()
    pending: dict[str, str] = {}  # message id → hospital
    asked_again: set[str] = set()
    messages = [
        Message(content, node, message_type, group_id=stage, ttl=timeout + 60.0)
        for node, content in questions.values()
    ]
    ids = list(grid.push_messages(messages)) if messages else []
    for name, message_id in zip(questions, ids, strict=True):
        if message_id:
            pending[message_id] = name
        else:
            answers.absent.append(Absence(name, stage, "its node is not connected"))
    last = time.monotonic()
    deadline = last + timeout
    while pending:
        came, waiting = False, list(pending)
        for start in range(0, len(waiting), AT_ONCE):
            replies = list(grid.pull_messages(waiting[start : start + AT_ONCE]))
            while replies:
                came, reply = True, replies.pop(0)  # taken, it is held no longer
                name_or_none = pending.pop(reply.metadata.reply_to_message_id, None)
                if name_or_none is None:
                    continue
                other = _other_question(reply, name_or_none, asked_again, instead)
                if other is None:
                    _take(reply, name_or_none, stage, answers, on_answer)
                    continue
                asked_again.add(name_or_none)
                node = questions[name_or_none][0]
                ttl = deadline - time.monotonic() + 60.0
                (other_id,) = grid.push_messages(
                    [Message(other, node, message_type, group_id=stage, ttl=ttl)]
                )
                if other_id:
                    pending[other_id] = name_or_none
                else:
                    gone = Absence(name_or_none, stage, "its node is not connected")
                    answers.absent.append(gone)
        if not pending:
            break
        now = time.monotonic()
        if now >= deadline:
            answers.absent += [
                Absence(name, stage, f"no answer within {timeout:g} s") for name in pending.values()
            ]
            break
        last = now if came else last
        wait = min(max(SHARE * (now - last), FIRST_WAIT), LONGEST_WAIT)
        time.sleep(min(wait, deadline - now))
    answers.absent.sort(key=lambda a: a.hospital)
    return answers


def tell(grid: Grid, nodes: Mapping[str, int], *, message_type: str, content: RecordDict) -> None:
    """Send a message to which no answer is awaited, to whoever is there."""
    messages = [
        Message(content, node, message_type, group_id="", ttl=3600.0) for node in nodes.values()
    ]
    if messages:
        list(grid.push_messages(messages))


def _other_question(
    reply: Message,
    name: str,
    asked_again: set[str],
    instead: Callable[[str, str], RecordDict | None] | None,
) -> RecordDict | None:
    if instead is None or name in asked_again or reply.has_error():
        return None
    try:
        refusal = Refusal.in_record(reply.content)
    except ConsiliumError:
        return None  # it is looked at where answers are taken
    return None if refusal is None else instead(name, refusal.code)


def _take(
    reply: Message,
    name: str,
    stage: str,
    answers: Answers,
    on_answer: Callable[[str, RecordDict], None] | None,
) -> None:
    if reply.has_error():
        # The node's own text may quote its paths: only the code is repeated.
        meaning = _MEANINGS.get(reply.error.code, "its node failed")
        answers.absent.append(Absence(name, stage, f"{meaning} (Flower error {reply.error.code})"))
        return
    try:
        refusal = Refusal.in_record(reply.content)
        if refusal is not None:
            reason = f"refused: {refusal.code} (id {refusal.correlation_id} in its log)"
            answers.absent.append(Absence(name, stage, reason))
        elif on_answer is not None:
            on_answer(name, reply.content)
        else:
            answers.by_hospital[name] = reply.content
    except ConsiliumError as error:
        answers.absent.append(Absence(name, stage, error.what))

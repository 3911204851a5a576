"""A Flower Grid in one process: it calls the ClientApp directly. No Ray, no sockets, no clock.

The messages and records are those of ``flwr run``: each goes through Flower's own
serialisation on its way, so what cannot travel fails here too. Any message can be dropped
before or after it is handled, delayed, or repeated (:class:`Fault`), which is how tests make
hospitals fail at a chosen moment.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SERVER_NODE = 1

CLIENT_APP_RAISED = 2  # Flower's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


@dataclass
class Fault:
    """What befalls the messages for which ``matches`` (message type, partition id, round) holds.

    ``times``: how often, counted over matching messages; None for always.
    """

    matches: Callable[[str, int, str], bool]
    drop_request: bool = False
    """The hospital never sees it."""
    drop_reply: bool = False
    """The hospital handles it; its answer is lost."""
    delay_polls: int = 0
    """The answer is held back for so many polls."""
    repeat: int = 0
    """The hospital is given the message so many more times; the last answer counts."""
    edit_reply: Callable[[RecordDict], RecordDict] | None = None
    """What a malicious hospital (or a broken wire) makes of the answer."""
    times: int | None = None

    def applies(self, message: Message, partition_id: int) -> bool:
        """Whether this message is struck; counts down ``times``."""
        m = message.metadata
        if self.times == 0 or not self.matches(m.message_type, partition_id, m.group_id):
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class _Pending:
    future: Future[Message | None]
    delay: int = 0


@dataclass
class InProcessGrid(Grid):
    """``num_hospitals`` hospitals that run ``client_app``; ``workers`` of them at a time.

    ``run_config`` is given to every hospital as Flower would, and ``node_configs`` (partition id
    → entries) to single ones. ``contexts`` (partition id → Context) hold each hospital's state
    between messages, as a node's memory does.
    """

    client_app: ClientApp
    num_hospitals: int
    run_config: dict[str, Any]
    faults: list[Fault] = field(default_factory=list)
    workers: int = 1
    node_configs: Mapping[int, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.run_id = secrets.randbits(62)
        TaskIdentity.run_id, TaskIdentity.node_id = self.run_id, SERVER_NODE
        TaskIdentity.task_id = 1
        self.contexts = {i: self._context(i) for i in range(self.num_hospitals)}
        self.offline: set[int] = set()
        """Partition ids of hospitals that are not connected."""
        self.log: list[tuple[str, int, str]] = []
        """(message type, partition id, group id) of every message handled, in order."""
        self._ids = count(1)
        self._pending: dict[str, _Pending] = {}
        self._on_wire: dict[str, ProtoRecordDict] = {}
        """Message id → its content as it travels, until it is handled."""
        self._pool = ThreadPoolExecutor(self.workers)
        self._locks = {i: threading.Lock() for i in range(self.num_hospitals)}

    def _context(self, i: int) -> Context:
        return Context(
            run_id=self.run_id,
            node_id=self._node(i),
            node_config={
                "partition-id": i,
                "num-partitions": self.num_hospitals,
                **self.node_configs.get(i, {}),
            },
            state=RecordDict(),
            run_config=dict(self.run_config),
        )

    @staticmethod
    def _node(partition_id: int) -> int:
        return 1000 + partition_id

    def restart(self, partition_id: int) -> None:
        """The hospital's process dies and returns: its node forgets the round's state."""
        self.contexts[partition_id] = self._context(partition_id)

    def close(self) -> None:
        """Wait until every message on its way has been handled."""
        self._pool.shutdown(wait=True)

    def set_run(self, run: Run) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Run:
        """An empty run with this grid's id."""
        return Run.create_empty(self.run_id)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """As Flower's deprecated method."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of the hospitals that are connected."""
        return [self._node(i) for i in range(self.num_hospitals) if i not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand each message to its hospital; "" for a hospital that is not connected."""
        ids = []
        sent: dict[int, ProtoRecordDict] = {}  # one content for all hospitals is serialised once
        messages = list(messages)
        for message in messages:
            partition_id = message.metadata.dst_node_id - self._node(0)
            if partition_id in self.offline:
                ids.append("")
                continue
            message_id = f"message-{next(self._ids)}"
            message.metadata.__dict__["_message_id"] = message_id
            fault = next((f for f in self.faults if f.applies(message, partition_id)), None)
            if id(message.content) not in sent:
                sent[id(message.content)] = recorddict_to_proto(message.content)
            self._on_wire[message_id] = sent[id(message.content)]
            future = self._pool.submit(self._deliver, message, partition_id, fault)
            self._pending[message_id] = _Pending(future, fault.delay_polls if fault else 0)
            ids.append(message_id)
        return ids

    def _deliver(self, message: Message, partition_id: int, fault: Fault | None) -> Message | None:
        try:
            if fault and fault.drop_request:
                return None
            with self._locks[partition_id]:  # a node handles one message at a time
                for _ in range(1 + (fault.repeat if fault else 0)):
                    reply = self._handle(message, partition_id)
        finally:
            del self._on_wire[message.metadata.message_id]
        if fault and fault.drop_reply:
            return None
        if fault and fault.edit_reply and reply.has_content():
            reply.content = fault.edit_reply(reply.content)
        return reply

    def _handle(self, message: Message, partition_id: int) -> Message:
        m = message.metadata
        self.log.append((m.message_type, partition_id, m.group_id))
        content = recorddict_from_proto(self._on_wire[m.message_id])
        received = Message(content, m.dst_node_id, m.message_type,
                           group_id=m.group_id, ttl=m.ttl)  # fmt: skip
        received.metadata.__dict__["_message_id"] = m.message_id
        try:
            reply = self.client_app(received, self.contexts[partition_id])
            return Message(_travel(reply.content), reply_to=received)
        except Exception as error:
            return Message(Error(CLIENT_APP_RAISED, repr(error)), reply_to=received)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that have come to these messages, each once."""
        replies = []
        for message_id in list(message_ids):
            pending = self._pending.get(message_id)
            if pending is None or not pending.future.done():
                continue
            if pending.delay > 0:
                pending.delay -= 1
                continue
            del self._pending[message_id]
            reply = pending.future.result()
            if reply is not None:
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull until all answers are there or ``timeout`` seconds are over."""
        waiting = [message_id for message_id in self.push_messages(messages) if message_id]
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and time.monotonic() < deadline:
            came = list(self.pull_messages(waiting))
            replies += came
            answered = {reply.metadata.reply_to_message_id for reply in came}
            waiting = [message_id for message_id in waiting if message_id not in answered]
            time.sleep(0.005)
        return replies


def _travel(record: RecordDict) -> RecordDict:
    """What is left of a record after it was serialised and read again."""
    return recorddict_from_proto(recorddict_to_proto(record))


def run_in_process(
    overrides: dict[str, Any],
    *,
    num_hospitals: int,
    faults: Iterable[Fault] = (),
    workers: int = 1,
    node_configs: Mapping[int, dict[str, Any]] | None = None,
    client_app: ClientApp | None = None,
) -> InProcessGrid:
    """One whole run, ServerApp and ClientApp, in this process; returns the grid for inspection.

    ``overrides``: run-config keys over their defaults; ``node_configs``: partition id → entries
    of one hospital's own node config, such as ``policy``; ``client_app``: another one than the
    product's, of hospitals that lie. Results are where ``$CONSILIUM_HOME`` says. Raises what the
    ServerApp raises.
    """
    from client_app.app import app as own_app
    from common.config import KEYS
    from server_app.app import app as server_app

    run_config: dict[str, Any] = {key.name: key.default for key in KEYS} | overrides
    grid = InProcessGrid(
        client_app or own_app, num_hospitals, run_config, list(faults), workers, node_configs or {}
    )
    context = Context(
        run_id=grid.run_id, node_id=SERVER_NODE, node_config={}, state=RecordDict(),
        run_config=run_config,
    )  # fmt: skip
    try:
        server_app(grid, context)
    finally:
        grid.close()  # hospitals end what they are at, also where the server stopped before
    return grid

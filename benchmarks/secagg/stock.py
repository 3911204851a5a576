"""Flower's stock SecAgg+: its own workflow and client mod, called through a Grid in memory."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import flwr.compat.common.recorddict_compat as compat
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import (
    Code,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from benchmarks.measure import CpuClock, travel
from benchmarks.secagg.case import MAX_WEIGHT, RANGE, SEED, SERVER, Case, generator
from benchmarks.secagg.figures import Measured


class _Proxy(ClientProxy):
    """A node id, which is all that the workflow asks of a legacy proxy."""

    def __init__(self, node_id: int) -> None:
        super().__init__(str(node_id))
        self.node_id = node_id

    def _not_used(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("the workflow sends messages instead")

    get_properties = get_parameters = fit = evaluate = reconnect = _not_used


class _FedAvg(FedAvg):
    """The stock strategy; its mean over N copies of the sum has a phase of its own."""

    def __init__(self, clock: CpuClock) -> None:
        super().__init__()
        self.clock = clock

    def aggregate_fit(self, *args: Any, **kwargs: Any) -> Any:
        """As FedAvg."""
        with self.clock.on(SERVER, "fedavg"):
            return super().aggregate_fit(*args, **kwargs)


class StockGrid(Grid):
    """Calls the stock client mod of each hospital, one after the other, and weighs messages."""

    def __init__(self, case: Case, clock: CpuClock) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        self.case, self.clock = case, clock
        # Random 62-bit ids, as a SuperLink gives them.
        self.names = {
            int(generator(name, "node").integers(1 << 61, 1 << 62)): name for name in case.names
        }
        self.contexts = {
            node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
            for node in self.names
        }
        self.up: Counter[str] = Counter()
        self.down: Counter[str] = Counter()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Deliver each message and bring its answer; the lost do not answer."""
        with self.clock.off():
            answers = [self._deliver(message) for message in messages]
        return [answer for answer in answers if answer is not None]

    def _deliver(self, message: Message) -> Message | None:
        about = message.metadata
        name = self.names[about.dst_node_id]
        content, size = travel(message.content)
        self.down[name] += size
        received = Message(content, about.dst_node_id, about.message_type, group_id=about.group_id)
        stage = str(content.config_records[RECORD_KEY_CONFIGS][Key.STAGE])
        if stage == Stage.COLLECT_MASKED_VECTORS and name in self.case.lost:
            return None
        with self.clock.on(name, stage):
            answer = secaggplus_mod(received, self.contexts[about.dst_node_id], self._train)
        content, size = travel(answer.content)
        self.up[name] += size
        return Message(content, reply_to=received)

    def _train(self, message: Message, context: Context) -> Message:
        """The hospital's ClientApp: its update is there already, and costs nothing."""
        with self.clock.off():
            name = self.names[context.node_id]
            result = FitRes(
                status=Status(Code.OK, ""),
                parameters=ndarrays_to_parameters(list(self.case.update(name).values())),
                num_examples=self.case.weight(name),
                metrics={},
            )
            return Message(compat.fitres_to_recorddict(result, False), reply_to=message)

    def set_run(self, run: Run) -> None:
        """Nothing to set."""

    @property
    def run(self) -> Run:
        """An empty run."""
        return Run.create_empty(1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not called by the workflow."""
        raise NotImplementedError("the workflow makes its messages itself")

    def get_node_ids(self) -> list[int]:
        """All hospitals."""
        return list(self.names)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Not called by the workflow."""
        raise NotImplementedError("the workflow uses send_and_receive")

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Not called by the workflow."""
        raise NotImplementedError("the workflow uses send_and_receive")


def run_stock(case: Case, clock: CpuClock) -> Measured:
    """One round of Flower's own SecAgg+; RuntimeError with its log if it halts."""
    random.seed(SEED)  # the workflow shuffles with the global generator
    np.random.seed(SEED % (1 << 32))  # and quantises with numpy's
    grid = StockGrid(case, clock)
    manager = SimpleClientManager()
    for node in grid.names:
        manager.register(_Proxy(node))
    state = RecordDict(
        {
            MAIN_CONFIGS_RECORD: ConfigRecord({WorkflowKey.CURRENT_ROUND: 2}),
            # The model's broadcast is left out: hospitals are sent an empty one.
            MAIN_PARAMS_RECORD: compat.parameters_to_arrayrecord(
                Parameters([], "numpy.ndarray"), True
            ),
        }
    )
    with _flower_errors() as errors:
        context = LegacyContext(
            Context(run_id=1, node_id=1, node_config={}, state=state, run_config={}),
            strategy=_FedAvg(clock),
            client_manager=manager,
        )
        with clock.on(SERVER, "workflow"):
            SecAggPlusWorkflow(
                case.num_shares,
                case.threshold,
                max_weight=float(MAX_WEIGHT),
                clipping_range=RANGE,
            )(grid, context)
    record = context.state.array_records[MAIN_PARAMS_RECORD]
    mean = parameters_to_ndarrays(compat.arrayrecord_to_parameters(record, True))
    if not mean:
        raise RuntimeError("stock SecAgg+ halted: " + ("; ".join(errors) or "without a message"))
    return Measured(clock.seconds, grid.up, grid.down, mean)


@contextmanager
def _flower_errors() -> Iterator[list[str]]:
    """Keep Flower's logger quiet, and collect what it has to say at level ERROR."""
    errors: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage())

    logger, handler = logging.getLogger("flwr"), Collect(logging.ERROR)
    before = logger.level, logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.ERROR)
    try:
        yield errors
    finally:
        level, logger.handlers, logger.propagate = before
        logger.setLevel(level)

"""Our secure aggregation against Flower's stock SecAgg+: CPU time, bytes, error; and one mask.

Both protocols run in this process, one after the other, on the same updates and weights, over
the same boundary: a RecordDict comes in, a RecordDict goes out, and each travels through
Flower's own serialisation, which is counted in bytes and charged to nobody. The stock one is
Flower's own code (SecAggPlusWorkflow, secaggplus_mod, legacy FedAvg), called through a Grid in
memory; nothing of it is written anew here.

What counts and what does not is in benchmarks/README.md.
"""

from __future__ import annotations

import hashlib
import logging
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import flwr.compat.common.recorddict_compat as compat
import numpy as np
import numpy.typing as npt
import typer
from flwr.app import Array, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import (
    Code,
    FitRes,
    Parameters,
    Status,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_multiply,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console
from rich.table import Table

from benchmarks.measure import CpuClock, OverTime, environment, travel
from common.aggregation import flatten, unflatten
from common.errors import ConfigError, ConsiliumError
from common.files import read_json, write_json
from common.messages import Envelope
from common.secagg import (
    HospitalRound,
    Identity,
    RoundBinding,
    SecAggParams,
    SecAggPolicy,
    ServerRound,
    decode,
    encode,
    update_layout,
)
from common.secagg.masks import KeyStream, add_mask

PARAMETERS = 4_802_120
"""Of the published DPResNet at width 1."""
RANGE = 0.125
"""Largest absolute value in an update: our segment's bound, and the stock clipping range."""
MAX_WEIGHT = 1000
"""Of both; the stock default."""
RESULTS = Path(__file__).resolve().parent / "results" / "secagg.json"
REPEAT_WITHIN = 120.0
"""A cell is repeated only while that is expected to end within so many wall seconds."""

SERVER = "server"
SEED = 20_260_101
MODEL = bytes(32)
POLICY = SecAggPolicy(require_roster=True, min_threshold=3, min_cohort=3, min_shares=3)

Layers = dict[str, npt.NDArray[np.float32]]
Means = dict[str, npt.NDArray[np.float64]]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell: who takes part, with how much, and how many are lost on the way.

    The first ``dropouts`` hospitals share their secrets and then never send a masked input.
    """

    parameters: int
    hospitals: int
    dropouts: int
    num_shares: int = 5
    threshold: int = 4

    @property
    def names(self) -> list[str]:
        """The hospitals' names."""
        return [f"hospital-{index:02d}" for index in range(self.hospitals)]

    @property
    def lost(self) -> frozenset[str]:
        """Who drops after its share and before its masked input."""
        return frozenset(self.names[: self.dropouts])

    @property
    def survivors(self) -> list[str]:
        """Who is in the sum."""
        return self.names[self.dropouts :]

    def weight(self, name: str) -> int:
        """The number of examples of ``name``: 100 to MAX_WEIGHT."""
        return int(_generator(name, "weight").integers(100, MAX_WEIGHT + 1))

    def update(self, name: str) -> Layers:
        """The update of ``name``: float32, uniform in ±RANGE; made anew at each call."""
        flat = _generator(name, "update").random(self.parameters, dtype=np.float32)
        flat -= 0.5
        flat *= 2 * RANGE
        return {key: flat[part] for key, part in self._parts().items()}

    def exact(self) -> Means:
        """The weighted mean over the survivors in plain float64."""
        total = np.zeros(self.parameters)
        for name in self.survivors:
            total += self.weight(name) * flatten(self.update(name)).astype(np.float64)
        total /= sum(map(self.weight, self.survivors))
        return {key: total[part] for key, part in self._parts().items()}

    def _parts(self) -> dict[str, slice]:
        edges = np.cumsum([0, *layer_lengths(self.parameters)]).tolist()
        return {f"{i:02d}": slice(*pair) for i, pair in enumerate(pairwise(edges))}


@dataclass
class Measured:
    """One round of one protocol."""

    seconds: Mapping[tuple[str, str], float]
    up: Mapping[str, int]
    down: Mapping[str, int]
    mean: Sequence[npt.NDArray[np.float64]]


def layer_lengths(parameters: int) -> list[int]:
    """DPResNet's layers in their order, cut after ``parameters`` values (or one more added)."""
    channels = [3, 64, 128, 128, 128, 256, 256, 512, 512]
    lengths: list[int] = []
    for before, after in pairwise(channels):
        lengths += [9 * before * after, after, after]  # convolution; norm's scale and shift
    lengths += [512 * 8, 8]
    cut: list[int] = []
    for length in [*lengths, parameters]:
        left = parameters - sum(cut)
        if left > 0:
            cut.append(min(length, left))
    return cut


def _generator(*labels: str) -> np.random.Generator:
    digest = hashlib.sha256("/".join((str(SEED), *labels)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


# Ours ------------------------------------------------------------------------------------


class _Hospital:
    """A hospital as client_app runs one: between two messages it is bytes on its node."""

    def __init__(self, name: str, roster: Mapping[str, bytes], clock: CpuClock) -> None:
        self.name, self.roster, self.clock = name, roster, clock
        self.identity = _identity(name)
        self.machine = self.binding = b""
        self.vector: Array | None = None

    def advertise(self, message: bytes) -> bytes:
        binding = RoundBinding.from_bytes(message)
        machine, answer = HospitalRound.advertise(
            self.name, binding, identity=self.identity, policy=POLICY, model_hash=MODEL
        )
        self.machine, self.binding = machine.to_bytes(), binding.to_bytes()
        return answer

    def encode(self, update: Layers, weight: int) -> None:
        """Encode the update and keep it as a Flower array, as Context.state does.

        A node does so before it advertises. Here it waits for the masked stage, so that one
        vector is held and not one of each hospital; the lost encode too, before they are lost.
        """
        binding = RoundBinding.from_bytes(self.binding)
        with self.clock.on(self.name, "encode"):
            values = {"update": flatten(update)}
            vector = encode(binding.layout, binding.params, values, weight=weight).vector
        with self.clock.on(self.name, "keep"):
            self.vector = Array(vector)

    def share(self, message: bytes) -> bytes:
        return self._step(
            lambda m: m.share(message, identity=self.identity, policy=POLICY, roster=self.roster)
        )

    def masked(self, message: bytes) -> bytes:
        assert self.vector is not None
        with self.clock.on(self.name, "keep"):
            vector = self.vector.numpy()
            self.vector = None
        return self._step(lambda m: m.masked_input(message, vector))

    def consistency(self, message: bytes) -> bytes:
        return self._step(lambda m: m.consistency(message, identity=self.identity))

    def unmask(self, message: bytes) -> bytes:
        return self._step(lambda m: m.unmask(message))

    def _step(self, act: Callable[[HospitalRound], bytes]) -> bytes:
        machine = HospitalRound.from_bytes(self.machine)
        answer = act(machine)
        self.machine = machine.to_bytes()
        return answer


class _Ours:
    """The server and its hospitals, with RecordDicts between them as server_app sends them."""

    def __init__(self, case: Case, clock: CpuClock) -> None:
        self.case, self.clock = case, clock
        self.up: Counter[str] = Counter()
        self.down: Counter[str] = Counter()
        roster = {name: _identity(name).public for name in case.names}
        self.hospitals = {name: _Hospital(name, roster, clock) for name in case.names}
        with clock.on(SERVER, "setup"):
            self.binding = RoundBinding(
                run="benchmark",
                round=1,
                purpose="train",
                params=SecAggParams(
                    num_shares=case.num_shares,
                    reconstruction_threshold=case.threshold,
                    min_cohort=case.threshold,
                    max_cohort=case.hospitals,
                ),
                layout=update_layout(case.parameters, bound=RANGE, max_weight=MAX_WEIGHT),
                model_hash=MODEL,
            )
            self.server = ServerRound(self.binding, case.names, roster=roster)

    def stage(
        self, message: bytes | Mapping[str, bytes], collect: Callable[[str, bytes], bool]
    ) -> None:
        """Send each awaited hospital its message (or everybody the same), collect the answers.

        The phase ``records`` is the step between the protocol's bytes and Flower's records.
        """
        server, clock, phase = self.server, self.clock, self.server.stage
        for name in server.pending:
            hospital = self.hospitals[name]
            with clock.on(SERVER, "records"):
                record = Envelope(message if isinstance(message, bytes) else message[name])
                sent = record.to_record()
            received, size = travel(sent)
            self.down[name] += size
            if phase == "masked":
                hospital.encode(self.case.update(name), self.case.weight(name))
                if name in self.case.lost:
                    continue
            with clock.on(name, "records"):
                question = Envelope.from_record(received).payload
            with clock.on(name, phase):
                answer = getattr(hospital, phase)(question)
            with clock.on(name, "records"):
                sent = Envelope(answer).to_record()
            received, size = travel(sent)
            self.up[name] += size
            with clock.on(SERVER, "records"):
                answer = Envelope.from_record(received).payload
            with clock.on(SERVER, phase):
                taken = collect(name, answer)
            if not taken:
                raise RuntimeError(f"{name} was refused: {server.outcome.dropped}")

    def close(self, close: Callable[[], Any]) -> Any:
        """Close a stage; returns what to send next."""
        with self.clock.on(SERVER, self.server.stage):
            return close()


def run_ours(case: Case, clock: CpuClock) -> Measured:
    """One round of :mod:`common.secagg`, with a roster, and the adapters' work around it."""
    template = {key: np.empty(a.shape, np.float32) for key, a in case.update(case.names[0]).items()}
    ours = _Ours(case, clock)
    server, binding = ours.server, ours.binding
    ours.stage(binding.to_bytes(), server.collect_advertisement)
    ours.stage(ours.close(server.close_advertise), server.collect_shares)
    ours.stage(ours.close(server.close_shares), server.collect_masked)
    ours.stage(ours.close(server.close_masked), server.collect_consistency)
    ours.stage(ours.close(server.close_consistency), server.collect_unmask)
    total = ours.close(server.finish)
    with clock.on(SERVER, "decode"):
        values = decode(binding.layout, binding.params, total)
        mean = unflatten(values["update"] / values["weight"][0], template)
    if values["weight"][0] != sum(map(case.weight, case.survivors)):
        raise RuntimeError("the sum of the weights is not the survivors'")
    return Measured(clock.seconds, ours.up, ours.down, list(mean.values()))


def _identity(name: str) -> Identity:
    return Identity(hashlib.sha256(f"{SEED}/{name}".encode()).digest())


# Flower's --------------------------------------------------------------------------------


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
            int(_generator(name, "node").integers(1 << 61, 1 << 62)): name for name in case.names
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


# A cell ----------------------------------------------------------------------------------

PROTOCOLS: dict[str, Callable[[Case, CpuClock], Measured]] = {
    "ours": run_ours,
    "stock": run_stock,
}


def measure(case: Case, *, repeat: int = 1, limit: float = float("inf")) -> Row:
    """Run both protocols in turn, ``repeat`` times, and take medians (of errors: the largest).

    ``limit``: wall seconds for all of it. A protocol that fails, or has not finished once by
    then, has no figures; the row's ``error`` says why.
    """
    started = time.monotonic()
    exact = list(case.exact().values())
    runs: dict[str, list[Row]] = {name: [] for name in PROTOCOLS}
    errors: dict[str, str] = {}
    for done in range(repeat):
        elapsed = time.monotonic() - started
        if done and elapsed * (done + 1) / done > min(REPEAT_WITHIN, limit):
            break
        for name, run in PROTOCOLS.items():
            if name in errors:
                continue
            clock = CpuClock(limit - (time.monotonic() - started))
            try:
                runs[name].append(_figures(case, run(case, clock), exact))
            except OverTime:
                if not runs[name]:
                    errors[name] = f"left out: the cell took over {limit:g} s"
            except Exception as error:  # the benchmark goes on with the other protocol
                errors[name] = f"{type(error).__name__}: {error}"
    row: Row = {
        "hospitals": case.hospitals,
        "parameters": case.parameters,
        "dropouts": case.dropouts,
        "num_shares": case.num_shares,
        "threshold": case.threshold,
        "repeats": min(map(len, runs.values())),
    }
    for name, figures in runs.items():
        row |= {f"{name}_{key}": value for key, value in _medians(figures).items()}
    row["max_error"] = row.pop("ours_max_error")
    row["ratio_cpu"] = _ratio(row["ours_cpu_s"], row["stock_cpu_s"])
    row["ratio_cpu_without_fedavg"] = _ratio(row["ours_cpu_s"], row["stock_cpu_without_fedavg_s"])
    row["ratio_bytes_up"] = _ratio(row["ours_bytes_up"], row["stock_bytes_up"])
    row["error"] = "; ".join(f"{name}: {what}" for name, what in errors.items()) or None
    row["environment"] = environment()
    return row


FIGURES = (
    "cpu_s", "cpu_without_fedavg_s", "hospitals_cpu_s", "hospital_cpu_s", "server_cpu_s",
    "bytes_up", "bytes_down", "max_error", "phases_s",
)  # fmt: skip


def _figures(case: Case, measured: Measured, exact: Sequence[npt.NDArray[np.float64]]) -> Row:
    """One run's figures; per hospital: the mean over the survivors, who do all stages."""
    party: defaultdict[str, float] = defaultdict(float)
    phases: defaultdict[str, float] = defaultdict(float)
    for (who, phase), seconds in measured.seconds.items():
        party[who] += seconds
        phases[f"{'server' if who == SERVER else 'hospitals'}.{phase}"] += seconds
    total, server = sum(party.values()), party[SERVER]
    count = len(case.survivors)
    difference = max(
        float(np.max(np.abs(mine - plain)))
        for mine, plain in zip(measured.mean, exact, strict=True)
    )
    return {
        "cpu_s": total,
        "cpu_without_fedavg_s": total - phases.get("server.fedavg", 0.0),
        "hospitals_cpu_s": total - server,
        "hospital_cpu_s": sum(party[name] for name in case.survivors) / count,
        "server_cpu_s": server,
        "bytes_up": round(sum(measured.up[name] for name in case.survivors) / count),
        "bytes_down": round(sum(measured.down[name] for name in case.survivors) / count),
        "max_error": difference / RANGE,
        "phases_s": dict(phases),
    }


def _medians(figures: Sequence[Row]) -> Row:
    if not figures:
        return dict.fromkeys((*FIGURES, "cpu_s_all"))
    result: Row = {key: statistics.median(f[key] for f in figures) for key in FIGURES[:-1]}
    for key in ("bytes_up", "bytes_down"):
        result[key] = round(result[key])
    result["max_error"] = max(f["max_error"] for f in figures)
    result["phases_s"] = {
        phase: statistics.median(f["phases_s"][phase] for f in figures)
        for phase in figures[0]["phases_s"]
    }
    result["cpu_s_all"] = [f["cpu_s"] for f in figures]
    return result


def _ratio(mine: float | None, theirs: float | None) -> float | None:
    return mine / theirs if mine is not None and theirs else None


# Masks -----------------------------------------------------------------------------------


def measure_masks(parameters: int, *, repeat: int = 9) -> Row:
    """One mask (made and applied) and one encoding of each protocol; median CPU seconds.

    GB/s counts four bytes a parameter for both: what has to be hidden, whatever the generator
    writes (the stock one makes eight).
    """
    case = Case(parameters=parameters, hospitals=5, dropouts=0)
    name = case.names[0]
    update, weight, key = case.update(name), case.weight(name), hashlib.sha256(b"key").digest()
    flat, layers = flatten(update), list(update.values())
    params = SecAggParams(max_cohort=50)
    layout = update_layout(parameters, bound=RANGE, max_weight=MAX_WEIGHT)
    vector = np.zeros(parameters, np.uint32)
    stock = [np.zeros(layer.size, np.int64) for layer in layers]
    shapes = [layer.shape for layer in layers]
    levels, modulus = 1 << 22, 1 << 32
    chunk = memoryview(bytearray(1 << 20))

    def stream() -> None:
        cipher = KeyStream(key)
        for start in range(0, 4 * parameters, len(chunk)):
            cipher.fill(chunk[: min(len(chunk), 4 * parameters - start)])

    def stock_mask() -> None:
        parameters_addition(stock, pseudo_rand_gen(key, modulus, shapes))

    def stock_encode() -> None:
        ratio = round(weight / MAX_WEIGHT * levels)
        scaled = parameters_multiply(layers, ratio / levels)
        factor_combine(ratio, quantize(scaled, RANGE, levels))

    tasks: dict[str, Callable[[], object]] = {
        "mask": lambda: add_mask(vector, key, 1),
        "stock_mask": stock_mask,
        "stream": stream,
        "stock_generator": lambda: pseudo_rand_gen(key, modulus, shapes),
        "encode": lambda: encode(layout, params, {"update": flat}, weight=weight),
        "stock_encode": stock_encode,
    }
    spent: dict[str, list[float]] = {task: [] for task in tasks}
    for _ in range(repeat):
        for task, run in tasks.items():
            before = time.process_time()
            run()
            spent[task].append(time.process_time() - before)
    median = {task: statistics.median(times) for task, times in spent.items()}
    gigabytes = 4 * parameters / 1e9
    row: Row = {"kind": "masks", "parameters": parameters, "repeats": repeat}
    for task, seconds in median.items():
        row[f"{task}_ms"] = 1e3 * seconds
        if "encode" not in task:
            row[f"{task}_gb_per_s"] = gigabytes / seconds if seconds else None
    row["ratio_mask"] = _ratio(median["mask"], median["stock_mask"])
    row["ratio_encode"] = _ratio(median["encode"], median["stock_encode"])
    return row | {"environment": environment()}


# The command -----------------------------------------------------------------------------


def key_of(row: Mapping[str, Any]) -> tuple[int, ...]:
    """What makes two rows one cell."""
    fields = ("parameters", "num_shares", "threshold", "hospitals", "dropouts")
    return tuple(row[field] for field in fields)


def run_cells(
    cases: Sequence[Case], out: Path, *, repeat: int, limit: float, fresh: bool, console: Console
) -> list[Row]:
    """Measure what ``out`` does not hold yet (or holds with an error), saved cell by cell."""
    rows: dict[tuple[int, ...], Row] = {}
    if out.exists() and not fresh:
        rows = {key_of(row): row for row in read_json(out)}
    missing = [c for c in cases if rows.get(key_of(vars(c)), {"error": ""})["error"] is not None]
    if missing:
        # Imports, caches and the allocator's thresholds: otherwise the first cell pays for them.
        measure(min(missing, key=lambda case: case.hospitals), limit=limit)
    for case in missing:
        key = key_of(vars(case))
        started = time.monotonic()
        rows[key] = measure(case, repeat=repeat, limit=limit)
        write_json(out, [rows[k] for k in sorted(rows)])
        console.print(
            f"{case.hospitals} hospitals, {case.dropouts} dropped: "
            f"{rows[key]['repeats']} × in {time.monotonic() - started:.0f} s"
            + (f"; {rows[key]['error']}" if rows[key]["error"] else "")
        )
    return [rows[key_of(vars(case))] for case in cases]


def show(rows: Sequence[Row], masks: Row | None, console: Console) -> None:
    """The tables, and what was aimed at beside what came out."""
    cpu = Table(title="CPU seconds of a round (ours / stock)")
    traffic = Table(title="Bytes per hospital (ours / stock), and the mean's largest error")
    for table, columns in (
        (cpu, ("total", "ratio", "w/o FedAvg", "per hospital", "server", "repeats")),
        (traffic, ("MB up", "ratio", "kB down", "max error / range")),
    ):
        for column in ("hospitals", "dropped", *columns):
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        head = [str(row["hospitals"]), str(row["dropouts"])]
        cpu.add_row(
            *head,
            _pair(row, "cpu_s", "{:.2f}"),
            _number(row["ratio_cpu"], "{:.3f}"),
            _number(row["ratio_cpu_without_fedavg"], "{:.3f}"),
            _pair(row, "hospital_cpu_s", "{:.3f}"),
            _pair(row, "server_cpu_s", "{:.2f}"),
            str(row["repeats"]),
        )
        traffic.add_row(
            *head,
            _pair(row, "bytes_up", "{:.3f}", 1e-6),
            _number(row["ratio_bytes_up"], "{:.4f}"),
            _pair(row, "bytes_down", "{:.1f}", 1e-3),
            f"{_number(row['max_error'], '{:.1e}')} / {_number(row['stock_max_error'], '{:.1e}')}",
        )
    console.print(cpu)
    console.print(traffic)
    if masks is not None:
        single = Table(title=f"One mask, one encoding ({masks['parameters']:,} parameters)")
        for column in ("", "ours ms", "stock ms", "ours GB/s", "stock GB/s"):
            single.add_column(column, justify="right")
        for what, mine, theirs in (
            ("mask, made and added", "mask", "stock_mask"),
            ("generator alone", "stream", "stock_generator"),
            ("encoding", "encode", "stock_encode"),
        ):
            single.add_row(
                what,
                *(_number(masks[f"{task}_ms"], "{:.1f}") for task in (mine, theirs)),
                *(_number(masks.get(f"{task}_gb_per_s"), "{:.2f}") for task in (mine, theirs)),
            )
        console.print(single)
    for line in targets(rows, masks):
        console.print(line)


def targets(rows: Sequence[Row], masks: Row | None) -> list[str]:
    """One line for each target that these rows can speak about: met or missed, with figures."""
    lines = []
    for row in rows:
        if row["error"] is not None:
            lines.append(f"{row['hospitals']} hospitals, {row['dropouts']} dropped: {row['error']}")
            continue
        where = f"{row['hospitals']} hospitals, {row['dropouts']} dropped"
        if row["hospitals"] == 20:
            lines.append(_target(f"CPU at {where}", row["ratio_cpu"], 1 / 3))
        lines.append(_target(f"bytes up at {where}", row["ratio_bytes_up"], 0.55))
    whole = [row for row in rows if row["error"] is None and row["dropouts"] == 0]
    if len(whole) > 1:
        first, last = min(whole, key=_size), max(whole, key=_size)
        growth = last["ours_hospital_cpu_s"] / first["ours_hospital_cpu_s"]
        lines.append(
            f"a hospital's CPU with {last['hospitals']} hospitals is {growth:.2f} of that with "
            f"{first['hospitals']}, whose number of neighbours is the same"
        )
    if masks is not None:
        speed = masks["mask_gb_per_s"]
        lines.append(f"mask: {speed:.2f} GB/s, at least 1: {'met' if speed >= 1 else 'MISSED'}")
    return lines


def _size(row: Row) -> int:
    return int(row["hospitals"])


def _target(what: str, ratio: float, most: float) -> str:
    return f"{what}: {ratio:.3f} of stock's, at most {most:.3f}: " + (
        "met" if ratio <= most else "MISSED"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _pair(row: Row, key: str, form: str, scale: float = 1.0) -> str:
    values = (row[f"ours_{key}"], row[f"stock_{key}"])
    return " / ".join(_number(None if v is None else v * scale, form) for v in values)


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}", f"give numbers, as in {option} 5,10") from None


cli = typer.Typer(pretty_exceptions_enable=False)


@cli.command()
def benchmark(
    hospitals: Annotated[str, typer.Option(help="Cohorts, comma-separated.")] = "5,10,20,50",
    dropouts: Annotated[str, typer.Option(help="Drop-outs, comma-separated.")] = "0,1",
    parameters: Annotated[int, typer.Option(min=1, help="Values in an update.")] = PARAMETERS,
    num_shares: Annotated[int, typer.Option(help="A hospital's neighbourhood, and itself.")] = 5,
    threshold: Annotated[int, typer.Option(help="Shares that reconstruct a secret.")] = 4,
    repeat: Annotated[int, typer.Option(min=1, help="Runs of a cell, where that is cheap.")] = 3,
    limit: Annotated[float, typer.Option(help="Wall seconds that a cell may take.")] = 360,
    out: Annotated[Path, typer.Option(help="Results; what is there is not run again.")] = RESULTS,
    masks: Annotated[bool, typer.Option(help="Also one mask by itself.")] = True,
    fresh: Annotated[bool, typer.Option(help="Start anew.")] = False,
) -> None:
    """Measure our secure aggregation beside Flower's stock SecAgg+."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    cases = [
        Case(
            parameters=parameters,
            hospitals=count,
            dropouts=lost,
            num_shares=num_shares,
            threshold=threshold,
        )
        for count in _numbers(hospitals, "--hospitals")
        for lost in _numbers(dropouts, "--dropouts")
    ]
    for case in cases:
        if not num_shares <= case.hospitals or not 0 <= case.dropouts < case.hospitals:
            raise ConfigError(
                f"{case.hospitals} hospitals with {num_shares} shares and {case.dropouts} dropped",
                "give at least as many hospitals as shares, and fewer drop-outs than hospitals",
            )
    beside = out.with_name(f"{out.stem}_masks.json")
    single = None
    if masks:
        single = read_json(beside) if beside.exists() and not fresh else None
        if single is None or single["parameters"] != parameters:
            single = measure_masks(parameters)
            write_json(beside, single)
    rows = run_cells(cases, out, repeat=repeat, limit=limit, fresh=fresh, console=console)
    show(rows, single, console)


def main() -> None:
    """Entry point: a ConsiliumError becomes its two parts on stderr and exit code 1."""
    try:
        cli()
    except ConsiliumError as error:
        typer.secho(f"error: {error.what}", fg=typer.colors.RED, err=True)
        typer.echo(f"what to do: {error.remedy}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()

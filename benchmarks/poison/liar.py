"""A hospital that lies, inside the protocol: it keeps every stage, and masks whatever it likes.

The liar is a node that runs the product's own ClientApp and, before its vector is masked, replaces
it by another one: its state is its own. Ranges of the layout bind it in nothing. Its images may
have wrong labels as well. Nothing of the protocol can tell it from an honest hospital.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from client_app import secagg, work
from client_app.app import app
from client_app.data import HospitalData
from client_app.hospital import Hospital
from common.aggregation import GRADIENT
from common.messages import RAW, Report
from common.secagg import WEIGHT, RoundBinding
from common.secagg.encoding import ring_dtype

TRAIN = "train"


@dataclass(frozen=True)
class Lie:
    """What one hospital does to its own vector.

    ``scale``: its update is multiplied by it (in the sum, whatever weight it claims). ``constant``:
    each entry of the update is this instead. ``labels``: it trains on wrong ones (each class is
    called the next). ``claims``: images that it says it has, its update weighted accordingly; 0:
    those that it has. ``figures``: share of its own validation images, times this, that it adds to
    the right answers of the sum. ``pause``: it lies in every round but each ``pause``-th.
    """

    scale: float = 1.0
    constant: float | None = None
    labels: bool = False
    claims: int = 0
    figures: float = 0.0
    pause: int = 0


LIES: Mapping[str, Lie] = {
    "sign-flipped": Lie(scale=-1.0),
    "sign-flipped ×10": Lie(scale=-10.0),
    "range limit": Lie(constant=-1.0),
    "range limit, claimed count": Lie(constant=-1.0, claims=16_384),
    "wrong labels": Lie(labels=True),
    "wrong labels ×10": Lie(labels=True, scale=10.0),
    "wrong labels, claimed count": Lie(labels=True, claims=16_384),
}
"""Of the benchmark's table, by name."""


class LyingApp(ClientApp):
    """The product's ClientApp, at some hospitals (partition id → lie) with lies."""

    def __init__(self, lies: Mapping[int, Lie]) -> None:
        super().__init__()
        self.lies = dict(lies)

    def __call__(self, message: Message, context: Context) -> Message:
        """As Flower calls it."""
        number = int(context.node_config["partition-id"])
        lie = self.lies.get(number)
        if lie is None or message.metadata.message_type != TRAIN or self._rests(message, lie):
            return app(message, context)
        with _wrong_labels() if lie.labels else nullcontext():
            reply = app(message, context)
        if secagg.round_at_hand(context) is not None:
            _lie_in_vector(context, lie)
        elif "report" in reply.content:
            _lie_in_clear(reply, lie)
        return reply

    @staticmethod
    def _rests(message: Message, lie: Lie) -> bool:
        number = int(message.content.config_records["job"]["round"])  # type: ignore[arg-type]
        return bool(lie.pause) and number % lie.pause == 0


@contextmanager
def _wrong_labels() -> Iterator[None]:
    honest: Callable[[Hospital], HospitalData] = work.data_of

    def lying(hospital: Hospital) -> HospitalData:
        data = honest(hospital)
        labels = (data.train.labels + 1) % data.num_classes
        return replace(data, train=replace(data.train, labels=labels))

    with patch.object(work, "data_of", lying):
        yield


def _lie_in_vector(context: Context, lie: Lie) -> None:
    """Replace the vector that waits in the node's own state, to be masked next."""
    record = context.state.config_records["secagg-state"]
    binding = RoundBinding.from_bytes(bytes(record["binding"]))  # type: ignore[arg-type]
    kept = context.state.array_records["secagg-input"]["vector"]
    vector = np.frombuffer(kept.data, dtype=kept.dtype).copy()
    bits = binding.params.ring_bits
    plans = {plan.segment.name: plan for plan in binding.layout.plan(binding.params)}

    def read(name: str) -> np.ndarray:
        ring = vector[plans[name].start : plans[name].stop].astype(np.int64)
        half = 1 << (bits - 1)
        return np.where(ring >= half, ring - (1 << bits), ring) if bits < 64 else ring

    def write(name: str, values: np.ndarray) -> None:
        ring = np.rint(values).astype(np.int64) & ((1 << bits) - 1 if bits < 64 else -1)
        vector[plans[name].start : plans[name].stop] = ring.astype(ring_dtype(bits))

    name = GRADIENT if GRADIENT in plans else "update"
    weight, update = int(read(WEIGHT)[0]), read(name).astype(np.float64)
    claimed = lie.claims or weight
    if lie.constant is not None:
        update = np.full_like(update, lie.constant * plans[name].scale)
        if name == GRADIENT:
            update /= plans[name].segment.step
        update *= claimed
    else:
        update *= lie.scale * claimed / weight
    write(name, update)
    write(WEIGHT, np.array([claimed]))
    if lie.figures:
        right = read("val-correct") + lie.figures * read("val-examples")
        write("val-correct", right)
    stored = Array(str(vector.dtype), vector.shape, RAW, vector.tobytes())
    context.state["secagg-input"] = ArrayRecord({"vector": stored})


def _lie_in_clear(reply: Message, lie: Lie) -> None:
    head = reply.content.config_records["report"]
    run, round_ = str(head["run"]), int(head["round"])  # type: ignore[arg-type]
    report = Report.from_record(reply.content, run=run, round=round_)
    update = {
        name: np.full_like(a, lie.constant) if lie.constant is not None else a * lie.scale
        for name, a in report.update.items()
    }
    metrics = dict(report.metrics)
    metrics["examples"] = float(lie.claims or metrics["examples"])
    reply.content = replace(
        report, update={n: a.astype(report.update[n].dtype) for n, a in update.items()},
        metrics=metrics,
    ).to_record()  # fmt: skip

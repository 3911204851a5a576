"""The server of a round in a process of its own, so that its time and memory are its alone.

What it is told and tells goes over a pipe: a line of JSON, then bytes. Nothing is unpickled. With
``records`` messages come and go as Flower's serialised records, as a ServerApp has them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from benchmarks.machine import peak_rss, rss
from benchmarks.measure import CpuClock
from benchmarks.secagg.case import SERVER, Case
from benchmarks.secagg.ours import binding_of, identity_of
from common.messages import Envelope
from common.secagg import ServerRound, decode

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576"}
"""glibc gives blocks of over 1 MB back when they are freed: what the process holds is what the
server holds, and not what its allocator keeps."""
SAMPLED = 997
"""Coordinates of the mean that are told back, to be compared with float64 arithmetic."""


class Seat:
    """The server's process, as its benchmark speaks with it."""

    def __init__(self, case: Case, *, records: bool) -> None:
        self.records = records
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        told = json.dumps({"case": asdict(case), "records": records})
        self._process = context.Process(target=serve, args=(theirs, told), daemon=True)
        before = dict(os.environ)
        os.environ.update(ALLOCATOR)
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self.base_mb = float(self._heard()["rss_mb"])
        """Resident memory before the round, everything imported."""

    def collect(self, stage: str, name: str, answer: bytes) -> None:
        """Hand over a hospital's answer; RuntimeError if it is refused."""
        told = self._ask({"do": "collect", "stage": stage, "name": name}, answer)
        if not told["taken"]:
            raise RuntimeError(f"{name} was refused at {stage}: {told['dropped']}")

    def close_stage(self, stage: str) -> Mapping[str, bytes] | bytes:
        """Close a stage: what to send next, the same for all or for each."""
        told = self._ask({"do": "close", "stage": stage})
        if told["names"] is None:
            return self._pipe.recv_bytes()
        return {name: self._pipe.recv_bytes() for name in told["names"]}

    def finish(self) -> dict[str, Any]:
        """Unmask: ``weight``, sampled ``mean``, ``cpu`` by phase; the process ends.

        ``collected_mb``: most resident memory until all masked vectors were in; ``peak_mb``: ever.
        """
        told = self._ask({"do": "finish"})
        self._process.join(60)
        return told

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._pipe.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join(10)

    def _ask(self, question: Mapping[str, Any], data: bytes | None = None) -> dict[str, Any]:
        self._pipe.send_bytes(json.dumps(question).encode())
        if data is not None:
            self._pipe.send_bytes(data)
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        if "error" in told:
            raise RuntimeError(told["error"])
        return told


@contextmanager
def seat(case: Case, *, records: bool) -> Iterator[Seat]:
    """A server for one round; its process ends with the block."""
    server = Seat(case, records=records)
    try:
        yield server
    finally:
        server.end()


def wire(message: bytes) -> bytes:
    """A protocol message as the bytes of Flower's record."""
    data: bytes = recorddict_to_proto(Envelope(message).to_record()).SerializeToString()
    return data


def unwire(data: bytes) -> bytes:
    """The protocol message in the bytes of Flower's record."""
    record = recorddict_from_proto(ProtoRecordDict.FromString(data))
    payload: bytes = Envelope.from_record(record).payload
    return payload


def sampled(length: int) -> np.ndarray:
    """Which coordinates are compared: spread evenly, first and last among them."""
    return np.unique(np.linspace(0, length - 1, min(SAMPLED, length)).astype(np.int64))


def serve(pipe: Connection, told: str) -> None:
    """Be the server of one round."""
    asked = json.loads(told)
    case, records = Case(**asked["case"]), bool(asked["records"])
    clock = CpuClock()
    binding = binding_of(case)
    roster = {name: identity_of(name).public for name in case.names}
    server = ServerRound(binding, case.names, roster=roster)

    collected = 0.0

    def say(**values: Any) -> None:
        pipe.send_bytes(json.dumps(values).encode())

    def send(message: bytes) -> None:
        if records:
            with clock.on(SERVER, "records"):
                message = wire(message)
        pipe.send_bytes(message)

    def collect(stage: str, name: str) -> None:
        data = pipe.recv_bytes()
        if records:
            with clock.on(SERVER, "records"):
                data = unwire(data)
        with clock.on(SERVER, stage):
            taken = _collector(server, stage)(name, data)
        say(taken=taken, dropped=str(server.outcome.dropped.get(name)))

    def close(stage: str) -> None:
        nonlocal collected
        if stage == "masked":
            collected = peak_rss()
        with clock.on(SERVER, stage):
            message = _closer(server, stage)()
        if isinstance(message, bytes):
            say(names=None)
            send(message)
            return
        say(names=list(message))
        for single in message.values():
            send(single)

    def finish() -> None:
        with clock.on(SERVER, "unmask"):
            total = server.finish()
        with clock.on(SERVER, "decode"):
            values = decode(binding.layout, binding.params, total)
            values["update"] /= values["weight"][0]
        say(
            weight=float(values["weight"][0]),
            mean=values["update"][sampled(case.parameters)].tolist(),
            cpu={phase: seconds for (_, phase), seconds in clock.seconds.items()},
            collected_mb=collected,
            peak_mb=peak_rss(),
        )

    say(rss_mb=rss())
    try:
        while True:
            question = json.loads(pipe.recv_bytes())
            if question["do"] == "collect":
                collect(question["stage"], question["name"])
            elif question["do"] == "close":
                close(question["stage"])
            else:
                finish()
                return
    except EOFError:
        return
    except Exception as error:
        say(error=f"{type(error).__name__}: {error}")


def _collector(server: ServerRound, stage: str) -> Callable[[str, bytes], bool]:
    return {
        "advertise": server.collect_advertisement,
        "share": server.collect_shares,
        "masked": server.collect_masked,
        "consistency": server.collect_consistency,
        "unmask": server.collect_unmask,
    }[stage]


def _closer(server: ServerRound, stage: str) -> Callable[[], Any]:
    return {
        "advertise": server.close_advertise,
        "share": server.close_shares,
        "masked": server.close_masked,
        "consistency": server.close_consistency,
    }[stage]

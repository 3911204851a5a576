"""Ours: the state machines of :mod:`common.secagg`, and the adapters' work around them."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from benchmarks.measure import CpuClock, travel
from benchmarks.secagg.case import MAX_WEIGHT, RANGE, SEED, SERVER, Case, Layers
from benchmarks.secagg.figures import Measured
from common.aggregation import flatten, unflatten
from common.messages import RAW, Envelope
from common.secagg import (
    HospitalRound,
    Identity,
    RoundBinding,
    RoundTerms,
    SecAggParams,
    SecAggPolicy,
    ServerRound,
    decode,
    encode,
    update_layout,
)

MODEL = bytes(32)
POLICY = SecAggPolicy(require_roster=True, min_threshold=3, min_cohort=3, min_shares=3)

_STATE, _INPUT = "secagg-state", "secagg-input"


class Hospital:
    """A hospital as client_app.secagg runs one: between two messages it is records on its node.

    The marks on its disk are left out.
    """

    def __init__(self, name: str, roster: Mapping[str, bytes], clock: CpuClock) -> None:
        self.name, self.roster, self.clock = name, roster, clock
        self.identity = identity_of(name)
        self.state = RecordDict()

    def advertise(self, message: bytes) -> bytes:
        """Accept the round and send this round's keys."""
        binding = RoundBinding.from_bytes(message)
        machine, answer = HospitalRound.advertise(
            self.name, binding, identity=self.identity, policy=POLICY, model_hash=MODEL
        )
        self._store(machine, binding, secrets.token_hex(16))
        return answer

    def encode(self, update: Layers, weight: int) -> None:
        """Encode the update and keep it as raw bytes in an array, as Context.state does.

        A node does so before it advertises. Here it waits for the masked stage, so that one
        vector is held and not one of each hospital; the lost encode too, before they are lost.
        """
        _, binding, _ = self._load()
        with self.clock.on(self.name, "encode"):
            values = {"update": flatten(update)}
            vector = encode(binding.layout, binding.params, values, weight=weight).vector
        with self.clock.on(self.name, "keep"):
            stored = Array(str(vector.dtype), vector.shape, RAW, vector.tobytes())
            self.state[_INPUT] = ArrayRecord({"vector": stored})

    def share(self, message: bytes) -> bytes:
        """Share the secrets with the neighbours."""
        return self._step(
            lambda m: m.share(message, identity=self.identity, policy=POLICY, roster=self.roster)
        )

    def masked(self, message: bytes) -> bytes:
        """Mask the vector that was encoded and hand it over."""
        with self.clock.on(self.name, "keep"):
            kept = self.state.array_records[_INPUT]["vector"]
            vector = np.frombuffer(bytearray(kept.data), dtype=kept.dtype)
            del self.state[_INPUT]
        return self._step(lambda m: m.masked_input(message, vector))

    def consistency(self, message: bytes) -> bytes:
        """Sign who survived."""
        return self._step(lambda m: m.consistency(message, identity=self.identity, policy=POLICY))

    def unmask(self, message: bytes) -> bytes:
        """Reveal one share for each neighbour, and forget the round."""
        machine, _, _ = self._load()
        answer = machine.unmask(message)
        del self.state[_STATE]
        return answer

    def _step(self, act: Callable[[HospitalRound], bytes]) -> bytes:
        machine, binding, token = self._load()
        answer = act(machine)
        self._store(machine, binding, token)
        return answer

    def _load(self) -> tuple[HospitalRound, RoundBinding, str]:
        record = self.state.config_records[_STATE]
        machine = HospitalRound.from_bytes(bytes(record["machine"]))  # type: ignore[arg-type]
        binding = RoundBinding.from_bytes(bytes(record["binding"]))  # type: ignore[arg-type]
        return machine, binding, str(record["token"])

    def _store(self, machine: HospitalRound, binding: RoundBinding, token: str) -> None:
        self.state[_STATE] = ConfigRecord(
            {"machine": machine.to_bytes(), "binding": binding.to_bytes(), "token": token}
        )


class _Ours:
    """The server and its hospitals, with RecordDicts between them as server_app sends them."""

    def __init__(self, case: Case, clock: CpuClock) -> None:
        self.case, self.clock = case, clock
        self.up: Counter[str] = Counter()
        self.down: Counter[str] = Counter()
        roster = {name: identity_of(name).public for name in case.names}
        self.hospitals = {name: Hospital(name, roster, clock) for name in case.names}
        with clock.on(SERVER, "setup"):
            self.binding = binding_of(case)
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


def binding_of(case: Case) -> RoundBinding:
    """The round that all parties of ``case`` are in."""
    return RoundBinding(
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
        terms=RoundTerms(config=MODEL),
    )


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


def identity_of(name: str) -> Identity:
    """The hospital's identity key, the same in every run."""
    return Identity(hashlib.sha256(f"{SEED}/{name}".encode()).digest())

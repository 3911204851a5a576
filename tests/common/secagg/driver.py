"""A whole round in memory, stage by stage, with drop-outs wherever a test wants them.

Every hand-over goes through ``to_bytes``/``from_bytes``, as it does between two processes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest

from common.secagg import (
    HospitalRound,
    Identity,
    Refusal,
    RoundBinding,
    RoundTerms,
    SecAggParams,
    SecAggPolicy,
    Segment,
    ServerRound,
    VectorLayout,
    decode,
    encode,
)
from common.secagg.masks import RingArray

STAGES = ("advertise", "share", "masked", "consistency", "unmask")
MODEL = bytes(range(32))
TERMS = RoundTerms(config=bytes(32))
POLICY = SecAggPolicy(min_cohort=3, min_threshold=3, min_shares=3, min_ring_bits=16)
IDENTITIES = {f"h{index:02d}": Identity(bytes([index + 1]) * 32) for index in range(16)}
ROSTER = {name: identity.public for name, identity in IDENTITIES.items()}

Drops = Mapping[str, Collection[str]]
"""Per stage, who does not answer in it."""


def one_hot_layout(count: int) -> VectorLayout:
    """One integer slot a hospital: a double count is a 2, a loss a 0."""
    return VectorLayout((Segment(name="slots", length=count, bound=1, kind="integer"),))


def binding_for(params: SecAggParams, layout: VectorLayout, **changes: object) -> RoundBinding:
    base = RoundBinding(
        run="run-1", round=3, purpose="update", params=params, layout=layout, model_hash=MODEL,
        terms=TERMS,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


@dataclass
class Drive:
    """A server, its hospitals (as stored bytes), and each one's encoded vector."""

    names: list[str]
    binding: RoundBinding
    vectors: dict[str, RingArray]
    roster: Mapping[str, bytes] | None = field(default_factory=lambda: ROSTER)
    states: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.server = ServerRound(self.binding, self.names, roster=self.roster)

    @classmethod
    def one_hot(cls, count: int, params: SecAggParams | None = None, **changes: object) -> Drive:
        params = params or SecAggParams(max_cohort=max(count, 5))
        names = list(IDENTITIES)[:count]
        layout = one_hot_layout(count)
        vectors = {}
        for place, name in enumerate(names):
            slots = np.zeros(count, dtype=np.int64)
            slots[place] = 1
            vectors[name] = encode(layout, params, {"slots": slots}, weight=1).vector
        return cls(names, binding_for(params, layout, **changes), vectors)

    def hospital(self, name: str) -> HospitalRound:
        return HospitalRound.from_bytes(self.states[name])

    def advertise(self, name: str, binding: RoundBinding | None = None) -> bytes:
        hospital, message = HospitalRound.advertise(
            name,
            binding or self.binding,
            identity=IDENTITIES[name],
            policy=POLICY,
            model_hash=MODEL,
        )
        self.states[name] = hospital.to_bytes()
        return message

    def step(self, name: str, act: Callable[[HospitalRound], bytes]) -> bytes:
        """One stage of a hospital in a process of its own."""
        hospital = self.hospital(name)
        try:
            return act(hospital)
        finally:
            self.states[name] = hospital.to_bytes()

    def share(self, name: str, message: bytes) -> bytes:
        return self.step(
            name,
            lambda h: h.share(
                message, identity=IDENTITIES[name], policy=POLICY, roster=self.roster
            ),
        )

    def masked(self, name: str, message: bytes) -> bytes:
        return self.step(name, lambda h: h.masked_input(message, self.vectors[name].copy()))

    def consistency(self, name: str, message: bytes) -> bytes:
        return self.step(
            name, lambda h: h.consistency(message, identity=IDENTITIES[name], policy=POLICY)
        )

    def unmask(self, name: str, message: bytes) -> bytes:
        return self.step(name, lambda h: h.unmask(message))

    def run(self, drops: Drops | None = None, until: str = "done") -> object:
        """Play up to, not including, ``until``; what the server would send there.

        With ``until="done"``: the ring sum.
        """
        drops = drops or {}
        server, sent = self.server, {}  # type: ignore[var-annotated]
        if until == "advertise":
            return self.binding.to_bytes()
        for name in self._alive(drops, "advertise"):
            server.collect_advertisement(name, self.advertise(name))
        cohort = server.close_advertise()
        if until == "share":
            return cohort
        for name in self._alive(drops, "share"):
            server.collect_shares(name, self.share(name, cohort))
        relays = server.close_shares()
        if until == "masked":
            return relays
        for name in self._alive(drops, "masked"):
            sent[name] = self.masked(name, relays[name])
            server.collect_masked(name, sent[name])
        survivors = server.close_masked()
        if until == "consistency":
            return survivors
        for name in self._alive(drops, "consistency"):
            server.collect_consistency(name, self.consistency(name, survivors))
        signatures = server.close_consistency()
        if until == "unmask":
            return signatures
        for name in self._alive(drops, "unmask"):
            server.collect_unmask(name, self.unmask(name, signatures))
        return server.finish()

    def sums(self, drops: Drops | None = None) -> dict[str, npt.NDArray[np.float64]]:
        total = self.run(drops)
        return decode(self.binding.layout, self.binding.params, total)  # type: ignore[arg-type]

    def _alive(self, drops: Drops, stage: str) -> list[str]:
        assert self.server.stage == stage
        return [name for name in self.server.pending if name not in drops.get(stage, ())]


def refused(code: str, drive: Drive, name: str, act: Callable[[], object]) -> Refusal:
    """``act`` is refused with ``code``, and hospital ``name`` has nothing left to reveal."""
    with pytest.raises(Refusal) as caught:
        act()
    assert caught.value.code == code
    hospital = drive.hospital(name)
    assert hospital.stage == "dead"
    state = hospital._state
    assert (state.channel_private, state.mask_private, state.seed, state.held) == (b"",) * 3 + ({},)
    with pytest.raises(Refusal):
        hospital.unmask(b"")
    return caught.value

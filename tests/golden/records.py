"""One record of each kind that travels, and the messages of one round of secure aggregation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as Proto

from common.messages import (
    SMALL,
    Challenge,
    Comparison,
    Delivery,
    Envelope,
    Greeting,
    Job,
    Offer,
    Receipt,
    Refusal,
    Report,
)
from common.secagg import HospitalRound, RoundBinding, RoundTerms, SecAggParams, ServerRound, encode
from common.secagg.layout import update_layout
from common.secagg.params import SecAggPolicy
from common.vectors import base_id
from tests.golden.fixed import identity, stream

MODEL = bytes(range(32))
RUN, ROUND = "20260101-120000-0a1b2c3d", 3
WEIGHTS = {
    "body.bias": np.arange(6, dtype=np.float32).reshape(2, 3),
    "steps": np.array(7, dtype=np.int64),
}
FIXED = {"prior.mean": np.linspace(0, 1, 4, dtype=np.float32)}
CANDIDATE = {name: np.asarray(array + 1, array.dtype) for name, array in WEIGHTS.items()}
UPDATE = {"body.bias": np.full((2, 3), -0.5, dtype=np.float32)}
DIGESTS = tuple(letter * 64 for letter in "0af")
SERIALS = tuple(letter * 32 for letter in "12a")
PAYLOAD = bytes(range(256))
BASE = base_id(MODEL, WEIGHTS)


def messages() -> dict[str, object]:
    """File name → the message of which it holds the record; every optional field is there."""
    challenge = Challenge(bytes(range(32)), "1.2.3")
    return {
        "challenge": challenge,
        "greeting": _greeting(challenge),
        "greeting-plain": Greeting("st-mary"),
        "refusal": Refusal("privacy-budget", "0a1b2c3d"),
        "job": Job(RUN, ROUND, MODEL, WEIGHTS, b"an invitation", FIXED, DIGESTS),
        "job-plain": Job(RUN, ROUND, MODEL, WEIGHTS),
        "report": Report(RUN, ROUND, "st-mary", {"examples": 5.0, "val-loss-sum": 0.5}, UPDATE),
        "report-of-validation": Report(RUN, ROUND, "st-mary", {"val-examples": 5.0}),
        "envelope": Envelope(PAYLOAD),
        "envelope-large": Envelope(PAYLOAD * (SMALL // 256) + b"+"),
        "offer": Offer(run=RUN, version=2, base=BASE, model_digest=MODEL, weights=WEIGHTS),
        "delivery": Delivery(
            run=RUN, hospital="st-mary", key=identity("st-mary").public, vector=b"a vector",
            withdrawals=(b"one", b"two"),
        ),
        "receipt": Receipt(
            run=RUN, accepted=SERIALS[:1], refused={SERIALS[1]: "vector-stale"},
            withdrawn=SERIALS[2:],
        ),
        "comparison": Comparison(
            run=RUN, round=ROUND, base=BASE, model_digest=MODEL, current=WEIGHTS,
            candidate=CANDIDATE, invitation=b"an invitation",
        ),
    }  # fmt: skip


def _greeting(challenge: Challenge) -> Greeting:
    # Not of the version of the package that makes the files.
    with patch("common.messages.answers.package_version", lambda: "1.2.3"):
        return Greeting.signed("st-mary", identity("st-mary"), challenge, run=5, node=7)


def to_bytes(record: RecordDict) -> bytes:
    """A record as Flower sends it, but for what it adds around."""
    return recorddict_to_proto(record).SerializeToString(deterministic=True)


def from_bytes(data: bytes) -> RecordDict:
    """:func:`to_bytes` undone."""
    return recorddict_from_proto(Proto.FromString(data))


def write_wire(folder: Path) -> None:
    """A file for each message."""
    for name, message in messages().items():
        (folder / f"{name}.pb").write_bytes(to_bytes(message.to_record()))  # type: ignore[attr-defined]


def binding() -> RoundBinding:
    """Of the round whose messages are kept."""
    return RoundBinding(
        run=RUN, round=ROUND, purpose="train", params=SecAggParams(max_cohort=5),
        layout=update_layout(3, bound=1.0, max_weight=100), model_hash=MODEL,
        terms=RoundTerms(config=bytes(range(32))),
    )  # fmt: skip


def stages() -> Mapping[str, bytes]:
    """File name → message: a round of five hospitals, one of which falls silent when masked."""
    # Of all that is random, Shamir's coefficients alone are not the caller's to give.
    with patch("Crypto.Protocol.SecretSharing.rng", stream("shamir")):
        return _stages()


def _stages() -> Mapping[str, bytes]:
    policy = SecAggPolicy(min_cohort=3, min_threshold=3, min_shares=3, min_ring_bits=16)
    names = [f"hospital-{i:02d}" for i in range(5)]
    keys = {name: identity(name) for name in names}
    roster = {name: key.public for name, key in keys.items()}
    bound = binding()
    server = ServerRound(bound, names, roster=roster)
    found: dict[str, bytes] = {"invitation": bound.to_bytes()}
    hospitals: dict[str, HospitalRound] = {}

    def keep(name: str, kind: str, message: bytes) -> bytes:
        if name == names[0]:
            found[kind] = message
            found[f"state-{hospitals[name].stage}"] = hospitals[name].to_bytes()
        return message

    for name in names:
        hospitals[name], message = HospitalRound.advertise(
            name, bound, identity=keys[name], policy=policy, model_hash=MODEL, entropy=stream(name)
        )
        server.collect_advertisement(name, keep(name, "advertisement", message))
    found["cohort"] = cohort = server.close_advertise()
    for name in names:
        shared = hospitals[name].share(
            cohort, identity=keys[name], policy=policy, roster=roster, entropy=stream(f"{name} b")
        )
        server.collect_shares(name, keep(name, "shares", shared))
    relays = server.close_shares()
    found["relay"] = relays[names[0]]
    for name in names[:-1]:
        vector = encode(
            bound.layout, bound.params, {"update": np.ones(3)}, weight=10, entropy=stream("round")
        ).vector
        masked = hospitals[name].masked_input(relays[name], vector)
        server.collect_masked(name, keep(name, "masked", masked))
    found["survivors"] = survivors = server.close_masked()
    for name in names[:-1]:
        signed = hospitals[name].consistency(survivors, identity=keys[name], policy=policy)
        server.collect_consistency(name, keep(name, "signature", signed))
    found["signatures"] = signatures = server.close_consistency()
    for name in names[:-1]:
        server.collect_unmask(name, keep(name, "revealed", hospitals[name].unmask(signatures)))
    server.finish()
    return found


def write_secagg(folder: Path) -> None:
    """A file for each message, and the hospital's state after each stage."""
    for name, message in stages().items():
        (folder / f"{name}.bin").write_bytes(message)

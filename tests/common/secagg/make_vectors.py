"""Writes vectors.json: run it only when the protocol's version changes, and say why.

``python -m tests.common.secagg.make_vectors``. Everything secret comes from a counter, so
that the bytes are fixed; only Shamir's coefficients cannot be fixed, and its vector is a set
of shares with the secret that they must give.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import msgpack
import numpy as np

from common.secagg import HospitalRound, Identity, Roster, RosterEntry, SecAggParams
from common.secagg import messages as m
from common.secagg.encoding import encode, pack
from common.secagg.graph import CohortGraph
from common.secagg.keys import pair_mask_key, public_key, self_mask_key
from common.secagg.layout import update_layout
from common.secagg.masks import add_mask
from common.secagg.statements import SEED, ShareStatement, cohort_hash, commit, survivors_statement
from common.secagg.wire import VERSION
from tests.common.secagg.driver import IDENTITIES, MODEL, POLICY, binding_for

PATH = Path(__file__).with_name("vectors.json")
NAMES = ["h00", "h01", "h02", "h03", "h04", "h05", "h06"]
COORDINATOR = Identity(b"\xc0" * 32)


def counter(start: int) -> Callable[[int], bytes]:
    """Entropy that is not: each call gives its next number, over and over."""

    def numbers() -> Iterator[int]:
        yield from range(start, 256)

    numbered = numbers()
    return lambda count: bytes([next(numbered)]) * count


def good() -> dict[str, object]:
    """Every value of the protocol that has fixed bytes."""
    params = SecAggParams(max_cohort=7)
    layout = update_layout(4, bound=1.0, max_weight=10)
    binding = binding_for(params, layout)
    adverts = {}
    for place, name in enumerate(NAMES):
        _, adverts[name] = HospitalRound.advertise(
            name, binding, identity=IDENTITIES[name], policy=POLICY, model_hash=MODEL,
            entropy=counter(100 + 2 * place),
        )  # fmt: skip
    cohort = [m.read_advertisement(binding, data) for data in adverts.values()]
    context = cohort_hash(binding, cohort)
    graph = CohortGraph.build(NAMES, context, params)
    pair = pair_mask_key(bytes([101]) * 32, "h00", cohort[1].mask, "h01", context)
    vector = encode(
        layout, params, {"update": np.array([0.5, -1.0, 0.0, 1 / 3])}, weight=3, entropy=counter(9)
    ).vector
    encoded = pack(vector, 32)
    own = self_mask_key(b"\x55" * 32, "h00", context)
    add_mask(vector, own, 1)
    add_mask(vector, pair, 1)
    shares = dict.fromkeys(graph.of("h00"), (b"\x01" * 32, b"\x02" * 32))
    statement = ShareStatement.make("h00", IDENTITIES["h00"], context, b"\x55" * 32, shares)
    signature = IDENTITIES["h00"].sign(survivors_statement(context, NAMES))
    roster = Roster(
        "example", (RosterEntry("h00", IDENTITIES["h00"].public, "2026-01-01", "2027-01-01"),)
    )
    return {
        "invitation": binding.to_bytes().hex(),
        "binding": binding.digest.hex(),
        "public key": public_key(bytes([100]) * 32).hex(),
        "advertisement": adverts["h00"].hex(),
        "cohort": m.build_cohort(binding, cohort).hex(),
        "cohort hash": context.hex(),
        "neighbourhoods": {name: list(graph.of(name)) for name in NAMES},
        "pair mask key": pair.hex(),
        "self mask key": own.hex(),
        "encoded": encoded.hex(),
        "masked": m.build_masked(context, "h00", pack(vector, 32)).hex(),
        "seed commitment": commit(SEED, context, "h00", "", b"\x55" * 32).hex(),
        "share statement": m.build_shares(context, statement, []).hex(),
        "survivors": m.build_survivors(context, NAMES).hex(),
        "signature": m.build_signature(context, "h00", signature).hex(),
        "revealed": m.build_revealed(context, "h00", [("h01", SEED, bytes(32))]).hex(),
        "roster": roster.sign(COORDINATOR).decode(),
        "shamir": {
            "threshold": 3,
            "secret": "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
            "shares": fixed_shares(),
        },
    }


def fixed_shares() -> dict[str, str]:
    """Shares of 00..1f under p(x) = secret + a x + b x^2 over GF(2^128), a = 0x11.., b = 0x22.."""
    poly = (1 << 128) | 0x87

    def times(left: int, right: int) -> int:
        product = 0
        while right:
            product ^= left if right & 1 else 0
            left, right = left << 1, right >> 1
            left ^= poly if left >> 128 else 0
        return product

    a, b, shares = int("11" * 16, 16), int("22" * 16, 16), {}
    for index in range(1, 6):
        halves = (bytes(range(16)), bytes(range(16, 32)))
        values = [
            int.from_bytes(half, "big") ^ times(a, index) ^ times(b, times(index, index))
            for half in halves
        ]
        shares[str(index)] = b"".join(value.to_bytes(16, "big") for value in values).hex()
    return shares


def malformed(vectors: dict[str, object]) -> list[dict[str, str]]:
    """Messages that must be refused: the reader, the bytes, the code."""
    bad = []

    def add(reader: str, code: str, data: bytes, why: str) -> None:
        bad.append({"reader": reader, "code": code, "why": why, "bytes": data.hex()})

    for reader in READERS:
        data = bytes.fromhex(str(vectors[reader]))
        if reader == "masked":
            for cut, why in ((data[:-1], "short"), (data + b"\0", "long"), (b"", "empty")):
                add(reader, "secagg-malformed", cut, why)
            add(reader, "secagg-malformed", b"\xff\xff\xff\xff" + data[4:], "length of the header")
            header = int.from_bytes(data[:4], "little")
            add(
                reader, "secagg-malformed",
                data[: 4 + header] + b"\1" + data[5 + header :], "padding is not zero",
            )  # fmt: skip
            continue
        head, body = msgpack.unpackb(data)[:3], msgpack.unpackb(data)[3:]
        wide = b"\xdc\x00" + bytes([3 + len(body)]) + data[1:]
        for broken, why in (
            (b"", "empty"),
            (data[:-1], "cut off"),
            (data + b"\0", "trailing byte"),
            (wide, "not canonical"),
            (msgpack.packb({"v": 1}), "a map"),
            (msgpack.packb([*head, *body, 0]), "one field more"),
            (msgpack.packb([*head, *body[:-1]]), "one field less"),
            (msgpack.packb([*head, *[None] * len(body)]), "nil"),
            (b"\x91" * 1100, "nested too deep"),
        ):
            add(reader, "secagg-malformed", broken, why)
        for version in (VERSION - 1, VERSION + 1):
            other = msgpack.packb([version, *head[1:], *body])
            add(reader, "secagg-version", other, f"version {version}")
        add(reader, "secagg-version", msgpack.packb([True, *head[1:], *body]), "version true")
        add(
            reader, "secagg-kind", msgpack.packb([VERSION, "other", head[2], *body]), "another kind"
        )
        if reader != "invitation":
            other, none = [*head[:2], bytes(32), *body], [*head[:2], b"", *body]
            add(reader, "secagg-context", msgpack.packb(other), "another round")
            add(reader, "secagg-malformed", msgpack.packb(none), "no context")
    fields = msgpack.unpackb(bytes.fromhex(str(vectors["advertisement"])))
    for name in ("", " h00", "h\n0", "x" * 129, "e\u0301"):
        entry = [name, *fields[3][1:]]
        add(
            "advertisement",
            "secagg-malformed",
            msgpack.packb([*fields[:3], entry]),
            f"name {name!r}",
        )
    for place in (1, 2, 3, 4):
        entry = [*fields[3][:place], fields[3][place][:-1], *fields[3][place + 1 :]]
        add("advertisement", "secagg-malformed", msgpack.packb([*fields[:3], entry]), "short key")
    fields = msgpack.unpackb(bytes.fromhex(str(vectors["survivors"])))
    for names in (NAMES[::-1], [NAMES[0], *NAMES[:-1]]):
        add("survivors", "secagg-duplicate", msgpack.packb([*fields[:3], names]), "order or twice")
    fields = msgpack.unpackb(bytes.fromhex(str(vectors["revealed"])))
    for row in (["h01", "both", bytes(32)], ["h01", "seed", bytes(31)], ["h01", "seed"]):
        add("revealed", "secagg-malformed", msgpack.packb([*fields[:4], [row]]), "share")
    double = [["h01", "mask key", bytes(32)], ["h01", "seed", bytes(32)]]
    add("revealed", "secagg-duplicate", msgpack.packb([*fields[:4], double]), "both of one")
    return bad


READERS = (
    "invitation", "advertisement", "cohort", "share statement", "masked", "survivors",
    "signature", "revealed",
)  # fmt: skip


if __name__ == "__main__":
    vectors = good()
    text = json.dumps({"good": vectors, "malformed": malformed(vectors)}, indent=1)
    PATH.write_text(text + "\n")

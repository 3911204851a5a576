"""Records of every wire version: today's are read as they were, an old major's are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from common.errors import ProtocolError
from common.messages import (
    WIRE,
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
    Wire,
    WireMismatch,
    wire,
)
from tests.golden import records
from tests.golden.fixed import FOLDER, identity
from tests.golden.make import FORMATS, differing, latest

READ: dict[str, Callable[[RecordDict], Any]] = {
    "job": Job.from_record,
    "report": lambda record: Report.from_record(record, run=records.RUN, round=records.ROUND),
    "envelope": Envelope.from_record,
    "offer": Offer.from_record,
    "delivery": lambda record: Delivery.from_record(record, run=records.RUN),
    "receipt": Receipt.from_record,
    "comparison": Comparison.from_record,
}
"""Record → its reader, of those that are of one major."""
OLD = sorted(
    path
    for folder in (FOLDER / "wire").iterdir()
    if int(folder.name.split(".")[0]) < WIRE.major
    for path in folder.glob("*.pb")
)


def record_of(path: Path) -> RecordDict:
    return records.from_bytes(path.read_bytes())


def same(found: object, expected: object) -> bool:
    """Whether two messages say the same, arrays to the last bit."""
    if isinstance(expected, np.ndarray):
        return isinstance(found, np.ndarray) and (
            found.dtype == expected.dtype and np.array_equal(found, expected)
        )
    if isinstance(expected, dict):
        return isinstance(found, dict) and (
            set(found) == set(expected) and all(same(found[k], expected[k]) for k in expected)
        )
    return type(found) is type(expected) and bool(found == expected)


@pytest.mark.parametrize("name", sorted(records.messages()))
def test_a_message_of_today_is_read_as_it_was_written(name: str) -> None:
    expected = records.messages()[name]
    record = record_of(latest("wire") / f"{name}.pb")
    always = {"greeting": Greeting.from_record, "challenge": Challenge.in_record,
              "refusal": Refusal.in_record}  # fmt: skip
    readers = READ | always
    found = readers[next(kind for kind in record if kind in readers)](record)
    assert type(found) is type(expected)
    for field in vars(expected):
        assert same(getattr(found, field), getattr(expected, field)), field


@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if one.same])
def test_a_format_that_is_written_otherwise_has_another_version(name: str) -> None:
    """Else: a new version, then ``python -m tests.golden.make`` (docs/compatibility.md)."""
    assert latest(name).is_dir()
    assert differing(name) == []


@pytest.mark.parametrize("path", OLD, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_message_of_an_old_major_is_refused_with_who_must_update(path: Path) -> None:
    record = record_of(path)
    for name, read in READ.items():
        if name in record:
            with pytest.raises(WireMismatch) as caught:
                read(record)
            old = path.parent.name
            assert caught.value.what == (
                f"a message is of wire version {old}, this side speaks {WIRE}"
            )
            assert caught.value.remedy == "update consilium at its sender"
            assert caught.value.code == "wire-version"


@pytest.mark.parametrize("folder", sorted((FOLDER / "wire").iterdir()), ids=lambda p: p.name)
def test_greetings_and_refusals_of_every_version_are_understood(folder: Path) -> None:
    """So that two sides that do not understand each other can say so."""
    greeting = Greeting.from_record(record_of(folder / "greeting.pb"))
    assert greeting.hospital == "st-mary"
    assert str(greeting.wire) == folder.name
    refusal = Refusal.in_record(record_of(folder / "refusal.pb"))
    assert refusal == Refusal("privacy-budget", "0a1b2c3d")


def heads() -> dict[str, str]:
    """Message → the record that has its version."""
    found = {}
    for name, message in records.messages().items():
        record = message.to_record()  # type: ignore[attr-defined]
        found[name] = next(k for k, v in record.items() if "version" in v)
    return found


@pytest.mark.parametrize("name", sorted(n for n, k in heads().items() if k in READ))
def test_of_a_newer_minor_what_is_not_known_is_ignored_and_of_our_own_where_it_is_exact(
    name: str,
) -> None:
    record = record_of(latest("wire") / f"{name}.pb")
    kind = heads()[name]
    head = record[kind]
    assert isinstance(head, ConfigRecord)
    head["colour"] = "blue"
    if kind in ("offer", "delivery", "receipt", "comparison"):
        with pytest.raises(ProtocolError, match="other fields"):
            READ[kind](record)
    head["minor"] = WIRE.minor + 1
    READ[kind](record)
    for wrong in (-1, 1 << 16, "1", True, 1.0):
        head["minor"] = wrong
        with pytest.raises(ProtocolError):
            READ[kind](record)


def test_a_newer_minor_is_written_into_every_record_and_read_by_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other side is the newer one: its code is ours with the next minor."""
    with monkeypatch.context() as newer:
        newer.setattr(wire, "WIRE", Wire(WIRE.major, WIRE.minor + 1))
        made = {n: records.to_bytes(m.to_record()) for n, m in records.messages().items()}  # type: ignore[attr-defined]
    for name, kind in heads().items():
        record = records.from_bytes(made[name])
        head = record[kind]
        assert isinstance(head, ConfigRecord) and head["minor"] == WIRE.minor + 1
        if kind in READ:
            READ[kind](record)


def test_an_optional_field_that_is_missing_has_its_default() -> None:
    assert wire.optional_of({}, "label", "none") == "none"
    assert wire.optional_of({"label": "x"}, "label", "none") == "x"
    with pytest.raises(ProtocolError, match="'label'"):
        wire.optional_of({"label": 1}, "label", "none")
    old = RecordDict({"greeting": ConfigRecord({"version": WIRE.major, "hospital": "st-mary"})})
    found = Greeting.from_record(old)
    assert (found.package, found.proof, found.oldest) == ("", b"", WIRE.major)


# Secure aggregation


def test_the_messages_of_a_round_are_read_by_the_stages_that_they_are_for() -> None:
    """Each as it was kept: the same binding, and a hospital that goes on from its kept state."""
    from common.secagg import HospitalRound, RoundBinding, SecAggPolicy
    from common.secagg import messages as stage

    folder = latest("secagg")
    kept = {path.stem: path.read_bytes() for path in folder.glob("*.bin")}
    binding = RoundBinding.from_bytes(kept["invitation"])
    assert binding == records.binding()
    own = stage.read_advertisement(binding, kept["advertisement"])
    assert (own.name, own.identity) == ("hospital-00", identity("hospital-00").public)
    cohort = stage.read_cohort(binding, kept["cohort"])
    assert len(cohort) == 5 and own in cohort
    hospital = HospitalRound.from_bytes(kept["state-masked"])
    policy = SecAggPolicy(min_cohort=3, min_threshold=3, min_shares=3, min_ring_bits=16)
    signed = hospital.consistency(
        kept["survivors"], identity=identity("hospital-00"), policy=policy
    )
    assert signed == kept["signature"]
    assert (
        HospitalRound.from_bytes(kept["state-signed"]).unmask(kept["signatures"])
        == (kept["revealed"])
    )


def test_messages_of_another_version_of_secure_aggregation_are_refused() -> None:
    from common.secagg import Refusal as Refused
    from common.secagg import RoundBinding

    data = bytearray((latest("secagg") / "invitation.bin").read_bytes())
    data[1] += 1  # the version, a small integer of msgpack, comes first
    with pytest.raises(Refused) as caught:
        RoundBinding.from_bytes(bytes(data))
    assert caught.value.code == "secagg-version"

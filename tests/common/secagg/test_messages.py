"""The bytes of the protocol are fixed, malformed ones are refused, and no secret leaks out."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Callable

import pytest

from common.errors import ConsiliumError
from common.secagg import HospitalRound, Identity, Refusal, Roster, RosterEntry, RoundBinding
from common.secagg import messages as m
from common.secagg.shamir import reconstruct
from common.secagg.state import HospitalState
from tests.common.secagg.driver import IDENTITIES, Drive
from tests.common.secagg.make_vectors import COORDINATOR, PATH, READERS, good, malformed

VECTORS = json.loads(PATH.read_text())
BINDING = RoundBinding.from_bytes(bytes.fromhex(VECTORS["good"]["invitation"]))
CONTEXT = bytes.fromhex(VECTORS["good"]["cohort hash"])
READ: dict[str, Callable[[bytes], object]] = {
    "invitation": RoundBinding.from_bytes,
    "advertisement": lambda data: m.read_advertisement(BINDING, data),
    "cohort": lambda data: m.read_cohort(BINDING, data),
    "share statement": lambda data: m.read_shares(CONTEXT, BINDING.params, data),
    "masked": lambda data: m.read_masked(CONTEXT, data, 20),
    "survivors": lambda data: m.read_survivors(CONTEXT, BINDING.params, data),
    "signature": lambda data: m.read_signature(CONTEXT, data),
    "revealed": lambda data: m.read_revealed(CONTEXT, BINDING.params, data),
}


def test_protocol_gives_the_bytes_of_the_fixed_vectors() -> None:
    fixed = VECTORS["good"]
    assert good() == fixed
    assert malformed(fixed) == VECTORS["malformed"]


@pytest.mark.parametrize("reader", READERS)
def test_good_messages_are_read(reader: str) -> None:
    READ[reader](bytes.fromhex(VECTORS["good"][reader]))


@pytest.mark.parametrize("reader", READERS)
def test_malformed_messages_are_refused_with_their_code(reader: str) -> None:
    cases = [case for case in VECTORS["malformed"] if case["reader"] == reader]
    assert len(cases) >= 5
    for case in cases:
        with pytest.raises(Refusal) as caught:
            READ[reader](bytes.fromhex(case["bytes"]))
        assert caught.value.code == case["code"], case["why"]


@pytest.mark.parametrize("reader", READERS)
def test_every_single_wrong_byte_is_refused_or_changes_the_content(reader: str) -> None:
    """No byte is ignored, and nothing but a refusal is raised."""
    data = bytes.fromhex(VECTORS["good"][reader])
    honest = READ[reader](data)
    for place in range(len(data)):
        changed = data[:place] + bytes([data[place] ^ 0x41]) + data[place + 1 :]
        try:
            content = READ[reader](changed)
        except Refusal:
            continue
        assert content != honest


def test_messages_above_their_limit_are_refused_unread() -> None:
    for read in READ.values():
        with pytest.raises(Refusal):
            read(b"\xc6" + (1 << 22).to_bytes(4, "big") + bytes(1 << 22))


def test_shamir_reconstructs_shares_that_were_computed_by_hand() -> None:
    vector = VECTORS["good"]["shamir"]
    shares = {int(index): bytes.fromhex(share) for index, share in vector["shares"].items()}
    for left_out in ((4, 5), (1, 2), (2, 4)):
        some = {index: share for index, share in shares.items() if index not in left_out}
        assert reconstruct(some, vector["threshold"]).hex() == vector["secret"]


# The stored state ----------------------------------------------------------------------------


def test_state_survives_its_bytes_at_every_stage() -> None:
    drive = Drive.one_hot(5)
    for stage in ("share", "masked", "consistency", "unmask"):
        drive = Drive.one_hot(5)
        drive.run(until=stage)
        for stored in drive.states.values():
            assert HospitalState.from_bytes(stored).to_bytes() == stored


@pytest.mark.parametrize("data", [b"", b"\x90", b"not a state", bytes(100)])
def test_malformed_state_is_refused(data: bytes) -> None:
    with pytest.raises(Refusal):
        HospitalRound.from_bytes(data)


def test_state_holds_only_what_the_next_stages_need() -> None:
    drive = Drive.one_hot(5)
    relays = drive.run(until="masked")
    before = drive.hospital("h00")._state
    secrets = (before.channel_private, before.mask_private, before.seed)
    assert len(set(secrets)) == 3
    drive.masked("h00", relays["h00"])  # type: ignore[index]
    assert not any(secret in drive.states["h00"] for secret in secrets)
    assert len(drive.hospital("h00")._state.held) == 5


def test_nothing_secret_is_left_after_the_round_or_an_abort() -> None:
    drive = Drive.one_hot(5)
    drive.run()
    for name in drive.names:
        assert drive.hospital(name).stage == "done"
        assert len(drive.states[name]) < 60
    drive = Drive.one_hot(5)
    drive.run(until="unmask")
    hospital = drive.hospital("h00")
    hospital.wipe()
    assert hospital.stage == "dead"
    assert len(hospital.to_bytes()) < 60


def test_secrets_are_in_no_repr_string_or_traceback() -> None:
    drive = Drive.one_hot(5)
    relays = drive.run(until="masked")
    hospital = drive.hospital("h00")
    state = hospital._state
    secrets = [state.channel_private, state.mask_private, state.seed, *state.held["h00"]]
    identity = IDENTITIES["h00"]
    secrets.append(identity.private_bytes())
    texts = [f"{thing!r} {thing}" for thing in (hospital, state, identity, hospital._channel())]
    try:
        hospital.masked_input(relays["h01"], drive.vectors["h00"])  # type: ignore[index]
    except ConsiliumError as error:
        texts += [str(error), repr(error), "".join(traceback.format_exception(error))]
    assert len(texts) == 7
    for secret in secrets:
        for text in texts:
            assert secret.hex() not in text
            assert repr(secret)[2:-1] not in text


def test_fresh_keys_every_round() -> None:
    drive = Drive.one_hot(4)
    assert len({drive.advertise("h00") for _ in range(5)}) == 5


def test_core_imports_no_flower_and_no_torch() -> None:
    code = "import sys, common.secagg; print({'flwr', 'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# The roster ----------------------------------------------------------------------------------


def roster(*names: str) -> Roster:
    return Roster(
        "example",
        tuple(RosterEntry(n, IDENTITIES[n].public, "2026-01-01", "2026-12-31") for n in names),
    )


def test_roster_is_read_back_with_the_pinned_key() -> None:
    signed = roster("h00", "h01").sign(COORDINATOR)
    loaded = Roster.load(signed, COORDINATOR.public)
    assert loaded == roster("h00", "h01")
    assert set(loaded.identities("2026-12-31")) == {"h00", "h01"}
    assert loaded.identities("2027-01-01") == {}


def test_fixed_roster_is_read() -> None:
    data = VECTORS["good"]["roster"].encode()
    assert len(Roster.load(data, COORDINATOR.public).entries) == 1


def test_roster_of_another_coordinator_or_altered_is_refused() -> None:
    signed = roster("h00", "h01").sign(COORDINATOR)
    with pytest.raises(Refusal, match="pinned"):
        Roster.load(signed, Identity(b"\xee" * 32).public)
    for old, new in (
        (b"h01", b"h09"), (b"2026-12-31", b"2036-12-31"), (b"example", b"another"),
    ):  # fmt: skip
        with pytest.raises(Refusal, match="pinned"):
            Roster.load(signed.replace(old, new), COORDINATOR.public)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"consilium-roster-1", b"consilium-roster-2"),
        (b'"expires"', b'"expiry"'),
        (b'"version"', b'"version": "consilium-roster-1", "version"'),
        (b"2026-12-31", b"2025-12-31"),
        (b"2026-12-31", b"31.12.2026"),
        (b'"h01"', b'"h00"'),
        (b'"h01"', b"17"),
        (b"{", b""),
    ],
)
def test_malformed_rosters_are_refused(old: bytes, new: bytes) -> None:
    with pytest.raises(Refusal) as caught:
        Roster.load(roster("h00", "h01").sign(COORDINATOR).replace(old, new), COORDINATOR.public)
    assert caught.value.code in ("secagg-roster", "secagg-malformed")


def test_roster_refuses_one_key_under_two_names() -> None:
    key = IDENTITIES["h00"].public
    with pytest.raises(Refusal, match="identity key"):
        Roster("x", tuple(RosterEntry(n, key, "2026-01-01", "2026-01-02") for n in ("a", "b")))

"""A malicious server for each rule of the protocol; each ends with nothing revealed.

:func:`refused` asserts it: the hospital's machine is dead, its stored state holds no secret,
and a further request gives no share.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import ConfigError, RoundError
from common.secagg import (
    HospitalRound,
    Identity,
    Refusal,
    SecAggParams,
    SecAggPolicy,
    Segment,
    VectorLayout,
    update_layout,
    wire,
)
from common.secagg import messages as m
from common.secagg.keys import public_key
from common.secagg.statements import Advertisement, ShareStatement, cohort_hash
from tests.common.secagg.driver import IDENTITIES, MODEL, POLICY, ROSTER, Drive, refused

ME = "h00"


def reforged(drive: Drive, name: str, signer: Identity) -> Advertisement:
    """An advertisement for ``name`` with keys of the server's, signed by ``signer``."""
    channel, mask = (public_key(bytes([7 + i]) * 32) for i in range(2))
    return Advertisement.make(name, signer, channel, mask, drive.binding)


def cohort(drive: Drive, message: object) -> list[Advertisement]:
    assert isinstance(message, bytes)
    return m.read_cohort(drive.binding, message)


def share_refused(code: str, drive: Drive, members: list[Advertisement]) -> None:
    message = m.build_cohort(drive.binding, members)
    refused(code, drive, ME, lambda: drive.share(ME, message))


# The terms ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"reconstruction_threshold": 1}, "secagg-parameters"),
        ({"reconstruction_threshold": 1, "num_shares": 1, "min_cohort": 1}, "secagg-parameters"),
        ({"reconstruction_threshold": 3, "min_cohort": 3}, "secagg-parameters"),
        ({"min_cohort": 2}, "secagg-parameters"),
        ({"num_shares": 6, "reconstruction_threshold": 5}, "secagg-parameters"),
        ({"ring_bits": 8}, "secagg-parameters"),
        ({"num_shares": 3, "reconstruction_threshold": 3}, "secagg-policy"),
        ({"ring_bits": 16, "max_cohort": 5, "min_precision_bits": 8}, "secagg-policy"),
    ],
)
def test_threshold_and_parameters_below_the_floor_are_refused(
    changes: dict[str, int], code: str
) -> None:
    drive = Drive.one_hot(5)
    params = replace(drive.binding.params, **changes)
    with pytest.raises(Refusal) as caught:
        HospitalRound.advertise(
            ME,
            replace(drive.binding, params=params),
            identity=IDENTITIES[ME],
            policy=SecAggPolicy(),
            model_hash=MODEL,
        )
    assert caught.value.code == code


def test_layout_that_could_overflow_the_ring_is_refused_by_server_and_hospital() -> None:
    drive = Drive.one_hot(5)
    layout = VectorLayout((Segment(name="count", length=1, bound=2**30, kind="integer"),))
    binding = replace(drive.binding, layout=layout)
    with pytest.raises(ConfigError, match="three ways out"):
        Drive(drive.names, binding, {})
    with pytest.raises(Refusal) as caught:
        drive.advertise(ME, binding)
    assert caught.value.code == "secagg-parameters"


@pytest.mark.parametrize(
    "layout",
    [
        update_layout(10, bound=1e9, max_weight=10),
        update_layout(10, bound=1.0, max_weight=2_000_000),
        update_layout(200_000_000, bound=1.0, max_weight=10),
    ],
)
def test_ranges_beyond_the_hospitals_policy_are_refused(layout: VectorLayout) -> None:
    drive = Drive.one_hot(5)
    with pytest.raises(Refusal) as caught:
        drive.advertise(ME, replace(drive.binding, layout=layout))
    assert caught.value.code == "secagg-policy"


def test_policy_cannot_be_laxer_than_the_protocol() -> None:
    with pytest.raises(ConfigError, match="floor"):
        SecAggPolicy(min_threshold=2)


def test_other_model_than_the_round_names_is_refused() -> None:
    drive = Drive.one_hot(5)
    with pytest.raises(Refusal) as caught:
        drive.advertise(ME, replace(drive.binding, model_hash=bytes(32)))
    assert caught.value.code == "secagg-model"


# The cohort --------------------------------------------------------------------------------


def test_keys_swapped_for_the_servers_are_refused_with_a_roster() -> None:
    drive = Drive.one_hot(5)
    members = cohort(drive, drive.run(until="share"))
    evil = reforged(drive, "h01", Identity(b"\xee" * 32))
    share_refused("secagg-identity", drive, [members[0], evil, *members[2:]])


def test_keys_swapped_under_a_hospitals_identity_are_refused() -> None:
    drive = Drive.one_hot(5)
    members = cohort(drive, drive.run(until="share"))
    evil = replace(members[1], channel=reforged(drive, "h01", IDENTITIES["h01"]).channel)
    share_refused("secagg-signature", drive, [members[0], evil, *members[2:]])


def test_missing_signature_is_refused_without_a_roster_too() -> None:
    drive = Drive.one_hot(5)
    drive.roster = None
    members = cohort(drive, drive.run(until="share"))
    share_refused(
        "secagg-signature",
        drive,
        [members[0], replace(members[1], signature=bytes(64)), *members[2:]],
    )


def test_without_a_roster_the_round_is_marked_unauthenticated() -> None:
    marks = []
    for roster in (None, ROSTER):
        drive = Drive.one_hot(4)
        drive.roster = roster
        drive.run(until="masked")
        marks.append(drive.hospital(ME).authenticated)
    assert marks == [False, True]


def test_policy_that_asks_for_a_roster_refuses_a_round_without_one() -> None:
    drive = Drive.one_hot(5)
    message = drive.run(until="share")
    strict = replace(POLICY, require_roster=True)
    refused(
        "secagg-roster",
        drive,
        ME,
        lambda: drive.step(
            ME,
            lambda h: h.share(message, identity=IDENTITIES[ME], policy=strict),  # type: ignore[arg-type]
        ),
    )


def test_hospital_that_is_not_on_the_roster_is_refused() -> None:
    drive = Drive.one_hot(4)
    members = cohort(drive, drive.run(until="share"))
    stranger = reforged(drive, "stranger", Identity(b"\xee" * 32))
    share_refused("secagg-identity", drive, [*members, stranger])


def test_own_entry_altered_or_missing_is_refused() -> None:
    for change in ("altered", "missing"):
        drive = Drive.one_hot(5)
        members = cohort(drive, drive.run(until="share"))
        mine = [reforged(drive, ME, IDENTITIES[ME])] if change == "altered" else []
        share_refused("secagg-own-entry", drive, [*mine, *members[1:]])


def test_name_twice_in_a_cohort_is_refused() -> None:
    drive = Drive.one_hot(5)
    members = cohort(drive, drive.run(until="share"))
    share_refused("secagg-duplicate", drive, [*members[:-1], members[1]])


def test_key_used_twice_is_refused() -> None:
    drive = Drive.one_hot(5)
    drive.roster = None
    members = cohort(drive, drive.run(until="share"))
    for channel, mask in (
        (members[1].channel, members[1].mask),
        (members[4].channel, members[4].channel),
    ):
        drive.advertise(ME)
        mine = m.read_advertisement(drive.binding, drive.advertise(ME))
        double = Advertisement.make("h04", IDENTITIES["h04"], channel, mask, drive.binding)
        share_refused("secagg-keys", drive, [mine, *members[1:4], double])


def test_one_identity_under_two_names_is_refused() -> None:
    drive = Drive.one_hot(5)
    drive.roster = None
    members = cohort(drive, drive.run(until="share"))
    share_refused("secagg-keys", drive, [*members[:4], reforged(drive, "h04", IDENTITIES["h03"])])


def test_public_key_of_low_order_is_refused() -> None:
    drive = Drive.one_hot(5)
    members = cohort(drive, drive.run(until="share"))
    zero = Advertisement.make("h01", IDENTITIES["h01"], bytes(32), members[1].mask, drive.binding)
    share_refused("secagg-keys", drive, [members[0], zero, *members[2:]])


@pytest.mark.parametrize("size", [1, 3])
def test_hospital_that_is_its_own_neighbourhood_or_nearly_is_refused(size: int) -> None:
    drive = Drive.one_hot(5)
    members = cohort(drive, drive.run(until="share"))
    share_refused("secagg-cohort", drive, members[:size])


def test_cohort_larger_than_the_scale_has_room_for_is_refused() -> None:
    drive = Drive.one_hot(6, SecAggParams(max_cohort=5))
    for name in drive.names:
        drive.server.collect_advertisement(name, drive.advertise(name))
    with pytest.raises(RoundError, match="more than 5"):
        drive.server.close_advertise()
    members = [m.read_advertisement(drive.binding, drive.advertise(name)) for name in drive.names]
    message = m.build_cohort(drive.binding, members)
    refused("secagg-malformed", drive, ME, lambda: drive.share(ME, message))


@pytest.mark.parametrize(
    "changes", [{"run": "run-2"}, {"round": 4}, {"purpose": "test"}, {"params": SecAggParams()}]
)
def test_message_of_another_run_round_purpose_or_parameters_is_refused(
    changes: dict[str, object],
) -> None:
    drive, other = Drive.one_hot(5), Drive.one_hot(5, **changes)  # type: ignore[arg-type]
    if "params" in changes:
        other = Drive.one_hot(5, SecAggParams(max_cohort=6))
    drive.run(until="share")
    message = other.run(until="share")
    refused("secagg-context", drive, ME, lambda: drive.share(ME, message))  # type: ignore[arg-type]


def test_hospitals_that_were_given_different_parameters_do_not_accept_each_other() -> None:
    drive = Drive.one_hot(5)
    members = cohort(drive, drive.run(until="share"))
    other = replace(drive.binding, params=replace(drive.binding.params, max_cohort=9))
    foreign = m.read_advertisement(other, Drive.advertise(drive, "h01", other))
    share_refused("secagg-signature", drive, [members[0], foreign, *members[2:]])


# The relayed shares ------------------------------------------------------------------------


def relayed(drive: Drive) -> tuple[bytes, list[tuple[ShareStatement, m.Sealed]]]:
    relays = drive.run(until="masked")
    context = drive.server._context
    assert isinstance(relays, dict)
    return context, m.read_relay(context, drive.binding.params, relays[ME])[1]


def masked_refused(
    code: str, drive: Drive, context: bytes, entries: list[tuple[ShareStatement, m.Sealed]]
) -> Refusal:
    message = m.build_relay(context, ME, entries)
    return refused(code, drive, ME, lambda: drive.masked(ME, message))


def test_shares_of_another_round_are_refused_on_replay() -> None:
    drive, other = Drive.one_hot(5), Drive.one_hot(5)
    drive.run(until="masked")
    relays = other.run(until="masked")
    refused("secagg-context", drive, ME, lambda: drive.masked(ME, relays[ME]))  # type: ignore[index]


def test_sealed_share_replayed_from_another_round_does_not_open() -> None:
    drive, other = Drive.one_hot(5), Drive.one_hot(5)
    context, entries = relayed(drive)
    _, old = relayed(other)
    swapped = [(entries[0][0], old[0][1]), *entries[1:]]
    masked_refused("secagg-sealed", drive, context, swapped)


def test_tampered_sealed_share_is_refused_and_names_its_owner() -> None:
    drive = Drive.one_hot(5)
    context, entries = relayed(drive)
    statement, sealed = entries[2]
    broken = bytes([sealed.box[0] ^ 1]) + sealed.box[1:]
    entries[2] = (statement, replace(sealed, box=broken))
    assert "'h03'" in masked_refused("secagg-sealed", drive, context, entries).what


def test_share_sealed_for_another_holder_is_refused() -> None:
    drive = Drive.one_hot(5)
    relays = drive.run(until="masked")
    refused("secagg-relay", drive, ME, lambda: drive.masked(ME, relays["h01"]))  # type: ignore[index]


def test_forged_commitments_are_refused() -> None:
    drive = Drive.one_hot(5)
    context, entries = relayed(drive)
    statement, sealed = entries[0]
    entries[0] = (replace(statement, seed_shares=(bytes(32),) * 5), sealed)
    masked_refused("secagg-signature", drive, context, entries)


def test_share_that_its_owner_did_not_commit_to_names_the_owner() -> None:
    drive = Drive.one_hot(5)
    message = drive.run(until="share")
    assert isinstance(message, bytes)
    for name in drive.names:
        answer = drive.share(name, message)
        if name == "h01":
            answer = dishonest(drive, name)
        assert drive.server.collect_shares(name, answer)
    relays = drive.server.close_shares()
    error = refused("secagg-commitment", drive, ME, lambda: drive.masked(ME, relays[ME]))
    assert "'h01'" in error.what


def dishonest(drive: Drive, name: str) -> bytes:
    """A hospital that seals other shares than it commits to, all signed properly."""
    from common.secagg import sharing

    hospital = HospitalRound.from_bytes(drive.states[name])
    channel, state = hospital._channel(), hospital._state
    holders = hospital._graph().of(name)
    publics = {member.name: member.channel for member in state.cohort}
    good = sharing.split_secrets(state.seed, state.mask_private, 4, holders)
    bad = sharing.split_secrets(bytes(32), state.mask_private, 4, holders)
    statement = ShareStatement.make(name, IDENTITIES[name], channel.context, state.seed, good)
    sealed = []
    for holder in sorted(set(holders) - {name}):
        key = channel.key(publics[holder], bytes(32), name, holder)
        box = sharing.seal(key, b"".join(bad[holder]), channel.associated(statement, holder))
        sealed.append(m.Sealed(holder, bytes(32), box))
    return m.build_shares(channel.context, statement, sealed)


def test_neighbours_chosen_by_the_server_are_refused() -> None:
    drive = Drive.one_hot(12)
    context, entries = relayed(drive)
    graph = drive.server._graph
    stranger = next(name for name in drive.names if name not in graph.of(ME))
    box = next(iter(entries))[1]
    entries[0] = (drive.server._statements[stranger], box)
    masked_refused("secagg-neighbours", drive, context, entries)


def test_same_neighbour_twice_does_not_make_a_threshold() -> None:
    drive = Drive.one_hot(5)
    context, entries = relayed(drive)
    masked_refused("secagg-relay", drive, context, [*entries[:2], entries[0]])


def test_too_few_neighbours_who_shared_are_refused() -> None:
    drive = Drive.one_hot(5)
    context, entries = relayed(drive)
    masked_refused("secagg-neighbours-few", drive, context, entries[:2])


def test_context_is_checked_before_anything_is_read() -> None:
    drive = Drive.one_hot(4)
    message = wire.pack("cohort", bytes(32), "not a cohort")
    drive.run(until="share")
    refused("secagg-context", drive, ME, lambda: drive.share(ME, message))


def test_hospitals_that_were_shown_different_cohorts_do_not_open_each_others_shares() -> None:
    """h00 is shown a cohort without h05; what the others shared is bound to the full one."""
    drive = Drive.one_hot(6)
    message = drive.run(until="share")
    members = cohort(drive, message)
    shown = m.build_cohort(drive.binding, members[:5])
    context = cohort_hash(drive.binding, members[:5])
    drive.share(ME, shown)
    entries = []
    for name in drive.names[1:5]:
        drive.share(name, message)  # type: ignore[arg-type]
        hospital = drive.hospital(name)._state
        shares = dict.fromkeys(drive.names[:5], hospital.held[name])
        full = cohort_hash(drive.binding, members)
        statement = ShareStatement.make(name, IDENTITIES[name], full, hospital.seed, shares)
        entries.append((statement, m.Sealed(ME, bytes(32), bytes(m.SEALED_BYTES))))
    masked_refused("secagg-signature", drive, context, entries)

"""A malicious server at the survivors and the unmasking, and hospitals that answer wrongly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.errors import RoundError
from common.secagg import Refusal, SecAggParams
from common.secagg import messages as m
from common.secagg.statements import survivors_statement
from tests.common.secagg.driver import IDENTITIES, Drive, refused

ME = "h00"


# The survivors -----------------------------------------------------------------------------


def sign_refused(code: str, drive: Drive, survivors: list[str]) -> None:
    message = m.build_survivors(drive.server._context, survivors)
    refused(code, drive, ME, lambda: drive.consistency(ME, message))


def test_survivors_without_the_hospital_itself_are_refused() -> None:
    drive = Drive.one_hot(5)
    drive.run(until="consistency")
    sign_refused("secagg-not-survivor", drive, drive.names[1:])


def test_survivors_from_outside_the_cohort_are_refused() -> None:
    drive = Drive.one_hot(5)
    drive.run(until="consistency")
    sign_refused("secagg-not-cohort", drive, [*drive.names[:4], "nobody"])


def test_survivor_that_did_not_share_is_refused() -> None:
    drive = Drive.one_hot(5)
    drive.run({"share": ["h04"]}, until="consistency")
    sign_refused("secagg-not-cohort", drive, drive.names)


def test_survivor_named_twice_is_refused() -> None:
    drive = Drive.one_hot(5)
    drive.run(until="consistency")
    sign_refused("secagg-duplicate", drive, [*drive.names[:3], drive.names[2]])


def test_too_few_survivors_are_refused() -> None:
    drive = Drive.one_hot(5)
    drive.run(until="consistency")
    sign_refused("secagg-survivors-few", drive, drive.names[:3])


def test_survivors_thin_around_anybody_are_refused() -> None:
    drive = Drive.one_hot(12)
    drive.run(until="consistency")
    ring = sorted(drive.server._graph.of(ME))
    gone = [name for name in ring if name != ME][:2]
    sign_refused("secagg-survivors-thin", drive, [n for n in drive.names if n not in gone])


def test_disconnected_survivors_are_refused() -> None:
    """Parts without a common mask would be two sums. No ring falls apart while every
    neighbourhood keeps its threshold, so the check is driven with a graph of its own."""
    from common.secagg.graph import CohortGraph, check_survivors

    left, right = ("a", "b", "c", "d"), ("e", "f", "g", "h")
    graph = CohortGraph({name: part for part in (left, right) for name in part})
    with pytest.raises(Refusal) as caught:
        check_survivors(graph, [*left, *right], SecAggParams())
    assert caught.value.code == "secagg-survivors-split"
    check_survivors(graph, left, SecAggParams())


# The unmasking -----------------------------------------------------------------------------


def signed(drive: Drive, survivors: list[str], signers: list[str]) -> bytes:
    context = drive.server._context
    statement = survivors_statement(context, survivors)
    return m.build_signatures(context, [(n, IDENTITIES[n].sign(statement)) for n in signers])


def test_no_single_hospital_is_revealed_when_the_server_splits_the_survivors() -> None:
    """h00 is told that all survived, the others that h04 dropped: no quorum on either side."""
    drive = Drive.one_hot(5)
    survivors = drive.run(until="consistency")
    context = drive.server._context
    assert isinstance(survivors, bytes)
    other = m.build_survivors(context, drive.names[:4])
    answers = [m.read_signature(context, drive.consistency(ME, survivors))]
    answers += [m.read_signature(context, drive.consistency(n, other)) for n in drive.names[1:4]]
    message = m.build_signatures(context, answers)
    refused("secagg-signature", drive, ME, lambda: drive.unmask(ME, message))
    # The other side has three of its own, short of the threshold, and h00's does not count.
    message = m.build_signatures(context, answers[1:])
    refused("secagg-signers-few", drive, "h01", lambda: drive.unmask("h01", message))


def test_too_few_signatures_are_refused() -> None:
    drive = Drive.one_hot(5)
    drive.run(until="unmask")
    message = signed(drive, drive.names, ["h00", "h01", "h02"])
    refused("secagg-signers-few", drive, ME, lambda: drive.unmask(ME, message))


def test_signatures_from_beyond_the_neighbourhood_do_not_count() -> None:
    drive = Drive.one_hot(12)
    drive.run(until="unmask")
    near = drive.server._graph.of(ME)
    far = [name for name in drive.names if name not in near]
    message = signed(drive, drive.names, sorted([*far, ME, next(n for n in near if n != ME)]))
    refused("secagg-signers-few", drive, ME, lambda: drive.unmask(ME, message))


def test_forged_signature_over_the_survivors_is_refused() -> None:
    drive = Drive.one_hot(5)
    drive.run(until="unmask")
    context = drive.server._context
    good = m.read_signatures(context, drive.binding.params, signed(drive, drive.names, drive.names))
    good["h02"] = bytes(64)
    message = m.build_signatures(context, list(good.items()))
    refused("secagg-signature", drive, ME, lambda: drive.unmask(ME, message))


def test_signatures_of_another_round_are_refused_on_replay() -> None:
    drive, other = Drive.one_hot(5), Drive.one_hot(5)
    drive.run(until="unmask")
    message = other.run(until="unmask")
    refused("secagg-context", drive, ME, lambda: drive.unmask(ME, message))  # type: ignore[arg-type]


def test_both_shares_asked_for_in_a_second_call_gives_nothing() -> None:
    drive = Drive.one_hot(5)
    message = drive.run({"masked": ["h04"]}, until="unmask")
    assert isinstance(message, bytes)
    drive.unmask(ME, message)
    assert drive.hospital(ME).stage == "done"
    with pytest.raises(Refusal) as caught:
        drive.unmask(ME, message)
    assert caught.value.code == "secagg-stage"


def test_exactly_one_share_is_revealed_for_each_neighbour_who_shared() -> None:
    drive = Drive.one_hot(6)
    # In a cohort of six each hospital has one that is no neighbour; look from a neighbour.
    gone = next(name for name in drive.names if name != ME)
    message = drive.run({"masked": [gone]}, until="unmask")
    assert isinstance(message, bytes)
    context, params = drive.server._context, drive.binding.params
    for name in drive.server.pending:
        _, shares = m.read_revealed(context, params, drive.unmask(name, message))
        near = drive.server._graph.of(name)
        assert set(shares) == set(near)
        assert {o for o, (kind, _) in shares.items() if kind == "mask key"} == {gone} & set(near)


def test_nothing_is_revealed_for_a_hospital_that_never_shared() -> None:
    drive = Drive.one_hot(5)
    message = drive.run({"share": ["h04"]}, until="unmask")
    assert isinstance(message, bytes)
    _, shares = m.read_revealed(
        drive.server._context, drive.binding.params, drive.unmask(ME, message)
    )
    assert set(shares) == set(drive.names[:4])


@pytest.mark.parametrize("skipped", ["share", "masked", "consistency", "unmask"])
def test_stage_out_of_order_is_refused_and_wipes(skipped: str) -> None:
    drive = Drive.one_hot(5)
    drive.run(until=skipped)
    calls = {
        "share": lambda: drive.masked(ME, b""),
        "masked": lambda: drive.consistency(ME, b""),
        "consistency": lambda: drive.unmask(ME, b""),
        "unmask": lambda: drive.share(ME, b""),
    }
    refused("secagg-stage", drive, ME, calls[skipped])


def test_stage_twice_is_refused() -> None:
    drive = Drive.one_hot(5)
    message = drive.run(until="share")
    assert isinstance(message, bytes)
    drive.share(ME, message)
    refused("secagg-stage", drive, ME, lambda: drive.share(ME, message))


# What a hospital could do to the server's sum ------------------------------------------------


def test_wrong_share_names_its_sender_and_is_discarded() -> None:
    drive = Drive.one_hot(5)
    message = drive.run(until="unmask")
    assert isinstance(message, bytes)
    context, params = drive.server._context, drive.binding.params
    for name in drive.names:
        answer = drive.unmask(name, message)
        if name == "h02":
            _, shares = m.read_revealed(context, params, answer)
            rows = [(o, k, bytes(32) if o == "h01" else s) for o, (k, s) in shares.items()]
            answer = m.build_revealed(context, name, rows)
        assert drive.server.collect_unmask(name, answer)
    assert drive.server.finish().tolist() == [1] * 5
    assert drive.server.outcome.misbehaved == {"h02": "wrong share of hospital 'h01'"}


def test_secret_that_is_not_what_its_owner_committed_to_names_the_owner() -> None:
    drive = Drive.one_hot(5)
    message = drive.run(until="unmask")
    assert isinstance(message, bytes)
    for name in drive.names:
        drive.server.collect_unmask(name, drive.unmask(name, message))
    honest = drive.server._statements["h03"]
    drive.server._statements["h03"] = replace(honest, seed=bytes(32))
    with pytest.raises(RoundError, match="'h03' shared another secret"):
        drive.server.finish()
    assert drive.server._total is None


def test_message_in_another_hospitals_name_drops_its_sender() -> None:
    drive = Drive.one_hot(5)
    assert not drive.server.collect_advertisement("h01", drive.advertise("h02"))
    assert drive.server.outcome.dropped["h01"].reason == "refused: secagg-sender"


def test_vector_of_another_shape_or_type_is_refused() -> None:
    for vector in (np.zeros(4, np.uint32), np.zeros(5, np.uint64), np.zeros(5, np.float32)):
        drive = Drive.one_hot(5)
        relays = drive.run(until="masked")
        drive.vectors[ME] = vector  # type: ignore[assignment]
        refused("secagg-values", drive, ME, lambda d=drive, r=relays: d.masked(ME, r[ME]))

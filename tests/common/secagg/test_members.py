"""A cohort of hospitals that the coordinator admits and nobody knows: nothing of anybody leaves.

The adversary here has the server and the coordinator's key: all signatures are right.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.secagg import SecAggParams, SecAggPolicy
from common.secagg import messages as m
from common.secagg.errors import Refusal
from common.secagg.graph import CohortGraph
from common.secagg.statements import cohort_hash
from common.secagg.trust import check_members, tolerated
from tests.common.secagg.driver import IDENTITIES, POLICY, Drive, refused

ME = "h00"
ASK = replace(POLICY, accept_members="ask", min_trusted=4)
AUTO = replace(POLICY, accept_members="auto", min_trusted=4)


def keys(*names: str) -> frozenset[bytes]:
    return frozenset(IDENTITIES[name].public for name in names)


def share(
    drive: Drive, message: bytes, policy: SecAggPolicy, accepted: Collection[bytes], name: str = ME
) -> bytes:
    return drive.step(
        name,
        lambda h: h.share(
            message,
            identity=IDENTITIES[name],
            policy=policy,
            roster=drive.roster,
            accepted=accepted,
        ),
    )


def offered(count: int, params: SecAggParams | None = None) -> tuple[Drive, bytes]:
    """A round in which ``count`` hospitals of the roster have trained, and their cohort."""
    drive = Drive.one_hot(count, params)
    message = drive.run(until="share")
    assert isinstance(message, bytes)
    return drive, message


@pytest.mark.parametrize("policy", [ASK, AUTO])
def test_three_invented_members_and_one_victim_are_no_cohort(policy: SecAggPolicy) -> None:
    """``k1_sybil``: all four are on the roster, under the pinned key, with keys that they hold."""
    drive, message = offered(4)
    refused("secagg-members", drive, ME, lambda: share(drive, message, policy, keys()))


def test_under_ask_one_stranger_among_many_whom_we_know_is_refused_by_name() -> None:
    drive, message = offered(5)
    known = keys("h01", "h02", "h03")
    error = refused("secagg-members", drive, ME, lambda: share(drive, message, ASK, known))
    assert "h04" in error.what and "h01" not in error.what
    drive, message = offered(5)
    share(drive, message, ASK, known | keys("h04"))
    assert drive.hospital(ME).stage == "shared"


def test_a_name_that_is_accepted_is_nobody_under_another_key() -> None:
    """The roster changed h03's key; the name alone lets nobody in."""
    drive, message = offered(4)
    accepted = keys("h01", "h02") | {bytes(32)}
    refused("secagg-members", drive, ME, lambda: share(drive, message, ASK, accepted))


def test_under_ask_a_cohort_may_not_be_smaller_than_min_trusted() -> None:
    drive, message = offered(4)
    policy = replace(ASK, min_trusted=5)
    everybody = keys(*drive.names)
    error = refused("secagg-members", drive, ME, lambda: share(drive, message, policy, everybody))
    assert "asks for 5" in error.what


def test_without_a_roster_acceptance_says_nothing() -> None:
    drive = Drive.one_hot(4)
    drive.roster = None
    message = drive.run(until="share")
    assert isinstance(message, bytes)
    share(drive, message, ASK, keys())
    assert not drive.hospital(ME).authenticated


def test_under_auto_strangers_may_come_beside_enough_whom_we_know() -> None:
    drive, message = offered(6, SecAggParams(num_shares=7, reconstruction_threshold=5, min_cohort=5,
                                             max_cohort=6))  # fmt: skip
    share(drive, message, AUTO, keys("h01", "h02", "h03"))
    assert drive.hospital(ME).stage == "shared"
    drive, message = offered(6, drive.binding.params)
    refused("secagg-members", drive, ME, lambda: share(drive, message, AUTO, keys("h01", "h02")))


def surrounded(drive: Drive, message: bytes, most: int) -> set[str]:
    """More strangers than ``most`` in the neighbourhood of ME, and nobody else."""
    members = m.read_cohort(drive.binding, message)
    names = [member.name for member in members]
    context = cohort_hash(drive.binding, sorted(members, key=lambda member: member.name))
    near = CohortGraph.build(names, context, drive.binding.params).of(ME)
    return set([name for name in near if name != ME][: most + 1])


def test_under_auto_a_neighbourhood_that_strangers_could_open_is_refused() -> None:
    """Eleven of twelve are known; but three who hold our shares are not, and could open us."""
    drive, message = offered(12)
    strangers = surrounded(drive, message, tolerated(4, 5))
    known = keys(*(set(drive.names) - strangers))
    error = refused("secagg-members", drive, ME, lambda: share(drive, message, AUTO, known))
    assert "holders of its secrets" in error.what


def until_survivors(drive: Drive, policy: SecAggPolicy, accepted: frozenset[bytes]) -> None:
    """Everybody shares and masks; ME under ``policy``."""
    message = drive.run(until="share")
    assert isinstance(message, bytes)
    for name in drive.names:
        mine = (policy, accepted) if name == ME else (POLICY, frozenset[bytes]())
        drive.server.collect_shares(name, share(drive, message, *mine, name=name))
    relays = drive.server.close_shares()
    for name in drive.names:
        drive.masked(name, relays[name])


def sign(
    drive: Drive, survivors: list[str], policy: SecAggPolicy, accepted: Collection[bytes]
) -> bytes:
    message = m.build_survivors(drive.server._context, survivors)
    return drive.step(
        ME,
        lambda h: h.consistency(message, identity=IDENTITIES[ME], policy=policy, accepted=accepted),
    )


def test_survivors_without_enough_whom_we_know_are_not_signed() -> None:
    """The cohort was fine; the server then lets those drop whom we know."""
    params = SecAggParams(num_shares=7, reconstruction_threshold=5, min_cohort=5, max_cohort=7)
    drive, accepted = Drive.one_hot(7, params), keys("h01", "h02", "h03", "h04")
    until_survivors(drive, AUTO, accepted)
    dropped = [name for name in drive.names if name not in ("h03", "h04")]
    refused("secagg-members", drive, ME, lambda: sign(drive, dropped, AUTO, accepted))
    drive = Drive.one_hot(7, params)
    until_survivors(drive, AUTO, accepted)
    sign(drive, [name for name in drive.names if name != "h04"], AUTO, accepted)
    assert drive.hospital(ME).stage == "signed"


def test_who_is_revoked_in_the_middle_of_a_round_stops_it_before_anything_is_signed() -> None:
    drive, everybody = Drive.one_hot(5), keys(*IDENTITIES)
    until_survivors(drive, ASK, everybody)
    left = everybody - keys("h02")
    refused("secagg-members", drive, ME, lambda: sign(drive, drive.names, ASK, left))


def test_a_ring_in_which_strangers_cut_us_off_is_refused() -> None:
    """What hides us are masks with whom we know: a pair between two cuts is not enough."""
    names = [f"n{i}" for i in range(10)]
    ring = {names[i]: tuple(sorted(names[(i + d) % 10] for d in range(-2, 3))) for i in range(10)}
    graph = CohortGraph(ring)
    params = SecAggParams(max_cohort=10)
    trusted = {"n0", "n1", "n4", "n5", "n6", "n7"}  # n2, n3 and n8, n9 are strangers
    policy = replace(AUTO, min_trusted=3)
    near = [name for name in graph.of("n0") if name in ("n2", "n3", "n8", "n9")]
    assert len(near) > tolerated(4, 5)
    with pytest.raises(Refusal):
        check_members("n0", graph, names, trusted, params, policy)
    # With a cut that leaves the neighbourhood sound, the part that is cut off is still too small.
    far = {"n0", "n1", "n2", "n5", "n6", "n7"}  # strangers: n3, n4, n8, n9
    with pytest.raises(Refusal, match="joined by masks"):
        check_members("n1", graph, names, far, params, replace(AUTO, min_trusted=4))
    check_members("n1", graph, names, far, params, replace(AUTO, min_trusted=3))


def test_a_policy_that_names_no_way_to_accept_is_none() -> None:
    with pytest.raises(ConfigError, match="accept_members"):
        SecAggPolicy(accept_members="always")  # type: ignore[arg-type]


@given(
    count=st.integers(4, 16),
    data=st.data(),
    mode=st.sampled_from([ASK, AUTO]),
    seed=st.binary(min_size=32, max_size=32),
)
def test_no_cohort_that_passes_can_be_opened_by_those_we_do_not_know(
    count: int, data: st.DataObject, mode: SecAggPolicy, seed: bytes
) -> None:
    names = list(IDENTITIES)[:count]
    trusted = data.draw(st.sets(st.sampled_from(names)))
    present = data.draw(st.sets(st.sampled_from(names))) | {ME}
    params = SecAggParams(max_cohort=16)
    graph = CohortGraph.build(names, seed, params)
    strangers = set(names) - trusted - {ME}
    try:
        check_members(ME, graph, present, trusted, params, mode)
    except Refusal:
        return
    assert len((trusted | {ME}) & present) >= mode.min_trusted
    if mode is ASK:
        assert not strangers
    holders = graph.of(ME)
    colluding = len(strangers & set(holders))
    # Each honest holder gives one share, each stranger two: fewer than two secrets need.
    assert len(holders) + colluding < 2 * params.reconstruction_threshold

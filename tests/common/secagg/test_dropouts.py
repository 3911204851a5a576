"""The sum is the plain sum over who contributed, or there is none: for every drop-out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import RoundError
from common.secagg import SecAggParams, ServerRound, decode
from tests.common.secagg.driver import STAGES, Drive

COLLECT = {
    "advertise": ServerRound.collect_advertisement,
    "share": ServerRound.collect_shares,
    "masked": ServerRound.collect_masked,
    "consistency": ServerRound.collect_consistency,
    "unmask": ServerRound.collect_unmask,
}
CLOSE: dict[str, Callable[[ServerRound], object]] = {
    "advertise": ServerRound.close_advertise,
    "share": ServerRound.close_shares,
    "masked": ServerRound.close_masked,
    "consistency": ServerRound.close_consistency,
    "unmask": ServerRound.finish,
}


def subsets(names: list[str]) -> Iterator[frozenset[str]]:
    for size in range(len(names) + 1):
        yield from map(frozenset, combinations(names, size))


def answers(drive: Drive, stage: str, sent: object, alive: list[str]) -> dict[str, bytes]:
    if stage == "advertise":
        return {name: drive.advertise(name) for name in alive}
    act = getattr(drive, stage)
    return {name: act(name, sent[name] if isinstance(sent, dict) else sent) for name in alive}


@pytest.mark.parametrize("count", [4, 5])
def test_every_subset_of_dropouts_at_every_stage_gives_the_plain_sum_or_nothing(count: int) -> None:
    """The whole tree of 2**n choices at each of the five stages, pruned where a round failed."""
    ends = {"sum": 0, "failed": 0}

    def explore(drive: Drive, depth: int, sent: object, drops: dict[str, frozenset[str]]) -> None:
        stage = STAGES[depth]
        given = answers(drive, stage, sent, list(drive.server.pending))
        for lost in subsets(sorted(given)):
            server, now = copy.deepcopy(drive.server), {**drops, stage: lost}
            for name, answer in given.items():
                if name not in lost:
                    assert COLLECT[stage](server, name, answer)
            gone = frozenset().union(*now.values())
            if count - len(gone) < 4:
                with pytest.raises(RoundError) as caught:
                    CLOSE[stage](server)
                assert server.outcome.contributed == ()
                assert server._total is None
                assert all(name in caught.value.what for name in gone)
                ends["failed"] += 1
                continue
            following = CLOSE[stage](server)
            assert set(server.outcome.dropped) == gone
            if stage != "unmask":
                branch = copy.copy(drive)
                branch.server, branch.states = server, dict(drive.states)
                explore(branch, depth + 1, following, now)
                continue
            ends["sum"] += 1
            out = now["advertise"] | now["share"] | now["masked"]
            expected = [float(name not in out) for name in drive.names]
            sums = decode(drive.binding.layout, drive.binding.params, following)  # type: ignore[arg-type]
            assert sums["slots"].tolist() == expected
            assert set(server.outcome.contributed) == set(drive.names) - out

    explore(Drive.one_hot(count), 0, b"", {})
    # One way without drop-outs; for five, one hospital at one of five stages as well.
    assert ends["sum"] == {4: 1, 5: 26}[count]
    assert ends["failed"] > 0


def possible(drive: Drive, drops: dict[str, set[str]]) -> bool:
    """Whether the rules allow a sum: written apart from the server, from sets alone."""
    params, graph, alive = drive.binding.params, drive.server._graph, set(drive.names)
    left = {}
    for stage in STAGES:
        alive = alive - drops.get(stage, set())
        left[stage] = alive
    if min(len(left["advertise"]), len(left["share"]), len(left["masked"])) < params.min_cohort:
        return False
    return all(
        len(set(graph.of(owner)) & left[stage]) >= params.reconstruction_threshold
        for stage in STAGES[1:]
        for owner in left["share"]
    ) and graph.connected(left["masked"])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_larger_cohorts_give_the_plain_sum_exactly_when_the_rules_allow_one(
    data: st.DataObject,
) -> None:
    shares, threshold = data.draw(st.sampled_from([(5, 4), (7, 5), (9, 7), (3, 3), (5, 5)]))
    count = data.draw(st.integers(max(6, threshold), 14))
    params = SecAggParams(
        num_shares=shares, reconstruction_threshold=threshold,
        min_cohort=max(threshold, 4), max_cohort=count,
    )  # fmt: skip
    drive = Drive.one_hot(count, params)
    lost = data.draw(st.lists(st.sampled_from(drive.names), max_size=3, unique=True))
    drops: dict[str, set[str]] = {}
    for name in lost:
        drops.setdefault(data.draw(st.sampled_from(STAGES)), set()).add(name)
    try:
        sums = drive.sums(drops)["slots"]  # type: ignore[arg-type]
    except RoundError:
        assert not possible(drive, drops)
        return
    assert possible(drive, drops)
    out = set().union(*(drops.get(stage, set()) for stage in STAGES[:3]))
    assert sums.tolist() == [float(name not in out) for name in drive.names]
    assert set(drive.server.outcome.dropped) == set(lost)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [6, 11])
def test_one_dropout_in_a_ring_never_stops_a_round(count: int, stage: str) -> None:
    drive = Drive.one_hot(count)
    total = drive.sums({stage: [drive.names[1]]})["slots"]
    assert total.sum() == count - (stage in STAGES[:3])
    assert drive.server.outcome.dropped[drive.names[1]].stage == stage


def test_malformed_message_drops_only_its_sender_at_its_stage() -> None:
    for stage in STAGES:
        drive = Drive.one_hot(5)
        sent = drive.run(until=stage)
        for name, answer in answers(drive, stage, sent, drive.names).items():
            taken = COLLECT[stage](drive.server, name, b"\x93" if name == "h02" else answer)
            assert taken == (name != "h02")
        CLOSE[stage](drive.server)
        dropped = drive.server.outcome.dropped
        assert set(dropped) == {"h02"}
        assert (dropped["h02"].stage, dropped["h02"].reason) == (stage, "refused: secagg-malformed")


def test_second_answer_of_a_hospital_is_not_counted_twice() -> None:
    drive = Drive.one_hot(5)
    relays = drive.run(until="masked")
    sent = {name: drive.masked(name, relays[name]) for name in drive.names}  # type: ignore[index]
    for name in drive.names:
        assert drive.server.collect_masked(name, sent[name])
        assert not drive.server.collect_masked(name, sent[name])
    survivors = drive.server.close_masked()
    for name in drive.names:
        drive.server.collect_consistency(name, drive.consistency(name, survivors))
    signatures = drive.server.close_consistency()
    for name in drive.names:
        drive.server.collect_unmask(name, drive.unmask(name, signatures))
    assert drive.server.finish().tolist() == [1] * 5


def test_late_or_unknown_hospital_changes_nothing() -> None:
    drive = Drive.one_hot(5)
    late = drive.advertise("h04")
    drive.run({"advertise": ["h04"]}, until="share")
    assert not drive.server.collect_advertisement("h04", late)
    assert not drive.server.collect_shares("h15", b"")
    assert drive.server.pending == ("h00", "h01", "h02", "h03")


def test_drop_reported_by_the_transport_stands_in_the_outcome() -> None:
    drive = Drive.one_hot(5)
    drive.server.drop("h03", "node error 5")
    drive.run({"advertise": ["h03"]})
    assert drive.server.outcome.dropped["h03"].reason == "node error 5"


@pytest.mark.parametrize("bits", [24, 32, 40, 64])
def test_sum_is_right_in_every_ring(bits: int) -> None:
    drive = Drive.one_hot(5, SecAggParams(ring_bits=bits, max_cohort=5))
    assert drive.sums({"masked": ["h03"]})["slots"].tolist() == [1, 1, 1, 0, 1]


def test_failed_round_leaves_no_sum_and_cannot_go_on() -> None:
    drive = Drive.one_hot(5)
    with pytest.raises(RoundError, match=r"h00 at masked.*h01 at masked"):
        drive.run({"masked": ["h00", "h01"]})
    assert drive.server.stage == "failed"
    assert drive.server.pending == ()
    with pytest.raises(Exception, match="failed"):
        drive.server.finish()


def test_masked_inputs_show_nothing_of_the_vector() -> None:
    """Every masked input looks uniform: its mean is that of random ring elements."""
    drive = Drive.one_hot(5, SecAggParams(max_cohort=5))
    relays = drive.run(until="masked")
    packed = [
        np.frombuffer(drive.masked(name, relays[name])[-20:], dtype="<u4")  # type: ignore[index]
        for name in drive.names
    ]
    values = np.concatenate(packed)
    assert len(set(values.tolist())) == 25
    assert np.all(values > 2)

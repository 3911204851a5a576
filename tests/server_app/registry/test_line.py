"""The line of bases: published, taken back, made anew without what is withdrawn or excluded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.vectors import (
    RULES,
    Rule,
    candidate,
    difference,
    evaluation_gate,
    judge,
    leave_one_out,
    margin,
    no_gate,
)
from server_app.registry import GateRefusal, Registry
from tests.common.vectors.building import (
    accuracy,
    base,
    clouds,
    contribution,
    fit,
    serial,
    vector,
    weak_base,
)
from tests.server_app.registry.building import (
    KEYS,
    MEAN,
    arrives,
    bits,
    content,
    fresh,
    ids,
    refused,
    refuses,
    send,
    states,
    withdrawal,
)

ALL = [Rule.parse(name, {"lambda": 0.2} if name == "sum" else {}) for name in RULES]


@dataclass(frozen=True)
class Story:
    """Stages of vectors, each of which ends with a publication; then some that wait.

    A vector is (number, how many versions before the current its base is, hospital).
    """

    stages: list[list[tuple[int, int, int]]]
    rules: list[Rule]


@st.composite
def stories(draw: st.DrawFn, rivals: bool = True) -> Story:
    """Three hospitals or more in each stage, so that one less leaves something to publish.

    With ``rivals``, the first of a stage may have sent a second vector for the same base.
    """
    stages, number = [], 0
    for stage in range(draw(st.integers(2, 4))):
        rows = []
        for _ in range(draw(st.integers(3, 4))):
            rows.append((number, draw(st.integers(0, min(stage, 2))), number))
            number += 1
        if rivals and draw(st.booleans()):
            rows.append((number, rows[0][1], rows[0][2]))
            number += 1
        stages.append(rows)
    return Story(stages, [draw(st.sampled_from(ALL)) for _ in stages])


def tell(story: Story, registry: Registry, without: int | None = None) -> None:
    """Play a story, the vector ``without`` left out; the last stage is not published."""
    published = [registry.current().id]
    for stage, (rows, rule) in enumerate(zip(story.stages, story.rules, strict=True)):
        for number, age, hospital in rows:
            if number != without:
                send(registry, number, base=published[-1 - age], hospital=f"h{hospital}")
        if stage < len(story.stages) - 1:
            published.append(registry.publish(rule, skewed=False).id)


def models(registry: Registry) -> list[tuple[int, str]]:
    """Every base of the line, and the candidate."""
    proposal = registry.candidate(MEAN)
    return [*ids(registry), (-1, replace(proposal.base, weights=proposal.weights).id)]


@settings(deadline=None, max_examples=15)
@given(stories(), st.data())
def test_a_withdrawal_is_as_if_the_vector_had_never_come(story: Story, data: st.DataObject) -> None:
    number, _, whose = data.draw(st.sampled_from([v for rows in story.stages for v in rows]))
    with fresh() as registry, fresh() as other:
        tell(story, registry)
        registry.withdraw(withdrawal(number, f"h{whose}"), KEYS)
        tell(story, other, without=number)
        assert models(registry) == models(other)
        assert registry.rebuild() == []
        after = content(registry)
        registry.withdraw(withdrawal(number, f"h{whose}"), KEYS)
        assert content(registry) == after
        # Nothing of what is left on the disk was made with it.
        kept = {p.name.split("-")[1].split(".")[0] for p in registry.folder.glob("bases/*")}
        assert kept == {i for _, i in ids(registry)}


@settings(deadline=None, max_examples=15)
@given(stories(rivals=False), st.data())
def test_exclusion_does_the_same_and_inclusion_undoes_it(story: Story, data: st.DataObject) -> None:
    number = data.draw(st.sampled_from([v[0] for rows in story.stages for v in rows]))
    with fresh() as registry, fresh() as other:
        tell(story, registry)
        before, same = content(registry), models(registry)
        registry.exclude(serial(number), "harms")
        tell(story, other, without=number)
        assert models(registry) == models(other)
        assert states(registry)[serial(number)] == "excluded"
        # The current model of which leave-one-out speaks is the one that exclusion makes.
        registry.include(serial(number))
        assert content(registry) == before and models(registry) == same
        found = registry.weights_without(f"h{number}")
        assert bits(found) == bits(other.current().weights)
        found = registry.weights_without(f"h{number}", MEAN)
        assert bits(found) == bits(other.candidate(MEAN).weights)


def test_vectors_for_a_base_that_was_made_anew_count_with_the_same_staleness() -> None:
    with fresh() as registry:
        for n in range(4):
            send(registry, n)
        old = registry.publish(MEAN)
        send(registry, 10, base=old.id)
        registry.withdraw(withdrawal(0), KEYS)
        new = registry.current()
        assert new.id != old.id and new.version == old.version == 1
        assert send(registry, 11, base=old.id).staleness == 0
        assert send(registry, 12, base=new.id).staleness == 0
        assert send(registry, 13).staleness == 1
        assert {i.row.serial: i.staleness for i in registry.candidate(MEAN).ingredients} == {
            serial(10): 0, serial(11): 0, serial(12): 0, serial(13): 1,
        }  # fmt: skip


def test_a_base_and_its_replacement_are_one_when_a_hospital_sends_for_both() -> None:
    with fresh() as registry:
        for n in range(4):
            send(registry, n)
        old = registry.publish(MEAN)
        send(registry, 10, base=old.id, created="2026-01-02T00:00:00Z")
        registry.withdraw(withdrawal(0), KEYS)
        assert send(registry, 11, base=registry.current().id, hospital="h10").superseded
        assert [c.serial for c in registry.contributions()] == [serial(10)]


def test_a_late_vector_moves_the_next_base_by_its_server_step() -> None:
    with fresh() as registry:
        for n in range(3):
            send(registry, n)
        first = registry.publish(MEAN)
        send(registry, 4)
        expected = candidate(first.weights, [contribution(4, staleness=1)], MEAN)
        assert bits(registry.publish(MEAN).weights) == bits(expected)


def test_a_vector_is_in_one_publication() -> None:
    with fresh() as registry:
        for n in range(3):
            send(registry, n)
        registry.publish(MEAN)
        refuses(registry, "registry-quorum", registry.publish, MEAN)
        assert registry.contributions() == []


def test_publishing_needs_a_quorum_a_pretrained_base_and_three_skewed_hospitals() -> None:
    with fresh() as registry:
        refuses(registry, "registry-quorum", registry.publish, MEAN)
        send(registry, 0)
        send(registry, 1)
        refuses(registry, "merge-few", registry.publish, MEAN)
        refused("registry-quorum", registry.publish, MEAN, least=3, skewed=False)
        refused("registry-unchanged", registry.publish, MEAN.scaled(0.0), skewed=False)
        assert registry.publish(MEAN, skewed=False).version == 1
        # Later on, all hospitals of the line count: one more vector is enough.
        send(registry, 2)
        assert registry.publish(MEAN.scaled(0.3)).version == 2
        # A hospital counts once, however many bases its vectors are for.
        send(registry, 3)
        send(registry, 4, hospital="h3", base=registry.base(1).id)
        assert len(registry.candidate(MEAN).ingredients) == 2
        refused("registry-quorum", registry.publish, MEAN, least=2)
        assert registry.publish(MEAN).version == 3
    with fresh() as registry:
        refused("registry-line", registry.add_base, base(1))
        assert registry.add_base(base()).id == base().id


def test_from_a_random_base_nothing_is_merged() -> None:
    with fresh(first=base(pretrained=False)) as registry, fresh() as other:
        for n in range(3):
            send(registry, n)
            send(other, n)
        error = refuses(registry, "merge-base", registry.publish, MEAN)
        assert "ensemble" in error.remedy
        assert other.publish(MEAN).pretrained


def test_a_registry_without_a_base_says_so() -> None:
    with fresh(first=None) as registry:
        refused("registry-empty", registry.current)
        refused("registry-empty", registry.candidate, MEAN)
        refused("vector-base", send, registry, 1)


def test_the_gate_keeps_what_validates_worse_out() -> None:
    with fresh() as registry:
        for n in range(3):
            send(registry, n)
        worse = evaluation_gate(
            lambda w: 0.9 if bits(w) == bits(base().weights) else 0.8, count=1000
        )
        before = content(registry)
        with pytest.raises(GateRefusal) as caught:
            registry.publish(MEAN, gate=worse)
        assert caught.value.result.candidate == 0.8 and content(registry) == before
        better = evaluation_gate(
            lambda w: 0.8 if bits(w) == bits(base().weights) else 0.9, count=1000
        )
        registry.publish(MEAN, gate=better)
        assert '"candidate": 0.9' in registry.log().points[0].gate


def test_what_changes_while_the_candidate_is_judged_is_noticed() -> None:
    with fresh() as registry:
        for n in range(4):
            send(registry, n)

        def meddle(current: object, proposed: object):  # type: ignore[no-untyped-def]
            with Registry(registry.folder) as other:
                other.exclude(serial(1), "harms")
            return no_gate(current, proposed)  # type: ignore[arg-type]

        refused("registry-moved", registry.publish, MEAN, gate=meddle)

        def late(current: object, proposed: object):  # type: ignore[no-untyped-def]
            with Registry(registry.folder) as other:
                send(other, 5)
            return no_gate(current, proposed)  # type: ignore[arg-type]

        registry.publish(MEAN, gate=late)  # one that comes later waits for the next
        assert [c.serial for c in registry.contributions()] == [serial(5)]
        assert registry.rebuild() == []


def test_a_publication_is_taken_back_with_all_after_it() -> None:
    with fresh() as registry:
        for n in range(3):
            send(registry, n)
        first = registry.publish(MEAN)
        for n in range(3, 6):
            send(registry, n, base=first.id)
        send(registry, 9)  # for the first base; late
        second = registry.publish(MEAN)
        before = registry.current().id
        assert before == second.id
        assert registry.take_back(1).version == 0
        waiting = [serial(0), serial(1), serial(2), serial(9)]
        assert [c.serial for c in registry.contributions()] == sorted(waiting)
        refused("vector-base", send, registry, 12, base=first.id)
        after = content(registry)
        assert registry.take_back(1).version == 0
        assert content(registry) == after
        refused("registry-version", registry.take_back, 0)
        refused("registry-version", registry.take_back, 7)
        refused("registry-version", registry.base, 1)
        registry.exclude(serial(9), "so that it is the same as before")
        again = registry.publish(MEAN)
        assert again.id == first.id and again.version == 3  # a new number for an old model
        assert len(registry.contributions()) == 3  # those that were trained on it count again


def test_a_candidate_can_be_judged_for_as_long_as_it_takes() -> None:
    """The judgement is a table of hospitals' answers, days later; others have sent since."""
    with fresh() as registry:
        for n in range(3):
            send(registry, n)
        proposal = registry.candidate(MEAN)
        assert registry.refusal(proposal) is None
        assert registry.refusal(proposal, least=4).code == "registry-quorum"  # type: ignore[union-attr]
        send(registry, 8)
        refuses(registry, "registry-gate", registry.adopt, proposal, judge(0.9, 0.5, count=100))
        made = registry.adopt(proposal, judge(0.9, 0.91, count=100))
        assert bits(made.weights) == bits(proposal.weights)
        assert [c.serial for c in registry.contributions()] == [serial(8)]
        again = registry.adopt, proposal, judge(0.9, 0.91, count=100)
        refuses(registry, "registry-moved", *again)


def test_the_current_base_is_never_retired() -> None:
    with fresh() as registry:
        refused("registry-version", registry.retire, 0)
        for n in range(3):
            send(registry, n)
        registry.publish(MEAN)
        registry.retire(0)
        refused("vector-stale", send, registry, 5)
        registry.take_back(1)
        assert send(registry, 5).staleness == 0


def test_the_whole_line_is_made_anew_and_a_lost_base_is_mended() -> None:
    with fresh() as registry:
        stages = [[(0, 0, 0), (1, 0, 1), (2, 0, 2)], [(3, 0, 3), (4, 1, 4)], [(5, 0, 5)]]
        tell(Story(stages, ALL[:3]), registry)
        before = content(registry)
        path = next(registry.folder.glob("bases/00001-*"))
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused("registry-damaged", registry.base, 1)
        assert registry.rebuild() == [1]
        assert path.read_bytes() == whole
        path.unlink()
        assert registry.rebuild() == [1]
        assert content(registry) == before


def test_a_vector_that_was_changed_on_the_disk_is_noticed() -> None:
    with fresh() as registry:
        for n in range(3):
            send(registry, n)
        registry.publish(MEAN)
        path = registry.folder / "vectors" / f"{serial(1)}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
        refused("registry-damaged", registry.rebuild)


def test_a_registry_that_lost_its_rows_does_not_sweep_its_vectors_away() -> None:
    with fresh() as registry:
        send(registry, 1)
        registry.close()
        for path in registry.folder.glob("registry.sqlite*"):
            path.unlink()
        for _ in range(2):
            refused("registry-damaged", Registry, registry.folder)
        assert (registry.folder / "vectors" / f"{serial(1)}.safetensors").exists()


def test_a_registry_is_not_made_where_one_should_be() -> None:
    with fresh() as registry:
        refused("registry-unusable", Registry, registry.folder / "elsewhere", create=False)
        registry._store.execute("PRAGMA user_version=9")
        refused("registry-unusable", Registry, registry.folder)


def test_a_poisoned_vector_shows_in_the_registry_and_can_be_excluded() -> None:
    """Sign-flipped training, within the norm bound; found, excluded, and the model is better."""
    start = weak_base()
    with fresh(first=start) as registry:
        for n in range(6):
            tau = difference(fit(start.weights, *clouds(n, 60)), start.weights)
            if n == 3:
                tau = {k: np.float32(-4) * v for k, v in tau.items()}
            arrives(registry, vector(n, base=start.id, values=tau, bucket=32))
        registry.publish(MEAN)
        table = leave_one_out(
            [f"h{n}" for n in range(6)],
            registry.weights_without,
            accuracy,
            margin=margin(0.9, 2000),
        )
        assert table.harmful() == ["h3"]
        registry.exclude(serial(3), "lowers the validation accuracy")
        found = accuracy(registry.current().weights)
        assert found == table.rows[0].without > table.accuracy

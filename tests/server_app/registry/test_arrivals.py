"""Vectors that arrive: in any order, twice, from strangers, poisoned, and taken back."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from common.vectors import Limits, Rule, SignedVector
from server_app.registry import Registry
from tests.common.vectors.building import base, envelope, identity, serial, values, vector
from tests.server_app.registry.building import (
    KEYS,
    MEAN,
    arrives,
    bits,
    content,
    fresh,
    ids,
    refuses,
    send,
    states,
    withdrawal,
)

# Five hospitals; h1 sends a second vector for the same base, a day later.
AGAIN = vector(51, hospital="h1", created="2026-01-02T00:00:00Z")
VECTORS = [*(vector(n) for n in range(5)), AGAIN]
ORDERS = st.lists(st.integers(0, 5), max_size=5).flatmap(
    lambda more: st.permutations([*range(6), *more])
)


def reference() -> tuple[dict[str, object], list[tuple[int, str]]]:
    with fresh() as registry:
        for made in VECTORS:
            arrives(registry, made)
        before = content(registry)
        registry.publish(MEAN, least=5)
        return before, ids(registry)


REFERENCE: list[tuple[dict[str, object], list[tuple[int, str]]]] = []


@settings(deadline=None, max_examples=15)
@given(ORDERS)
def test_every_order_with_any_duplicates_makes_the_same_bits(order: list[int]) -> None:
    REFERENCE[:] = REFERENCE or [reference()]
    with fresh() as registry:
        seen = set()
        for n in order:
            assert arrives(registry, VECTORS[n]).duplicate == (n in seen)
            seen.add(n)
        assert content(registry) == REFERENCE[0][0]
        registry.publish(MEAN, least=5)
        for n in order:
            assert arrives(registry, VECTORS[n]).duplicate
        assert ids(registry) == REFERENCE[0][1]


def test_the_newest_of_a_hospital_and_base_counts_and_an_older_one_is_kept() -> None:
    with fresh() as registry:
        assert not arrives(registry, AGAIN).superseded
        assert send(registry, 1).superseded
        assert states(registry) == {serial(51): "accepted", serial(1): "superseded"}
        assert [c.serial for c in registry.contributions()] == [serial(51)]
        registry.withdraw(withdrawal(51, "h1"), KEYS)
        assert states(registry) == {serial(51): "withdrawn", serial(1): "accepted"}


def test_an_older_vector_does_not_come_back_for_an_excluded_one() -> None:
    with fresh() as registry:
        send(registry, 1)
        arrives(registry, AGAIN)
        registry.exclude(serial(51), "harms")
        assert registry.contributions() == []
        registry.include(serial(51))
        assert [c.serial for c in registry.contributions()] == [serial(51)]


def test_what_does_not_fit_is_refused_and_nothing_is_stored() -> None:
    with fresh(Limits(max_replacements=2)) as registry:
        for n in range(4):
            send(registry, n)
        accept, odd = registry.accept, vector(9)
        stranger = SignedVector.sign(odd, identity("h8")).to_bytes()
        for code, bad in (
            ("vector-format", b"\0" * 20),
            ("vector-signature", stranger),
            ("vector-base", envelope(vector(9, base="0" * 64))),
            ("vector-serial", envelope(vector(9, serial=serial(1)))),
            ("vector-bucket", envelope(vector(9, bucket=1 << 20))),
            ("vector-shape", envelope(vector(9, values={"x": np.ones(3, np.float32)}))),
            ("vector-norm", envelope(vector(9, values=values(9, scale=10.0)))),  # × 100
        ):
            refuses(registry, code, accept, bad, KEYS)
        refuses(registry, "vector-hospital", accept, envelope(odd), {"h1": KEYS["h1"]})
        arrives(registry, AGAIN)
        third = vector(52, hospital="h1")
        refuses(registry, "vector-many", accept, envelope(third), KEYS)


def test_a_superseded_vector_does_not_stretch_the_norm_bound() -> None:
    """A hospital that sends longer and longer vectors is alone with them in no median."""
    with fresh() as registry:
        for n in range(4):
            send(registry, n)
        for step, scale in enumerate((0.4, 0.42, 0.44, 0.46, 0.48, 0.49)):
            when = f"2026-01-02T00:00:0{step}Z"
            send(registry, 40 + step, hospital="h9", values=values(9, scale), created=when)
        bad = vector(50, hospital="h9", values=values(9, 1.5), created="2026-01-03T00:00:00Z")
        refuses(registry, "vector-norm", registry.accept, envelope(bad), KEYS)


def test_one_vector_for_each_hospital_and_base_once_it_is_published() -> None:
    with fresh() as registry:
        for n in range(3):
            send(registry, n)
        registry.publish(MEAN)
        refuses(registry, "vector-used", registry.accept, envelope(AGAIN), KEYS)
        late = send(registry, 4)
        assert late.staleness == 1


def test_a_vector_for_a_retired_or_too_old_base_is_told_so() -> None:
    with fresh(Limits(max_staleness=1)) as registry:
        for version in range(2):
            for n in range(3):
                send(registry, 10 * version + n, base=registry.current().id)
            registry.publish(MEAN)
        refuses(registry, "vector-stale", registry.accept, envelope(vector(30)), KEYS)
        newer = registry.base(1)
        send(registry, 31, base=newer.id)
        registry.retire(1)
        late = envelope(vector(32, base=newer.id))
        refuses(registry, "vector-stale", registry.accept, late, KEYS)
        assert len(registry.contributions()) == 1  # what came before counts on


def test_a_withdrawn_vector_is_gone_and_never_comes_again() -> None:
    with fresh() as registry:
        for n in range(4):
            send(registry, n, epsilon=6.0, delta=1e-5, metrics={"val-accuracy": 0.515625})
        folder = registry.folder
        refuses(registry, "vector-serial", registry.withdraw, withdrawal(1, "h2"), KEYS)
        registry.withdraw(withdrawal(1), KEYS)
        after = content(registry)
        assert not (folder / "vectors" / f"{serial(1)}.safetensors").exists()
        tombstone = next(e.row for e in registry.vectors() if e.row.serial == serial(1))
        assert (tombstone.metrics, tombstone.norm, tombstone.bucket) == ("{}", 0.0, 0)
        assert tombstone.epsilon == 6.0  # what was spent stays spent
        refuses(registry, "vector-withdrawn", registry.accept, envelope(vector(1)), KEYS)
        refuses(registry, "vector-withdrawn", registry.exclude, serial(1), "why not")
        registry.withdraw(withdrawal(1), KEYS)
        assert content(registry) == after


def test_a_vector_can_be_withdrawn_before_it_has_arrived() -> None:
    with fresh() as registry:
        registry.withdraw(withdrawal(1), KEYS)
        refuses(registry, "vector-withdrawn", registry.accept, envelope(vector(1)), KEYS)
        assert registry.contributions() == []


def test_a_withdrawal_must_be_signed_by_the_hospital() -> None:
    with fresh() as registry:
        send(registry, 1)
        forged = withdrawal(1).replace(b'"h1"', b'"h2"')
        refuses(registry, "vector-signature", registry.withdraw, forged, KEYS)
        refuses(registry, "vector-hospital", registry.withdraw, withdrawal(1), {})
        refuses(registry, "registry-vector", registry.exclude, serial(7), "not here")


def test_the_registry_is_the_same_after_it_was_closed() -> None:
    with fresh() as registry:
        for n in range(3):
            send(registry, n)
        registry.publish(Rule.parse("ties", {"keep": 0.5}))
        send(registry, 4)
        before = content(registry)
        registry.close()
        folder = registry.folder / "vectors"
        (folder / f".{serial(9)}.safetensors.x7d").write_bytes(b"half a file")
        (folder / f"{serial(9)}.safetensors").write_bytes(envelope(vector(9)))
        with Registry(registry.folder, create=False) as again:
            assert content(again) == before
            assert bits(again.base(0).weights) == bits(base().weights)

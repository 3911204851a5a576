"""Where updates are seen one by one: what each may weigh."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server_app.defence.updates import capped, sift

WEIGHTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3), st.floats(1, 1e6), min_size=1, max_size=12
)


@given(weights=WEIGHTS, share=st.floats(0.05, 1.0))
def test_nobody_weighs_more_than_the_share_and_nobody_gains(
    weights: dict[str, float], share: float
) -> None:
    found = capped(weights, share)
    allowed = max(share, 1 / len(weights))
    assert set(found) == set(weights)
    assert max(found.values()) <= allowed * sum(found.values()) * (1 + 1e-6)
    assert all(found[name] <= weights[name] * (1 + 1e-9) for name in weights)


@given(weights=WEIGHTS)
def test_who_is_below_the_share_keeps_its_weight(weights: dict[str, float]) -> None:
    if max(weights.values()) <= 0.5 * sum(weights.values()):
        assert capped(weights, 0.5) == weights


def test_a_claim_and_a_long_update_are_bounded() -> None:
    claimed = {"a": 100.0, "b": 16_384.0, "c": 90.0, "d": 110.0, "e": 100.0}
    norms = {"a": 1.0, "b": 1.1, "c": 0.9, "d": 40.0, "e": 1.2}
    agreed = dict.fromkeys(claimed, 120)
    found = sift(claimed, norms, agreed=agreed, most=16_384, share=0.5)
    assert found.weights == {"a": 100.0, "b": 120.0, "c": 90.0, "e": 100.0}
    assert set(found.set_aside) == {"d"}
    assert set(found.lowered) == {"b"}


def test_an_update_that_is_not_a_number_is_set_aside() -> None:
    claimed = dict.fromkeys("abcd", 10.0)
    norms = {"a": 1.0, "b": 1.0, "c": 1.0, "d": float("nan")}
    assert set(sift(claimed, norms, agreed={}, most=100, share=1.0).set_aside) == {"d"}


def test_of_two_hospitals_each_weighs_by_its_images() -> None:
    claimed, norms = {"a": 30.0, "b": 70.0}, {"a": 1.0, "b": 1.0}
    assert sift(claimed, norms, agreed={}, most=100, share=0.5).weights == claimed

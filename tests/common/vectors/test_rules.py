"""The merge rules: what they compute, and that the order of arrival leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.vectors import (
    RULES,
    Contribution,
    Rule,
    VectorError,
    bucket_of,
    candidate,
    difference,
    norm_of,
    server_step,
)
from tests.common.vectors.building import base, contribution, same, serial, values, weights

ALL = [Rule.parse(name, {"lambda": 0.2} if name == "sum" else {}) for name in RULES]
any_rule = st.builds(lambda rule, s: rule.scaled(s), st.sampled_from(ALL), st.floats(0.1, 2.0))
numbers = st.lists(st.integers(0, 50), min_size=1, max_size=7, unique=True)


def single(rows: list[list[float]], weights: list[float] | None = None) -> list[Contribution]:
    """Vectors of one entry ``x``, written out."""
    of = weights or [1.0] * len(rows)
    return [
        Contribution(serial(i), f"h{i}", {"x": np.array(row, dtype=np.float32)}, w)
        for i, (row, w) in enumerate(zip(rows, of, strict=True))
    ]


@settings(deadline=None)
@given(any_rule, numbers, st.data())
def test_every_rule_gives_the_same_bits_in_every_order(
    rule: Rule, chosen: list[int], data: st.DataObject
) -> None:
    given_ = [contribution(n, staleness=n % 3) for n in chosen]
    other = data.draw(st.permutations(given_))
    assert same(candidate(weights(), given_, rule), candidate(weights(), other, rule))
    assert same(rule.merge(given_), rule.merge(other))


@settings(deadline=None)
@given(numbers)
def test_the_mean_is_weighted_by_the_buckets(chosen: list[int]) -> None:
    given_ = [contribution(n) for n in chosen]
    merged = Rule().merge(given_)
    for name, found in merged.items():
        expected = np.average(
            [c.values[name] for c in given_], axis=0, weights=[c.weight for c in given_]
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        assert found.dtype == np.float64


@settings(deadline=None)
@given(any_rule, st.integers(0, 20))
def test_the_scale_multiplies_and_0_is_no_merge(rule: Rule, number: int) -> None:
    given_ = [contribution(number), contribution(number + 1)]
    once, twice = rule.scaled(0.5).merge(given_), rule.scaled(1.0).merge(given_)
    for name in once:
        np.testing.assert_array_equal(2 * once[name], twice[name])
    still = candidate(weights(), given_, rule.scaled(0.0))
    assert same(still, dict(sorted(weights().items())))


def test_the_sum_is_the_papers() -> None:
    merged = Rule.parse("sum", {"lambda": 0.25}).merge(single([[1, 2], [3, -2]], [1, 100]))
    np.testing.assert_array_equal(merged["x"], [1.0, 0.0])


def test_the_sum_warns_when_lambda_n_is_above_2() -> None:
    rule = Rule.parse("sum", {"lambda": 1.0})
    assert rule.warning(2) is None
    assert "0.1" in str(rule.warning(10))
    assert rule.scaled(0.2).warning(10) is None
    assert Rule().warning(1000) is None


@settings(deadline=None)
@given(numbers, st.floats(0.01, 100))
def test_norm_equalised_gives_every_direction_the_same_length(
    chosen: list[int], factor: float
) -> None:
    """Stretching one vector changes the common length at most, not the direction."""
    given_ = [contribution(n) for n in chosen]
    longer = {k: (v * np.float32(factor)) for k, v in given_[0].values.items()}
    c = given_[0]
    other = [Contribution(c.serial, c.hospital, longer, c.weight), *given_[1:]]
    a, b = Rule(name="norm-equalised").merge(given_), Rule(name="norm-equalised").merge(other)
    ratio = norm_of(b) / norm_of(a)
    for name in a:
        np.testing.assert_allclose(b[name], ratio * a[name], rtol=1e-4, atol=1e-7 * ratio)


def test_norm_equalised_takes_the_median_norm_and_leaves_zeros_alone() -> None:
    merged = Rule(name="norm-equalised").merge(single([[1, 0], [0, 3], [20, 0], [0, 0]]))
    np.testing.assert_allclose(merged["x"], [1.5, 0.75])


def test_ties_is_trim_elect_and_disjoint_mean() -> None:
    """By hand: keep 2 of 4; entry 0 elects +, entry 1 −, entry 2 only one, entry 3 nobody."""
    rows = [[4.0, 3.0, 0.1, 0.2], [2.0, -5.0, 0.3, 0.1], [-3.0, 0.1, 2.0, 0.3]]
    merged = Rule.parse("ties", {"keep": 0.5}).merge(single(rows))
    np.testing.assert_allclose(merged["x"], [3.0, -5.0, 2.0, 0.0])


def test_ties_with_everything_kept_and_one_sign_is_the_mean() -> None:
    rows, of = [[1.0, 2.0], [3.0, 4.0]], [1.0, 3.0]
    merged = Rule.parse("ties", {"keep": 1.0}).merge(single(rows, of))
    np.testing.assert_allclose(merged["x"], Rule().merge(single(rows, of))["x"])


def test_dare_drops_the_given_part_and_keeps_the_mean() -> None:
    ones = {"x": np.ones(40_000, dtype=np.float32)}
    made = Rule.parse("dare", {"drop": 0.75}).merge([Contribution(serial(1), "h", ones, 8.0)])
    kept = made["x"] > 0
    assert abs(kept.mean() - 0.25) < 0.01
    np.testing.assert_allclose(made["x"][kept], 4.0)


def test_dares_mask_is_the_vectors_own() -> None:
    """The same whoever else is there, and another for another serial or entry."""
    ones = {"x": np.ones(256, dtype=np.float32), "y": np.ones(256, dtype=np.float32)}
    none = {k: np.zeros_like(v) for k, v in ones.items()}
    rule = Rule.parse("dare")
    alone = rule.merge([Contribution(serial(1), "h1", ones, 1.0)])
    both = [Contribution(serial(1), "h1", ones, 1.0), Contribution(serial(2), "h2", none, 1.0)]
    np.testing.assert_array_equal(rule.merge(both)["x"], alone["x"] / 2)
    other = rule.merge([Contribution(serial(3), "h1", ones, 1.0)])
    assert (other["x"] != alone["x"]).any() and (alone["x"] != alone["y"]).any()


@settings(deadline=None)
@given(any_rule, st.integers(0, 30), st.integers(1, 40))
def test_a_single_stale_vector_moves_the_model_by_its_server_step(
    rule: Rule, number: int, staleness: int
) -> None:
    given_ = contribution(number, staleness)
    made = candidate(weights(), [given_], rule)
    for name, values_ in given_.values.items():
        moved = server_step(staleness) * values_.astype(np.float64)
        expected = (weights()[name].astype(np.float64) + moved).astype(weights()[name].dtype)
        np.testing.assert_array_equal(made[name], expected)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_stale_vectors_together_move_no_further_than_the_greatest_step(stale: list[int]) -> None:
    given_ = [contribution(n, k, values=values(0)) for n, k in enumerate(stale)]
    made = difference(candidate(weights(), given_, Rule()), weights())
    lone = server_step(min(stale)) * norm_of(values(0))
    assert norm_of(made) <= lone * 1.01 + 1e-3  # float16 rounds


def test_the_server_step_falls_with_staleness() -> None:
    assert [round(server_step(k), 4) for k in (0, 1, 3)] == [0.3, 0.2121, 0.15]


def test_counters_stay_and_every_entry_keeps_its_type() -> None:
    made = candidate(weights(5), [contribution(1), contribution(2, 1)], Rule())
    assert made["steps"] == 5 and made["steps"].dtype == np.int64
    assert {k: v.dtype for k, v in made.items()} == {k: v.dtype for k, v in weights(5).items()}


@settings(deadline=None)
@given(st.integers(1, 10**9))
def test_a_bucket_tells_the_power_of_two_only(count: int) -> None:
    assert bucket_of(count) <= count < 2 * bucket_of(count)
    assert bucket_of(count).bit_count() == 1


def test_a_vector_added_to_its_base_is_the_fine_tuned_model() -> None:
    tuned = {**weights(), **{k: v + values(1)[k] for k, v in base().weights.items() if k in
             values(1) and v.dtype == np.float32}}  # fmt: skip
    tau = difference(tuned, base().weights)
    made = candidate(base().weights, [contribution(1, values=tau)], Rule())
    for name in made:
        np.testing.assert_allclose(made[name], tuned[name], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("median", {}), ("mean", {"keep": 0.2}), ("sum", {}), ("sum", {"lambda": 0.0}),
        ("ties", {"keep": 1.5}), ("ties", {"keep": "0.2"}), ("dare", {"drop": 1.0}),
        ("mean", {"scale": float("nan")}), ("mean", {"scale": True}), ("mean", {"scale": -1}),
    ],
    ids=repr,
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(name: str, parameters: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        Rule.parse(name, parameters)
    assert caught.value.what and caught.value.remedy


@settings(deadline=None)
@given(any_rule)
def test_a_rule_comes_back_from_its_recipe_and_from_text(rule: Rule) -> None:
    assert Rule.from_dict(rule.to_dict()) == rule
    told = rule.to_dict()
    text = " ".join([str(told.pop("rule")), *(f"{k}={v!r}" for k, v in told.items())])
    assert Rule.from_text(text) == rule


@pytest.mark.parametrize("text", ["", "ties keep", "ties keep=x", "ties keep=0.1 keep=0.2"])
def test_text_that_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Rule.from_text(text)


def test_what_cannot_be_merged_is_refused() -> None:
    one = contribution(1)
    odd = Contribution(serial(8), "h8", {"x": np.ones(2, dtype=np.float32)}, 1.0)
    light = Contribution(serial(9), "h9", one.values, 0.0)
    huge = {k: np.full_like(v, 3e38) for k, v in one.values.items()}
    for given_, code in (
        ([], "merge-empty"),
        ([one, one], "merge-duplicate"),
        ([one, light], "merge-weight"),
        ([one, odd], "vector-shape"),
    ):
        with pytest.raises(VectorError) as caught:
            Rule().merge(given_)
        assert caught.value.code == code
    for bad, code in ((odd, "vector-shape"), (contribution(1, values=huge), "merge-overflow")):
        with pytest.raises(VectorError) as caught:
            candidate(weights(), [bad], Rule())
        assert caught.value.code == code

"""Fixed point: exact where promised, never wrapping, accurate enough, and silent on values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.secagg import (
    Refusal,
    SecAggParams,
    Segment,
    VectorLayout,
    decode,
    encode,
    update_layout,
)
from common.secagg.encoding import pack, ring_dtype, unpack, zeros

METRICS = (
    Segment(name="correct", length=1, bound=100_000, kind="integer"),
    Segment(name="loss", length=1, bound=50.0, weighted=True),
)


def test_weighted_mean_is_within_2_to_the_minus_20_of_the_range_for_fifty_hospitals() -> None:
    params = SecAggParams(max_cohort=50, ring_bits=32)
    layout = update_layout(2000, bound=0.5, max_weight=4096, metrics=METRICS)
    rng = np.random.default_rng(1)
    for count, weights in ((50, 4096 // 16), (4, 4096 // 16), (50, 4096)):
        total, exact, weight_sum = zeros(layout, params), np.zeros(2000), 0
        for _ in range(count):
            x = rng.uniform(-0.5, 0.5, 2000).astype(np.float32)
            values = {"update": x, "correct": np.array([7]), "loss": np.array([2.5])}
            total += encode(layout, params, values, weight=weights).vector
            exact += weights * x.astype(np.float64)
            weight_sum += weights
        sums = decode(layout, params, total)
        assert sums["weight"].tolist() == [weight_sum]
        assert sums["correct"].tolist() == [7 * count]
        assert sums["loss"][0] / weight_sum == pytest.approx(2.5, abs=50 * 2**-20)
        error = np.abs(sums["update"] - exact).max() / weight_sum
        assert error <= 0.5 * 2**-20


def test_stochastic_rounding_has_no_bias() -> None:
    params = SecAggParams(max_cohort=4, ring_bits=24, min_precision_bits=16)
    layout = VectorLayout((Segment(name="x", length=20_000, bound=1.0),))
    plan = layout.plan(params)[0]
    x = np.full(20_000, 1000.25 / plan.scale)
    steps = decode(layout, params, encode(layout, params, {"x": x}, weight=1).vector)["x"]
    steps = np.round(steps * plan.scale)
    assert set(steps.tolist()) == {1000.0, 1001.0}
    assert steps.mean() == pytest.approx(1000.25, abs=0.02)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([16, 24, 32, 40, 48, 56, 64]),
    cohort=st.integers(4, 4096),
    bound=st.floats(1e-6, 1e6),
    max_weight=st.integers(1, 1 << 20),
)
def test_a_whole_cohort_at_the_extremes_never_wraps(
    bits: int, cohort: int, bound: float, max_weight: int
) -> None:
    params = SecAggParams(max_cohort=cohort, ring_bits=bits, min_precision_bits=8)
    layout = VectorLayout((Segment(name="x", length=2, bound=bound, weighted=True),), max_weight)
    try:
        (plan,) = layout.plan(params)
    except ConfigError:
        assert (2 ** (bits - 1) - 1) // cohort < 2**8
        return
    assert cohort * plan.limit < 2 ** (bits - 1)
    full = entropy_of(0xFF)
    values = {"x": np.array([bound, -bound])}
    vector = encode(layout, params, values, weight=max_weight, entropy=full).vector
    total = vector * vector.dtype.type(cohort)
    sums = decode(layout, params, total)["x"] / (cohort * max_weight)
    assert sums == pytest.approx([bound, -bound], rel=2 / plan.limit * 4)


def entropy_of(byte: int):  # type: ignore[no-untyped-def]
    return lambda count: bytes([byte]) * count


@pytest.mark.parametrize(
    ("segment", "max_weight", "params"),
    [
        (Segment(name="n", length=1, bound=2**40, kind="integer"), 1, SecAggParams()),
        (
            Segment(name="n", length=1, bound=1, kind="integer", weighted=True),
            2**30,
            SecAggParams(),
        ),
        (Segment(name="x", length=1, bound=1.0), 1, SecAggParams(ring_bits=16)),
        (Segment(name="x", length=1, bound=1.0, step=1e-9), 1, SecAggParams()),
        (
            Segment(name="n", length=1, bound=2**50, kind="integer"),
            1,
            SecAggParams(ring_bits=64, max_cohort=50),
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_numbers_and_three_ways_out(
    segment: Segment, max_weight: int, params: SecAggParams
) -> None:
    with pytest.raises(ConfigError) as caught:
        VectorLayout((segment,), max_weight).plan(params)
    assert str(params.ring_bits) in caught.value.what
    assert str(params.max_cohort) in caught.value.what
    for way in ("smaller range", "smaller max_weight", "max_cohort", "more ring_bits"):
        assert way in caught.value.remedy


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_by_segment_name_without_values(bad: float) -> None:
    layout = update_layout(70_000, bound=1.0, max_weight=1000)
    x = np.zeros(70_000, dtype=np.float32)
    x[69_999] = bad
    with pytest.raises(Refusal) as caught:
        encode(layout, SecAggParams(), {"update": x}, weight=777)
    assert caught.value.code == "secagg-not-finite"
    assert "'update'" in caught.value.what
    assert "777" not in str(caught.value)


def test_clipped_values_are_counted() -> None:
    layout = update_layout(5, bound=1.0, max_weight=10)
    x = np.array([0.5, 1.0, -1.0, 2.0, -1.5])
    encoded = encode(layout, SecAggParams(), {"update": x}, weight=3)
    assert encoded.clipped == {"update": 2, "weight": 0}
    sums = decode(layout, SecAggParams(), encoded.vector)
    assert sums["update"] / 3 == pytest.approx([0.5, 1, -1, 1, -1], abs=2**-20)
    assert sums["weight"].tolist() == [3]


@pytest.mark.parametrize(
    ("values", "weight", "code"),
    [
        ({"update": np.zeros(5)}, 0, "secagg-weight"),
        ({"update": np.zeros(5)}, 11, "secagg-weight"),
        ({"update": np.zeros(5)}, True, "secagg-weight"),
        ({"update": np.zeros(4)}, 1, "secagg-values"),
        ({"update": np.zeros(5, dtype=np.int64)}, 1, "secagg-values"),
        ({}, 1, "secagg-values"),
        ({"update": np.zeros(5), "other": np.zeros(1)}, 1, "secagg-values"),
    ],
)
def test_values_that_are_not_the_layouts_are_refused(
    values: dict[str, np.ndarray], weight: int, code: str
) -> None:
    with pytest.raises(Refusal) as caught:
        encode(update_layout(5, bound=1.0, max_weight=10), SecAggParams(), values, weight=weight)
    assert caught.value.code == code


def test_integers_are_exact_or_refused() -> None:
    layout = VectorLayout((Segment(name="n", length=3, bound=1000, kind="integer"),))
    values = np.array([-1000, 0, 999])
    vector = encode(layout, SecAggParams(), {"n": values}, weight=1).vector
    assert decode(layout, SecAggParams(), vector)["n"].tolist() == values.tolist()
    with pytest.raises(Refusal) as caught:
        encode(layout, SecAggParams(), {"n": np.array([0, 0, 54321])}, weight=1)
    assert caught.value.code == "secagg-integer-range"
    assert "54321" not in str(caught.value)
    with pytest.raises(Refusal):
        encode(layout, SecAggParams(), {"n": np.zeros(3)}, weight=1)


@pytest.mark.parametrize("bits", range(16, 65, 8))
def test_packing_keeps_the_ring_element_and_checks_the_length(bits: int) -> None:
    rng = np.random.default_rng(bits)
    vector = rng.integers(0, 2**63, 9, dtype=np.uint64).astype(ring_dtype(bits))
    data = pack(vector, bits)
    assert len(data) == 9 * bits // 8
    back = unpack(data, 9, bits)
    assert back.tolist() == [int(value) % 2**bits for value in vector]
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(Refusal):
            unpack(wrong, 9, bits)


def test_encoded_vector_and_clipping_are_not_in_its_repr() -> None:
    layout = VectorLayout((Segment(name="n", length=1, bound=10**6, kind="integer"),))
    encoded = encode(layout, SecAggParams(), {"n": np.array([424242])}, weight=1)
    assert "424242" not in repr(encoded)

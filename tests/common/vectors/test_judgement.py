"""What is accepted, what is merged, and what validation data say: with poisoned vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from common.vectors import (
    Contribution,
    Limits,
    Place,
    Rule,
    VectorError,
    candidate,
    check_fit,
    choose_scale,
    difference,
    ensemble,
    evaluation_gate,
    leave_one_out,
    margin,
    merge_refusal,
    newest,
    norm_of,
)
from tests.common.vectors.building import (
    accuracy,
    base,
    clouds,
    fit,
    serial,
    values,
    vector,
    weak_base,
)

LIMITS = Limits(max_norm=50.0, norm_factor=5.0)
NORMS = [vector(n).norm() for n in range(4)]


def refused(code: str, **changes: object) -> VectorError:
    with pytest.raises(VectorError) as caught:
        check_fit(vector(9, **changes), base().template(), NORMS, LIMITS)
    assert caught.value.code == code
    return caught.value


def test_an_ordinary_vector_is_accepted_and_its_norm_told() -> None:
    assert check_fit(vector(9), base().template(), NORMS, LIMITS) == vector(9).norm()


def test_a_vector_a_hundred_times_too_long_is_refused() -> None:
    refused("vector-norm", values=values(9, scale=10.0))
    with pytest.raises(VectorError):  # by the absolute bound, where nothing was accepted before
        check_fit(vector(9, values=values(9, scale=20.0)), base().template(), [], LIMITS)
    fits = vector(9, values=values(9, scale=1.0))
    assert check_fit(fits, base().template(), NORMS[:3], LIMITS) == fits.norm()


def test_a_vector_of_another_model_or_an_incredible_size_is_refused() -> None:
    without = {k: v for k, v in values(9).items() if k != "body.bias"}
    assert "body.bias" in refused("vector-shape", values=without).what
    refused("vector-shape", values=values(9) | {"extra": np.zeros(2, np.float32)})
    refused("vector-shape", values=values(9) | {"body.bias": np.zeros(6, np.float32)})
    refused("vector-bucket", bucket=1 << 20)


@pytest.mark.parametrize(
    "change", [{"max_norm": 0.0}, {"max_norm": np.inf}, {"norm_factor": 0.5}, {"max_staleness": -1}]
)
def test_limits_that_make_no_sense_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Limits(**change)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.permutations([Place("a", "2026-1"), Place("c", "2026-2"), Place("b", "2026-2")]))
def test_the_newest_is_by_what_was_signed_not_by_arrival(places: list[Place]) -> None:
    assert newest(places) == "c"


def test_merging_is_refused_from_a_random_base_and_for_two_skewed_hospitals() -> None:
    random = merge_refusal(pretrained=False, hospitals=10, skewed=False)
    few = merge_refusal(pretrained=True, hospitals=2, skewed=True)
    assert random is not None and random.code == "merge-base" and "ensemble" in random.remedy
    assert few is not None and few.code == "merge-few" and "ensemble" in few.remedy
    assert merge_refusal(pretrained=True, hospitals=3, skewed=True) is None
    assert merge_refusal(pretrained=True, hospitals=2, skewed=False) is None


def test_the_ensemble_is_the_weighted_mean_of_probabilities() -> None:
    logits = {"b": np.array([[0.0, 0.0]]), "a": np.array([[1000.0, 0.0]])}
    np.testing.assert_allclose(ensemble(logits, {"a": 3.0, "b": 1.0}), [[0.875, 0.125]])
    turned = dict(reversed(list(logits.items())))
    found = ensemble(turned, {"b": 1.0, "a": 3.0})
    assert found.tobytes() == ensemble(logits, {"a": 3.0, "b": 1.0}).tobytes()
    for bad_weights in ({"a": 1.0}, {"a": 1.0, "b": 0.0}):
        with pytest.raises(VectorError):
            ensemble(logits, bad_weights)


# Six hospitals fine-tune a weak base on clouds of points.

START = weak_base()
HONEST = {f"h{n}": difference(fit(START.weights, *clouds(n, 60)), START.weights) for n in range(5)}


def merged(vectors: dict[str, dict[str, np.ndarray]], without: str | None = None) -> object:
    given_ = [
        Contribution(serial(i), name, v, 32.0)
        for i, (name, v) in enumerate(sorted(vectors.items()))
        if name != without
    ]
    return candidate(START.weights, given_, Rule())


def table(bad: dict[str, np.ndarray]):  # type: ignore[no-untyped-def]
    vectors = HONEST | {"bad": bad}
    return leave_one_out(
        vectors,
        lambda without: merged(vectors, without),  # type: ignore[arg-type, return-value]
        accuracy,
        margin=margin(0.9, 2000),
    )


def test_honest_vectors_make_a_better_model_and_none_is_flagged() -> None:
    assert accuracy(merged(HONEST)) > accuracy(START.weights) + 0.02  # type: ignore[arg-type]
    honest = table(difference(fit(START.weights, *clouds(20, 60)), START.weights))
    assert honest.harmful() == []


def test_a_sign_flipped_vector_shows() -> None:
    """Four times as strong as honest ones, which the norm bound lets pass."""
    flipped = {k: -4 * v for k, v in HONEST["h0"].items()}
    norms = [norm_of(v) for v in HONEST.values()]
    odd = vector(9, values=flipped)
    assert check_fit(odd, START.template(), norms, Limits())
    found = table(flipped)
    assert found.harmful() == ["bad"]
    assert found.rows[0].influence == found.accuracy - found.rows[0].without < 0


def test_training_on_flipped_labels_shows() -> None:
    points, labels = clouds(30, 60)
    found = table(difference(fit(START.weights, points, (labels + 1) % 3, 60), START.weights))
    assert found.rows[0].hospital == "bad" and found.harmful() == ["bad"]


def test_a_random_vector_shows_or_is_too_long() -> None:
    rng = np.random.default_rng(0)
    noise = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in HONEST["h0"].items()}
    norms = [norm_of(v) for v in HONEST.values()]
    for factor in (4.9, 100.0):
        length = factor * float(np.median(norms)) / norm_of(noise)
        bad = {k: (length * v).astype(np.float32) for k, v in noise.items()}
        if factor > Limits().norm_factor:
            with pytest.raises(VectorError):
                check_fit(vector(9, values=bad), START.template(), norms, Limits())
        else:
            assert "bad" in table(bad).harmful()


def test_the_margin_is_a_standard_error() -> None:
    assert margin(0.92, 300) == pytest.approx(0.016, abs=0.001)
    assert margin(0.92, 1412) == pytest.approx(0.0072, abs=0.0003)
    assert margin(1.0, 100) > 0 and margin(0.5, 100, 2.0) == 2 * margin(0.5, 100)
    with pytest.raises(ConfigError):
        margin(0.5, 0)


def test_no_merge_wins_unless_the_best_is_better_by_more_than_the_margin() -> None:
    def choose(gain: float) -> float:
        return choose_scale(
            lambda s: {"s": np.array(s)},
            lambda w: 0.9 + gain * (1.0 - abs(float(w["s"]) - 1.0)),
            base_accuracy=0.9,
            count=300,
        ).scale

    assert choose(0.01) == 0.0
    assert choose(0.05) == 1.0


def test_of_equal_scales_the_smallest_is_chosen_on_the_real_problem_a_good_one() -> None:
    flat = choose_scale(lambda s: {}, lambda w: 0.99, base_accuracy=0.5, count=300)
    assert flat.scale == 0.25

    def at(scale: float) -> dict[str, np.ndarray]:
        given_ = [Contribution(serial(i), k, v, 1.0) for i, (k, v) in enumerate(HONEST.items())]
        return candidate(START.weights, given_, Rule().scaled(scale))

    before = accuracy(START.weights)
    found = choose_scale(at, accuracy, base_accuracy=before, count=2000)
    assert found.scale > 0 and max(a for _, a in found.table) > before + found.margin


def test_the_gate_lets_pass_what_is_not_worse_by_more_than_the_margin() -> None:
    gate = evaluation_gate(lambda w: float(w["a"]), count=1000)

    def weighs(value: float) -> dict[str, np.ndarray]:
        return {"a": np.array(value)}

    assert gate(weighs(0.9), weighs(0.895)).adopt
    result = gate(weighs(0.9), weighs(0.88))
    assert not result.adopt and result.to_dict()["candidate"] == 0.88
    with pytest.raises(VectorError):
        gate(weighs(0.9), weighs(float("nan")))

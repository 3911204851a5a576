"""The moving average of weights: warm-up, types, counters."""

from __future__ import annotations

import numpy as np
import pytest

from common.averaging import decay_at, moving_average
from common.errors import ConfigError, ModelError
from common.model import ModelSpec, Weights, build, get_weights, set_weights


def test_the_decay_warms_up_and_then_is_what_was_asked() -> None:
    assert [decay_at(0.9, t) for t in range(3)] == [0.1, 2 / 11, 0.25]
    assert decay_at(0.9, 80) == 0.9 == decay_at(0.9, 1000)
    assert decay_at(0.9, 79) == 80 / 89 < 0.9
    assert decay_at(0.05, 0) == 0.05 and decay_at(0.0, 5) == 0.0
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="decay"):
            decay_at(bad, 0)
    with pytest.raises(ConfigError, match="-1"):
        decay_at(0.9, -1)


def test_the_average_over_rounds_is_the_weighted_sum_by_hand() -> None:
    rng = np.random.default_rng(0)
    rounds = [{"w": rng.normal(size=(3, 2)).astype(np.float32)} for _ in range(40)]
    average: Weights = rounds[0]
    weights = np.array([1.0])
    for t, latest in enumerate(rounds[1:]):
        average = moving_average(average, latest, decay=0.5, averaged=t)
        d = min(0.5, (1 + t) / (10 + t))
        weights = np.append(weights * d, 1 - d)
    expected = sum(w * r["w"].astype(np.float64) for w, r in zip(weights, rounds, strict=True))
    assert weights.sum() == pytest.approx(1.0)
    assert average["w"].dtype == np.float32
    np.testing.assert_allclose(average["w"], expected, rtol=1e-6, atol=1e-6)


def test_averaging_takes_the_noise_out_of_steps_that_go_nowhere() -> None:
    rng = np.random.default_rng(1)
    average: Weights = {"w": np.zeros(1000, np.float32)}
    for t in range(200):
        latest = {"w": rng.normal(size=1000).astype(np.float32)}
        average = moving_average(average, latest, decay=0.9, averaged=t)
    # Of independent terms: variance (1 − d) / (1 + d).
    assert average["w"].std() == pytest.approx((0.1 / 1.9) ** 0.5, rel=0.1)


def test_counters_are_the_latest_and_the_result_fits_the_model_and_shares_no_memory() -> None:
    spec = ModelSpec(model="resnet9", width=0.0625)
    old, new = (get_weights(build(spec, seed=s)) for s in (0, 1))
    counters = [name for name in new if name.endswith("num_batches_tracked")]
    assert len(counters) == 8
    for name in counters:
        new[name] = np.array(17, dtype=np.int64)
    copies = [{k: v.copy() for k, v in w.items()} for w in (old, new)]
    average = moving_average(old, new, decay=0.9, averaged=3)
    set_weights(build(spec), average)
    for name, values in average.items():
        assert values.dtype == new[name].dtype and values.shape == new[name].shape
        assert not np.shares_memory(values, new[name])
        assert not np.shares_memory(values, old[name])
        if name in counters:
            assert values == 17
    for weights, copy in zip((old, new), copies, strict=True):
        assert all(np.array_equal(weights[k], copy[k]) for k in copy)


def test_weights_that_do_not_fit_each_other_or_are_not_finite_are_refused() -> None:
    good: Weights = {"a": np.zeros(2, np.float32)}
    nan: Weights = {"a": np.array([0, np.nan], np.float32)}
    for average, latest in ((good, {**good, "b": good["a"]}), (nan, good), (good, nan),
                            ({"a": np.zeros(3, np.float32)}, good)):  # fmt: skip
        with pytest.raises(ModelError):
            moving_average(average, latest, decay=0.9, averaged=0)

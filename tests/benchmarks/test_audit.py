"""The audit's statistics promise no more than they hold, and a tiny run writes what it should."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binom, norm
from typer.testing import CliRunner

import common.training as training
from benchmarks.audit.__main__ import RESULTS, cli
from benchmarks.audit.cells import FIELDS
from benchmarks.audit.membership import Shadows, likelihood_ratio_scores, loss_scores, measure
from benchmarks.audit.one_run import gradients, striped
from benchmarks.audit.statistics import (
    Floats,
    Outcomes,
    advantage_limit,
    audit,
    delta_of_mu,
    dp_bound,
    epsilon_of_mu,
    gdp_bound,
    interval,
    largest_tpr,
    one_run_bound,
    one_run_p_value,
    upper_limit,
)
from benchmarks.audit.trainers import REAL, Trainer, _planted
from common.datasets import make_synthetic
from common.files import read_json
from common.model import ModelSpec, build, get_weights
from common.privacy.accounting import Event, epsilon_of
from common.training import PrivateStep, TrainSettings

ERROR = 0.05
epsilons = st.floats(0.0, 6.0)
deltas = st.sampled_from([0.0, 1e-6, 1e-3, 0.1])


def chance_of_claiming_too_much(
    bound: list[list[float]], truth: float, miss: float, alarm: float
) -> float:
    """Exact, over all numbers of misses and alarms among n runs of a kind."""
    n = len(bound) - 1
    p = np.outer(binom.pmf(np.arange(n + 1), n, miss), binom.pmf(np.arange(n + 1), n, alarm))
    return float(p[np.array(bound) > truth + 1e-9].sum())


def table(n: int, delta: float | None) -> list[list[float]]:
    """Bounds for every number of misses and alarms; ``delta`` None: on μ."""
    outcomes = [[Outcomes(n, m, n, a) for a in range(n + 1)] for m in range(n + 1)]
    if delta is None:
        return [[gdp_bound(o, 1 - ERROR) for o in row] for row in outcomes]
    return [[dp_bound(o, delta, 1 - ERROR) for o in row] for row in outcomes]


TABLES = {delta: table(40, delta) for delta in (0.0, 1e-3, 0.1, None)}


@given(st.integers(1, 200), st.floats(0.0, 1.0), st.sampled_from([0.3, 0.05, 0.01]))
def test_the_upper_limit_is_below_the_rate_no_oftener_than_it_says(
    n: int, rate: float, error: float
) -> None:
    k = np.arange(n + 1)
    below = upper_limit(k, n, error) < rate - 1e-12
    rate = max(rate, 1e-12)  # SciPy fails for rates about the smallest float
    assert binom.pmf(k, n, rate)[below].sum() <= error + 1e-9


@given(st.integers(1, 300), st.data())
def test_the_interval_holds_the_estimate(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    low, high = interval(k, n, 0.95)
    assert 0.0 <= low <= k / n <= high <= 1.0
    assert (low == 0.0) == (k == 0) and (high == 1.0) == (k == n)


@given(epsilons, st.sampled_from([0.0, 1e-3, 0.1]))
def test_the_bound_for_any_mechanism_holds_for_the_worst_there_is(
    epsilon: float, delta: float
) -> None:
    # Randomised response that tells all with probability δ: on the edge of (ε, δ)-DP.
    wrong = (1 - delta) / (1 + math.exp(epsilon))
    assert chance_of_claiming_too_much(TABLES[delta], epsilon, wrong, wrong) <= ERROR


@given(st.floats(0.0, 5.0), st.floats(-3.0, 6.0))
def test_the_gaussian_bound_holds_for_the_gaussian_mechanism(mu: float, threshold: float) -> None:
    miss, alarm = float(norm.cdf(threshold - mu)), float(norm.sf(threshold))
    assert chance_of_claiming_too_much(TABLES[None], mu, miss, alarm) <= ERROR


@given(st.floats(0.05, 5.0), st.sampled_from([1e-3, 0.1]), st.floats(-3.0, 6.0))
def test_the_bound_for_any_mechanism_holds_for_the_gaussian_mechanism(
    mu: float, delta: float, threshold: float
) -> None:
    miss, alarm = float(norm.cdf(threshold - mu)), float(norm.sf(threshold))
    truth = epsilon_of_mu(mu, delta)
    assert chance_of_claiming_too_much(TABLES[delta], truth, miss, alarm) <= ERROR


def test_a_threshold_chosen_on_half_of_the_runs_keeps_the_promise() -> None:
    rng, mu, delta = np.random.default_rng(0), 1.5, 1e-5
    truth, audits = epsilon_of_mu(mu, delta), 300
    found = [
        audit(rng.normal(0, 1, 1000), rng.normal(mu, 1, 1000), delta=delta, confidence=0.95)
        for _ in range(audits)
    ]
    allowed = binom.isf(1e-6, audits, ERROR)
    assert sum(one.epsilon > truth for one in found) <= allowed
    assert sum(one.mu > mu for one in found) <= allowed
    assert np.median([one.mu for one in found]) > 0.8 * mu  # and it is no empty promise
    assert np.median([one.epsilon for one in found]) > 0.25 * truth


def test_scores_without_the_canary_and_with_it_that_never_overlap() -> None:
    found = audit(np.zeros(200), np.ones(200), delta=1e-5, confidence=0.95)
    limit = 1 - 0.025 ** (1 / 100)
    assert found.epsilon == pytest.approx(math.log((1 - limit - 1e-5) / limit))
    assert found.mu == pytest.approx(2 * norm.isf(limit))
    reverse = audit(np.ones(200), np.zeros(200), delta=1e-5, confidence=0.95)
    assert reverse.mu == 0.0


@given(st.floats(0.1, 4.0), st.sampled_from([1e-7, 1e-5, 1e-3]))
def test_mu_and_epsilon_are_each_others_inverse(mu: float, delta: float) -> None:
    epsilon = epsilon_of_mu(mu, delta)
    if epsilon > 0:
        assert delta_of_mu(mu, epsilon) == pytest.approx(delta, rel=1e-5)
    assert epsilon_of_mu(mu + 0.1, delta) >= epsilon


@pytest.mark.parametrize(("sigma", "steps"), [(2.0, 1), (1.0, 1), (3.0, 9)])
def test_mu_as_an_epsilon_agrees_with_both_accountants(sigma: float, steps: int) -> None:
    found = epsilon_of([Event(sigma, 1.0, steps)], 1e-5)
    ours = epsilon_of_mu(math.sqrt(steps) / sigma, 1e-5)
    assert ours == pytest.approx(found.pld, rel=0.01)
    assert ours == pytest.approx(found.prv, rel=0.01)


# --- one run ----------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(1, 40), st.data())
def test_the_p_value_is_the_theorems(guesses: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, guesses))
    epsilon, delta = data.draw(epsilons), data.draw(deltas)
    canaries = 3 * guesses
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    w = binom.pmf(np.arange(guesses + 1), guesses, right)
    tail = w[correct:].sum()
    alpha = max(2 / i * w[max(0, correct - i) : correct].sum() for i in range(1, canaries + 1))
    expected = min(1.0, tail + alpha * canaries * delta)
    assert one_run_p_value(canaries, guesses, correct, epsilon, delta) == pytest.approx(expected)


@settings(deadline=None)
@given(st.integers(1, 400), epsilons)
def test_one_run_holds_for_randomised_response(guesses: int, epsilon: float) -> None:
    v = np.arange(guesses + 1)
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    # The bound grows with v: the first v whose bound is too high tells all.
    low, high = 0, guesses + 1
    while low < high:
        middle = (low + high) // 2
        bound = one_run_bound(guesses, guesses, middle, delta=0.0, confidence=1 - ERROR)
        low, high = (low, middle) if bound > epsilon + 1e-6 else (middle + 1, high)
    assert binom.pmf(v[low:], guesses, right).sum() <= ERROR + 1e-9


def randomised_response(
    epsilon: float, delta: float, m: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """(coins, scores): each coin told rightly at the edge of (ε, δ)-DP, some beyond doubt."""
    coins = rng.integers(0, 2, m) * 2.0 - 1.0
    told = rng.random(m) < delta
    right = rng.random(m) < math.exp(epsilon) / (1 + math.exp(epsilon))
    return coins, coins * np.where(told, 2.0, np.where(right, 1.0, -1.0))


def gaussian(
    epsilon: float, delta: float, m: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """(coins, scores): each coin's canary moves a coordinate of its own by one sensitivity."""
    coins = rng.integers(0, 2, m) * 2.0 - 1.0
    return coins, 0.5 * coins + rng.normal(0, 1 / mu_of(epsilon, delta), m)


@lru_cache
def mu_of(epsilon: float, delta: float) -> float:
    return float(brentq(lambda mu: epsilon_of_mu(mu, delta) - epsilon, 1e-3, 20.0))


@pytest.mark.parametrize(
    ("mechanism", "epsilon", "delta", "guesses", "reached"),
    [(randomised_response, 1.0, 0.0, 1000, 0.8), (randomised_response, 3.0, 0.0, 1000, 0.8),
     (randomised_response, 2.0, 1e-3, 200, 0.45), (gaussian, 2.0, 1e-5, 100, 0.2),
     (gaussian, 4.0, 1e-5, 100, 0.35), (gaussian, 8.0, 1e-5, 100, 0.3)],
)  # fmt: skip
def test_one_run_bounds_what_is_simulated_and_is_not_empty(
    mechanism: object, epsilon: float, delta: float, guesses: int, reached: float
) -> None:
    assert callable(mechanism)
    rng, m, audits = np.random.default_rng(7), 1000, 300
    bounds = []
    for _ in range(audits):
        coins, scores = mechanism(epsilon, delta, m, rng)
        # Ties are broken at random: the scores of randomised response are all alike.
        order = np.lexsort((rng.random(m), scores))
        half = guesses // 2
        correct = int((coins[order[:half]] < 0).sum() + (coins[order[-half:]] > 0).sum())
        bounds.append(one_run_bound(m, guesses, correct, delta=delta, confidence=1 - ERROR))
    assert sum(b > epsilon for b in bounds) <= binom.isf(1e-6, audits, ERROR)
    assert np.median(bounds) > reached * epsilon


def test_one_run_scores_are_the_gradients_of_the_real_network() -> None:
    canaries = striped(3, np.random.default_rng(0))
    model = build(ModelSpec(width=0.0625), seed=0)
    found = gradients(model, get_weights(model), canaries)
    assert found.shape == (3, sum(p.numel() for p in model.parameters()))
    assert sorted(canaries.labels[:8].tolist()) == list(range(8))
    assert canaries.units.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    unit = found / np.linalg.norm(found, axis=1, keepdims=True)
    off = (unit @ unit.T)[~np.eye(3, dtype=bool)]
    assert np.abs(off).max() < 0.9


# --- membership -------------------------------------------------------------------------------


def test_attacks_are_measured_as_what_they_are() -> None:
    rng, gap = np.random.default_rng(0), 1.0
    members = rng.random((20, 400)) < 0.5
    found = measure(rng.normal(gap * members, 1.0), members, seed=0, resamples=50)
    assert found.auc == pytest.approx(norm.cdf(gap / math.sqrt(2)), abs=0.02)
    assert found.advantage == pytest.approx(2 * norm.cdf(gap / 2) - 1, abs=0.04)
    assert found.tpr_at_1_fpr == pytest.approx(norm.sf(norm.isf(0.01) - gap), abs=0.02)
    for value, (low, high) in (
        (found.auc, found.auc_interval), (found.advantage, found.advantage_interval),
        (found.tpr_at_1_fpr, found.tpr_interval),
    ):  # fmt: skip
        assert low <= value <= high
    nothing = measure(rng.normal(size=members.shape), members, seed=0, resamples=50)
    assert abs(nothing.advantage) < 0.05 and abs(nothing.auc - 0.5) < 0.03


def test_the_likelihood_ratio_sees_members_that_the_loss_hides() -> None:
    # Hard and easy images: their losses differ more than being a member changes them.
    rng = np.random.default_rng(0)
    members = np.argsort(rng.random((24, 200)), axis=0) < 12
    confidence = 5.0 * rng.normal(size=200) + members + 0.5 * rng.normal(size=members.shape)
    shadows = Shadows(members, np.logaddexp(0.0, -confidence), confidence, 1.0)
    by_loss = measure(loss_scores(shadows), members, seed=0, resamples=20)
    by_ratio = measure(likelihood_ratio_scores(shadows), members, seed=0, resamples=20)
    assert by_loss.advantage < 0.2 < 0.5 < by_ratio.advantage


@given(epsilons, deltas)
def test_no_attack_on_a_private_model_has_a_larger_advantage(epsilon: float, delta: float) -> None:
    fpr = np.linspace(0.0, 1.0, 2001)
    gain = largest_tpr(epsilon, delta, fpr) - fpr
    limit = advantage_limit(epsilon, delta)
    assert gain.max() <= limit + 1e-9
    assert gain.max() >= limit - 0.05  # the limit is reached between two of the rates
    assert advantage_limit(1e6, delta) == 1.0


# --- planting and running ---------------------------------------------------------------------


def test_a_bug_is_planted_for_the_time_of_a_call_and_only_in_a_part_that_exists() -> None:
    before = training.check_images
    with _planted(((training, "check_images", print),)):
        assert training.check_images is print
    assert training.check_images is before
    with pytest.raises(AttributeError), _planted(((training, "no_such_part", print),)):
        pass


def test_the_real_trainer_is_train_itself() -> None:
    assert Trainer(name="real", differs="nothing") == REAL
    model = build(ModelSpec(width=0.03125), seed=0)
    start, images = get_weights(model), torch.zeros(4, 3, 8, 8)
    step = PrivateStep(
        noise_multiplier=1e-6, clipping_norm=1.0, sampling_rate=1.0, steps=1,
        expected_batch_size=4.0,
    )  # fmt: skip
    plan = TrainSettings(
        epochs=1, batch_size=1, learning_rate=0.1, optimizer="sgd", privacy=step
    )  # fmt: skip
    labels = torch.arange(4)
    ours = REAL.update(model, start, images, labels, plan)
    theirs = training.train(model, start, images, labels, plan, seed=0).update
    assert all(np.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)
    assert max(float(np.abs(u).max()) for u in ours.values()) > 1e-3


TINY = [
    "--runs", "20", "--bug-runs", "20", "--canaries", "12", "--guesses", "4", "--models", "8",
    "--pool", "40", "--epochs", "8",
]  # fmt: skip


@pytest.fixture
def few_images(tmp_path: Path) -> str:
    data = make_synthetic(96, seed=0)
    arrays = {}
    for name in ("train", "val", "test"):
        arrays[f"{name}_images"] = data.split(name).images
        arrays[f"{name}_labels"] = data.split(name).labels[:, None].astype(np.uint8)
    np.savez(tmp_path / "few.npz", **arrays)
    return str(tmp_path / "few.npz")


@pytest.mark.slow  # hundreds of trainings
def test_a_tiny_run_writes_every_field_and_is_resumed(tmp_path: Path, few_images: str) -> None:
    out = tmp_path / "audit.json"

    def command(*options: str) -> str:
        arguments = [*TINY, "--data", few_images, "--out", str(out), *options]
        result = CliRunner().invoke(cli, arguments)
        if result.exception is not None:
            raise result.exception
        return result.output

    command("--only", "half the noise")
    first = read_json(out)
    assert {row["method"] for row in first} == {
        "many runs, any mechanism", "many runs, Gaussian mechanism", "one run, many canaries",
    }  # fmt: skip
    command("--only", "membership: no privacy")
    command("--only", "membership: next")
    rows = read_json(out)
    assert rows[: len(first)] == first  # not run again
    assert out.with_suffix(".png").stat().st_size > 10_000
    for row in rows:
        assert set(row) == set(FIELDS)
        assert (
            row["source"] == "npz file few.npz" and row["seed"] == 0 and row["confidence"] == 0.95
        )
        assert row["repetitions"] >= 1 and row["n"] > 0
        if row["part"] == "membership":
            low, high = row["mia_advantage_interval"]
            assert -1 <= low <= high <= 1 and row["audited_lower_bound"] is None
            assert (row["claimed_epsilon"] is None) == (row["trainer"] == "real, no privacy")
        else:
            assert row["claimed_epsilon"] > 0 and row["audited_lower_bound"] >= 0
            assert row["mia_advantage"] is None and row["delta"] == 1e-5
            assert row["refuted"] == (row["audited_lower_bound"] > row["claimed_epsilon"])
            assert row["noise_multiplier"] > 0 and row["steps"] >= 1
    private = [row for row in rows if row["cell"] == "membership: next to no noise"]
    assert all(row["claimed_epsilon"] > 100 and row["delta"] == 1.9e-4 for row in private)
    assert all(row["mia_advantage_limit"] == 1.0 for row in private)
    assert command("--only", "half the noise").count(" s\n") == 0
    assert read_json(out) == rows


def test_rows_of_another_seed_are_not_mixed_in(tmp_path: Path, few_images: str) -> None:
    out, runner = tmp_path / "audit.json", CliRunner()
    arguments = [*TINY, "--data", few_images, "--out", str(out), "--only", "canary: reused key"]
    runner.invoke(cli, arguments)
    kept = read_json(out)
    result = runner.invoke(cli, [*arguments, "--seed", "1"])
    assert "other images or another seed" in str(result.exception)
    assert read_json(out) == kept
    assert runner.invoke(cli, [*arguments, "--seed", "1", "--fresh"]).exception is None
    assert {row["seed"] for row in read_json(out)} == {1}


def test_too_few_images_are_refused_before_anything_runs(tmp_path: Path, few_images: str) -> None:
    arguments = ["--data", few_images, "--out", str(tmp_path / "audit.json"), "--pool", "400"]
    result = CliRunner().invoke(cli, arguments)
    assert "--pool" in str(result.exception)
    assert not (tmp_path / "audit.json").exists()


def test_results_are_beside_the_other_benchmarks() -> None:
    import benchmarks

    assert Path(benchmarks.__path__[0]).resolve() / "results" / "audit.json" == RESULTS

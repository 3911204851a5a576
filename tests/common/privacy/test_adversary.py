"""Whatever weights a server sends: one unit moves a sum by C, and figures by their sensitivity."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.audit.search import NETWORKS, SLACK, search
from common.config import RunConfig
from common.errors import ConfigError
from common.evaluation import evaluate
from common.fixed_shape import in_fixed_shape, invariant_rows
from common.model import ModelSpec, build, get_weights
from common.prior.model import Head
from common.privacy.clipped_sum import clipped_sum
from common.privacy.clipping import AUTOMATIC, FLAT, add_clipped
from common.privacy.figures import NORM, exact_sums
from common.privacy.gaussian import GaussianSum
from common.privacy.limits import NotAllowed, PrivacyLimits
from common.privacy.plan import Promise
from common.privacy.randomness import SecureRandom
from common.training import PrivateStep, TrainSettings, train

TRIALS = {"linear head": 6, "hidden layer": 3, "Opacus' hooks": 2}
"""Of each case here; ``make audit`` takes minutes. Networks take one."""


@pytest.mark.parametrize("network", NETWORKS)
def test_no_weights_are_found_at_which_a_unit_counts_for_more_than_is_promised(
    network: str,
) -> None:
    found = search(trials=TRIALS.get(network, 1), seed=len(network), only=(network,))
    assert sum(one.tried for one in found) > len(found) / 2
    for one in found:
        assert one.worst <= 1 + SLACK, one


@pytest.mark.parametrize("rule", [FLAT, AUTOMATIC])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e-44, 2e-23, 1e-22, 1.0, 1e19, 3e38])
def test_a_units_part_is_within_the_norm_for_every_number_that_a_gradient_can_hold(
    value: float, dtype: torch.dtype, rule: str
) -> None:
    """In float32 the norm of 2,408 entries of 2e-23 is 0, and the factor was 1."""
    for d in (1, 2408, 100_000):
        gradient = torch.full((3, d), value, dtype=dtype)
        for clip in (1e6, 1.0, 1e-6, 1e-20, 1e-24, 1e-30):
            sums = [torch.zeros(d, dtype=torch.float64)]
            add_clipped(sums, [gradient[:1]], clip, rule)
            added = float(sums[0].norm())
            assert added <= clip
            true = float(gradient[0].double().norm())
            if rule == FLAT:
                assert added == pytest.approx(min(true, clip), rel=1e-4)


def unit_rows(count: int, d: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def head(d: int) -> Head:
    return Head(None, nn.Linear(d, 8, bias=False))


def orthogonal_to(x: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Weights of which every logit of ``x`` is rounding alone, times 1e10."""
    w = np.random.default_rng(seed).standard_normal((rows, x.shape[1]))
    q, _ = np.linalg.qr(x.astype(np.float64).T)
    return ((w - (w @ q) @ q.T) * 1e10).astype(np.float32)


@pytest.mark.parametrize("count", [6, 12, 13, 14, 16, 40])
def test_rounding_that_a_crafted_head_amplifies_moves_no_other_picture_s_part(count: int) -> None:
    for seed in range(6):
        x, y = unit_rows(count, 301, seed), torch.zeros(count, dtype=torch.int64)
        w = {"head.weight": orthogonal_to(x, 8, seed)}

        def summed(rows: slice, x: np.ndarray = x, w: dict = w, y: Tensor = y) -> Tensor:  # type: ignore[type-arg]
            return clipped_sum(
                head(301), w, torch.from_numpy(x[rows]), y[rows], sampling_rate=1.0,
                clipping_norm=0.25, random=SecureRandom(), expected_batch_size=float(count),
            )  # fmt: skip

        everyone = summed(slice(None))
        for rows in (slice(1, None), slice(None, -1)):
            assert float((everyone - summed(rows)).norm()) <= 0.25 * (1 + SLACK)


@pytest.mark.parametrize("count", [13, 33, 269])
def test_a_picture_less_moves_validation_figures_by_their_sensitivity_at_most(count: int) -> None:
    for seed in range(10 if count < 100 else 3):
        x = unit_rows(count, 301, seed)
        w = np.zeros((8, 301), np.float32)
        w[:2] = orthogonal_to(x[-(count % 256) :], 2, seed)
        weights, images = {"head.weight": w}, torch.from_numpy(x)

        def probabilities(rows: slice, w: dict = weights, x: Tensor = images) -> np.ndarray:  # type: ignore[type-arg]
            any_label = torch.zeros(len(x[rows]), dtype=torch.int64)
            alone = x[rows].clone()  # as a hospital without the others holds them
            return evaluate(head(301), w, alone, any_label).probabilities

        everyone = probabilities(slice(None))
        labels = everyone.argmax(1)
        whole = exact_sums(everyone, labels, np.arange(count))
        for rows in (slice(0, count - 1), slice(1, count)):
            fewer = probabilities(rows)
            assert np.array_equal(fewer, everyone[rows])
            moved = whole - exact_sums(fewer, labels[rows], np.arange(count - 1))
            assert np.linalg.norm(moved) <= NORM


def test_a_network_s_predictions_are_the_same_to_the_bit_in_any_company_and_place() -> None:
    for spec in (ModelSpec(width=0.03125), ModelSpec(model="resnet18", width=0.03125)):
        weights = get_weights(build(spec, seed=0))
        x = torch.randn(37, 3, 20, 20, generator=torch.Generator().manual_seed(0))
        y = torch.arange(37) % 8
        everyone = evaluate(build(spec), weights, x, y).probabilities
        for rows in (torch.tensor([5]), torch.arange(1, 37), torch.arange(36, -1, -1)):
            found = evaluate(build(spec), weights, x[rows], y[rows]).probabilities
            assert np.array_equal(found, everyone[rows.numpy()])


def test_units_of_one_picture_add_the_same_whether_or_not_others_have_several() -> None:
    """Sums over a unit's pictures are made in another way than a single picture's gradient."""
    x = torch.from_numpy(unit_rows(30, 301, 0))
    y = torch.arange(30) % 8
    weights = {"head.weight": orthogonal_to(x.numpy(), 8, 1)}
    units = torch.cat([torch.tensor([0, 0]), torch.arange(1, 29)])

    def summed(rows: Tensor, of: Tensor | None) -> Tensor:
        return clipped_sum(
            head(301), weights, x[rows], y[rows], sampling_rate=1.0, clipping_norm=0.25,
            random=SecureRandom(), units=of, expected_batch_size=30.0,
        )  # fmt: skip

    both = summed(torch.arange(30), units)
    without = summed(torch.arange(2, 30), None)  # as a hospital does whose units have one each
    assert float((both - without).norm()) <= 0.25 * (1 + SLACK)


def test_a_private_training_moves_with_a_picture_by_the_clipping_norm_at_most() -> None:
    d, count, clip = 301, 40, 1e-29
    x = torch.from_numpy(np.hstack([unit_rows(count, d - 1, 1), np.ones((count, 1), np.float32)]))
    y = torch.zeros(count, dtype=torch.int64)
    w = np.zeros((8, d), np.float32)
    w[1:, -1] = -53.5  # what is wrong with each picture's prediction: 6e-24
    step = PrivateStep(
        noise_multiplier=1e-6, clipping_norm=clip, sampling_rate=1.0, steps=1,
        expected_batch_size=float(count),
    )  # fmt: skip
    how = TrainSettings(
        epochs=1, batch_size=count, learning_rate=1000.0, optimizer="sgd", privacy=step
    )

    def summed(rows: slice) -> np.ndarray:
        update = train(head(d), {"head.weight": w}, x[rows], y[rows], how, seed=0).update
        return update["head.weight"][:, :-1].astype(np.float64) * count / 1000

    assert np.linalg.norm(summed(slice(None)) - summed(slice(1, None))) <= clip * 1.001


def test_a_tiny_clipping_norm_is_refused_by_the_config_and_by_the_hospital() -> None:
    tiny = {"privacy": "local", "server-step": True, "sampling-rate": 1.0, "clipping-norm": 1e-30}
    for low in (1e-30, 1e-27, 9e-7):
        with pytest.raises(ConfigError, match="clipping-norm"):
            RunConfig.parse(tiny | {"clipping-norm": low})
    asked = Promise.of(RunConfig.parse(tiny | {"clipping-norm": 1e-6}))
    asked.check(PrivacyLimits())
    with pytest.raises(NotAllowed, match=r"no less than 0\.5"):
        asked.check(PrivacyLimits(min_clipping_norm=0.5))
    with pytest.raises(NotAllowed, match="clips to a norm of 1e-30"):
        Promise(
            epsilon=1.0, delta=1e-4, clipping_norm=1e-30, unit="image", rounds=2, local_epochs=1,
            batch_size=32,
        ).check(PrivacyLimits())  # fmt: skip


@pytest.mark.parametrize("sigma", [0.4, 7.5, 1e3])
def test_noise_and_grid_are_the_same_in_clipping_norms_for_all_of_them(sigma: float) -> None:
    d, key = 5000, bytes(range(32))
    values = torch.randn(d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = GaussianSum(sigma, 1.0, d).release_integers(values, SecureRandom(key_for_tests=key))
    for power in range(-20, 21, 4):  # 1e-6 to 1e6
        clip = math.ldexp(1.0, power)
        mechanism = GaussianSum(sigma, clip, d)
        assert mechanism.step == clip * GaussianSum(sigma, 1.0, d).step
        assert mechanism.step * math.sqrt(d) <= clip * 2.0**-10
        found = mechanism.release_integers(values * clip, SecureRandom(key_for_tests=key))
        assert np.array_equal(found, expected)
        noised = mechanism.release(values * clip, SecureRandom(key_for_tests=key))
        assert torch.equal(noised, torch.from_numpy(expected * mechanism.step).float())


def test_where_a_row_s_result_hangs_on_its_place_rows_go_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def biased(rows: Tensor) -> Tensor:
        return rows + torch.arange(len(rows)).view(-1, 1) * 1e-7

    sizes = invariant_rows("a test", [32, 8], lambda n, seed: [biased(torch.ones(n, 5))])
    assert sizes == 1
    assert "place among 32 others" in caplog.text
    found = in_fixed_shape(biased, torch.ones(4, 5), 1)
    assert torch.equal(found, torch.ones(4, 5))
    caplog.set_level(logging.WARNING)
    assert invariant_rows("another", [32, 8], lambda n, seed: [torch.ones(n, 5)]) == 32


def test_a_pass_has_one_number_of_rows_however_many_pictures_there_are() -> None:
    seen: list[int] = []

    class Watched(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(len(input))
            return super().forward(input)

    weights = get_weights(nn.Sequential(nn.Linear(16, 3)))
    shapes = []
    for count in (0, 1, 31, 32, 33):
        seen.clear()
        x, y = torch.rand(count, 16), torch.zeros(count, dtype=torch.int64)
        evaluate(nn.Sequential(Watched(16, 3)), weights, x, y)
        shapes.append(set(seen))
    assert shapes[1:] == [{32}] * 4

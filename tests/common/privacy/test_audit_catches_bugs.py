"""The private trainer's ε, attacked: the real trainer keeps it, a broken one is found out.

Each audit runs a trainer hundreds of times with and without one canary, on a tiny network, and
gives lower bounds on ε (benchmarks/audit). Its noise comes from fixed keys, so the outcome does
not depend on luck. Were the noise drawn afresh, each bound would be above the real trainer's ε
with a probability of at most 5 % (less where the attack is not the best possible), and below a
planted bug's claim with less than one in a thousand: the bounds are four and more of their own
standard deviations above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from torch import Tensor
from torch.nn import functional as F

from benchmarks.audit.attack import Case, patient, run, scores, strongest, tiny_case, tiny_network
from benchmarks.audit.statistics import Audit, Floats, audit, epsilon_of_mu
from benchmarks.audit.trainers import (
    BUGS,
    CHANNELS_LAST,
    REAL,
    TWO_PASSES,
    Trainer,
    batch_innermost,
    centred_by_the_batch,
    channels_last,
    weighted_by_class,
)
from common.datasets import make_synthetic
from common.errors import PrivacyError
from common.privacy.accounting import Event, epsilon_of
from common.training import to_tensor, train

DELTA = 1e-5
HALF = "half the noise"
GROSS = [name for name in BUGS if name != HALF]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache
def case_of(sigma: float, steps: int = 1) -> Case:
    pictures = to_tensor(make_synthetic(96, seed=0).train.images[:17])
    return tiny_case(pictures, sigma=sigma, steps=steps)


def claimed(case: Case) -> tuple[float, float]:
    """(ε at DELTA, μ) of what the settings promise."""
    step = case.settings.privacy
    assert step is not None
    event = Event(step.noise_multiplier, step.sampling_rate, step.steps)
    return epsilon_of([event], DELTA).value, step.steps**0.5 / step.noise_multiplier


def scored(
    trainer: Trainer, case: Case, runs: int, *, patients: bool = False
) -> tuple[Floats, Floats]:
    """The strongest canary's scores, without and with it."""
    canaries = map(patient, case.canaries) if patients else case.canaries
    return scores(trainer, case, strongest(trainer, case, canaries), runs, seed=1)


def judged(scores: tuple[Floats, Floats]) -> Audit:
    return audit(*scores, delta=DELTA, confidence=0.95)


@pytest.mark.parametrize(
    ("trainer", "steps", "patients"),
    [
        pytest.param(REAL, 1, False, id="real"),
        pytest.param(REAL, 3, False, id="real, three steps", marks=pytest.mark.slow),
        pytest.param(REAL, 1, True, id="real, patients"),
        pytest.param(TWO_PASSES, 1, False, id="two passes", marks=pytest.mark.slow),
        pytest.param(CHANNELS_LAST, 1, False, id="channels_last", marks=pytest.mark.slow),
    ],
)
def test_what_is_private_stays_below_its_claim(
    trainer: Trainer, steps: int, patients: bool
) -> None:
    case = case_of(steps**0.5, steps)
    epsilon, mu = claimed(case)
    assert mu == pytest.approx(1.0)
    without, with_canary = scored(trainer, case, 300, patients=patients)
    found = judged((without, with_canary))
    assert found.epsilon < epsilon
    assert found.mu < mu
    assert found.epsilon_gdp < epsilon
    # And the attack sees the canary: a blind one would find every trainer private.
    assert 0.6 * mu < (with_canary.mean() - without.mean()) / without.std() < 1.3 * mu


def test_half_the_noise_is_found_out() -> None:
    case = case_of(1.0)
    epsilon, mu = claimed(case)
    found = judged(scored(BUGS[HALF], case, 800))
    assert found.mu > 1.4 * mu
    assert found.epsilon_gdp > 1.5 * epsilon


@pytest.mark.parametrize("name", GROSS)
def test_a_planted_bug_is_found_out(name: str) -> None:
    case = case_of(2.0)
    epsilon, mu = claimed(case)
    assert epsilon == pytest.approx(2.0, abs=0.01)
    bug = BUGS[name]
    found = judged(scored(bug, case, 250, patients=not bug.knows_units))
    assert found.mu > 3 * mu
    assert found.epsilon_gdp > 3 * epsilon
    assert found.epsilon > epsilon  # whatever the mechanism


def test_a_canary_moves_the_real_sum_by_the_clipping_norm_and_no_more() -> None:
    case = case_of(1.0)
    for trainer in (REAL, TWO_PASSES, CHANNELS_LAST):
        assert strongest(trainer, case, case.canaries).shift == pytest.approx(1.0, rel=1e-3)
    patients = [patient(canary) for canary in case.canaries]
    assert strongest(REAL, case, patients).shift == pytest.approx(1.0, rel=1e-3)


def test_the_bound_in_words_of_mu_is_the_accountants() -> None:
    for case in (case_of(1.0), case_of(2.0), case_of(2.0, 4)):
        epsilon, mu = claimed(case)
        assert epsilon_of_mu(mu, DELTA) == pytest.approx(epsilon, rel=0.01)


def test_two_passes_are_the_real_trainer_while_gradients_are_right() -> None:
    case = case_of(1.0).with_step(noise_multiplier=1e-6)
    real = run(REAL, case, case.canaries[5])
    difference = run(TWO_PASSES, case, case.canaries[5]) - real
    assert np.linalg.norm(difference) < 1e-4 * np.linalg.norm(real)


def gradients_of(images: Tensor, labels: Tensor) -> Tensor:
    """(N, parameters): Opacus's per-image gradients of the tiny network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GradSampleModule(tiny_network(), loss_reduction="sum")
    F.cross_entropy(model(images), labels, reduction="sum").backward()
    found = [p.grad_sample.flatten(1) for p in model.parameters()]
    return torch.cat(found, 1).detach()


def test_channels_last_gradients_are_wrong_but_each_its_own_images() -> None:
    """Why channels_last alone breaks the learning and not ε: clipping still bounds each image.

    Opacus's unfold takes (H, W) strides for granted and so reads the wrong pixels, at offsets
    below (C − 1) + H·W ≤ C·H·W from an image's first: never another image's.
    """
    gen = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 7, 7, generator=gen), torch.arange(8) % 4
    right, wrong = gradients_of(images, labels), gradients_of(channels_last(images), labels)
    assert bool(((wrong - right).norm(dim=1) > 0.1 * right.norm(dim=1)).all())
    other = images.clone()
    other[7] = 100.0
    changed = gradients_of(channels_last(other), labels)
    torch.testing.assert_close(changed[:7], wrong[:7])
    without = gradients_of(channels_last(images[:7]), labels[:7])
    torch.testing.assert_close(without, wrong[:7])


def test_with_the_batch_innermost_images_are_in_each_others_gradients() -> None:
    gen = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 7, 7, generator=gen), torch.arange(8) % 4
    before = gradients_of(batch_innermost(images), labels)
    other = images.clone()
    other[7] = 100.0
    changed = gradients_of(batch_innermost(other), labels)
    assert bool(((changed - before)[:7].norm(dim=1) > before[:7].norm(dim=1)).all())


def test_the_guard_refuses_what_the_planted_bugs_had_to_get_past() -> None:
    case = case_of(1.0)

    def real(**changes: object) -> None:
        arguments = {"images": case.images, **changes}
        images = arguments.pop("images")
        train(case.model, case.start, images, case.labels, case.settings, seed=0, **arguments)  # type: ignore[arg-type]

    for coupled in (centred_by_the_batch, weighted_by_class):
        with pytest.raises(PrivacyError, match="couples"):
            real(criterion=coupled)
    for layout in (channels_last, batch_innermost):
        with pytest.raises(PrivacyError, match="contiguous"):
            real(images=layout(case.images))
        inside = replace(CHANNELS_LAST, parts=(), layout=layout)
        with pytest.raises(PrivacyError, match="not contiguous"):
            run(inside, case, None)

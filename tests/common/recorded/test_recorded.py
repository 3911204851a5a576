"""Recorded steps are the steps that are taken one by one.

What a CUDA graph does again is seen on a GPU only (skipped elsewhere); that it is the right thing
to record is seen anywhere, with calls in the place of replays.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import common.recorded.choose as choose
import common.recorded.plain as plain
import common.recorded.private as private
from common.errors import PrivacyError
from common.model import ModelSpec, Weights, build, freeze, get_weights
from common.optimizers import make_optimizer
from common.privacy.batches import PoissonBatches
from common.privacy.bookkeeping.module import BookKeeping
from common.privacy.engine import make_private
from common.privacy.gaussian import GaussianSum
from common.privacy.randomness import SecureRandom
from common.recorded.graph import Kept
from common.recorded.private import RecordedPrivateSteps
from common.training import PrivateStep, StepRate, TrainSettings, _descend_recorded, train

GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not GPU, reason="this machine has no GPU")
SPEC = ModelSpec(width=0.0625)
IMAGES = torch.randn(50, 3, 28, 28, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50) % 8


class Called:
    """In the place of :class:`common.recorded.graph.Recorded`, where there is no GPU."""

    def __init__(self, step: Callable[[], None]) -> None:
        for _ in range(3):
            step()
        self._step = step

    def __call__(self) -> None:
        self._step()


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(plain, "Recorded", Called)
        monkeypatch.setattr(private, "Recorded", Called)


def settings(**more: object) -> TrainSettings:
    return TrainSettings(**{  # type: ignore[arg-type]
        "epochs": 2, "batch_size": 16, "learning_rate": 0.01, "optimizer": "adam",
        "device": "cuda" if GPU else "cpu", **more,
    })  # fmt: skip


def flat(weights: Weights) -> Tensor:
    return torch.cat([torch.from_numpy(w).double().flatten() for w in weights.values()])


@on_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("views", [0, 2])
def test_a_replayed_training_is_the_same_and_the_next_one_begins_anew(
    optimizer: str, precision: str, views: int
) -> None:
    how = settings(optimizer=optimizer, precision=precision, views=views, schedule="cosine")
    for seed in (0, 1):  # the second from the recording of the first
        start = get_weights(build(SPEC, seed=seed))
        one, other = (
            train(build(SPEC), start, IMAGES, LABELS, how, seed=seed, reuse=reuse)
            for reuse in (None, ("plain", views))
        )
        gap = float((flat(one.update) - flat(other.update)).norm())
        assert gap < 2e-2 * float(flat(one.update).norm())
        assert one.loss == pytest.approx(other.loss, rel=1e-2)
    assert any(made is not None for made in choose._PLAIN._made.values())


def step_of(**more: float) -> PrivateStep:
    return PrivateStep(**{  # type: ignore[arg-type]
        "noise_multiplier": 1e-6, "clipping_norm": 0.5, "sampling_rate": 1.0, "steps": 3,
        "expected_batch_size": 50.0, **more,
    })  # fmt: skip


@on_gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_private_steps_on_a_gpu_are_replayed_and_the_same(optimizer: str, precision: str) -> None:
    for seed, steps in ((0, 3), (1, 5)):
        start = get_weights(build(SPEC, seed=seed))
        how = settings(optimizer=optimizer, precision=precision, privacy=step_of(steps=steps))
        one, other = (
            train(build(SPEC), start, IMAGES, LABELS, how, seed=0, reuse=reuse)
            for reuse in (None, "private")
        )
        gap = float((flat(one.update) - flat(other.update)).norm())
        assert gap < 2e-2 * float(flat(one.update).norm())
        assert one.loss == pytest.approx(other.loss, rel=1e-2)
    assert any(made is not None for made in choose._PRIVATE._made.values())


def recorded(how: TrainSettings, step: PrivateStep, size: int) -> RecordedPrivateSteps:
    device = torch.device(how.device)
    model = build(SPEC).to(device)
    books, optimizer, engine = make_private(
        model, make_optimizer(model, how, recorded=True), batches_of(step, how),
        noise_multiplier=step.noise_multiplier, clipping_norm=step.clipping_norm,
        precision=how.precision,
    )  # fmt: skip
    assert isinstance(books, BookKeeping)
    return RecordedPrivateSteps(
        books, optimizer, engine, IMAGES[0].to(device), size=size, half=how.half
    )


def batches_of(step: PrivateStep, how: TrainSettings) -> PoissonBatches:
    return PoissonBatches(
        IMAGES.to(how.device), LABELS.to(how.device), sampling_rate=step.sampling_rate,
        steps=step.steps, expected_batch_size=step.expected_batch_size, random=SecureRandom(),
    )  # fmt: skip


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_private_steps_are_those_of_the_optimizer_that_clips_and_adds_noise(
    optimizer: str, size: int
) -> None:
    """Whole batches in parts that are not full, with next to no noise."""
    step = step_of()
    how = settings(optimizer=optimizer, privacy=step, schedule="cosine")
    start = get_weights(build(SPEC, seed=0))
    expected = train(build(SPEC), start, IMAGES, LABELS, how, seed=0)
    steps = recorded(how, step, size)
    for _ in range(2):  # the second as if there had been no first
        batches = batches_of(step, how)
        steps.begin(start, batches, step.noise_multiplier)
        loss = _descend_recorded(steps, batches, StepRate(how, step.steps))
        moved = flat(get_weights(steps.model)) - flat(start)
        gap = float((moved - flat(expected.update)).norm() / moved.norm())
        assert gap < (1e-3 if optimizer == "sgd" else 5e-2)  # Adam makes signs of what is nothing
        assert loss == pytest.approx(expected.loss, rel=1e-3)
        assert steps._engine.accountant.history == [(1e-6, 1.0, 3)]


def test_their_noise_is_that_of_the_mechanism_and_new_in_each_step() -> None:
    step = step_of(noise_multiplier=3.0, sampling_rate=1e-9, steps=1, expected_batch_size=2.0)
    how = settings(optimizer="sgd", privacy=step, learning_rate=1.0)
    start, steps, seen = get_weights(build(SPEC, seed=0)), recorded(how, step, 16), []
    for _ in range(2):
        batches = batches_of(step, how)
        steps.begin(start, batches, 3.0)
        _descend_recorded(steps, batches, StepRate(how, 1))
        seen.append(flat(get_weights(steps.model)) - flat(start))
    std = GaussianSum(3.0, 0.5, len(seen[0])).std / 2.0
    for moved in seen:
        assert float(moved.std()) == pytest.approx(std, rel=0.05)
    both = torch.stack(seen)
    assert abs(float(torch.corrcoef(both)[0, 1])) < 0.05


def test_a_unit_in_an_empty_place_adds_nothing() -> None:
    step = step_of(steps=1)
    how = settings(optimizer="sgd", privacy=step)
    steps = recorded(how, step, 64)
    batches = batches_of(step, how)
    steps.begin(get_weights(build(SPEC, seed=0)), batches, 1e-6)
    (part,) = batches
    steps._images.normal_()  # what an earlier batch might have left
    steps(part)
    assert float(steps._kept.sum()) == 50
    with pytest.raises(PrivacyError, match="64 are recorded"):
        steps(next(iter(PoissonBatches(
            IMAGES.repeat(2, 1, 1, 1), LABELS.repeat(2), sampling_rate=1.0, steps=1,
            expected_batch_size=100.0, random=SecureRandom(),
        ))))  # fmt: skip


def test_nothing_of_a_training_stays_when_it_is_wiped() -> None:
    step = step_of(steps=1)
    how = settings(optimizer="sgd", privacy=step)
    steps, batches = recorded(how, step, 64), batches_of(step, how)
    steps.begin(get_weights(build(SPEC, seed=0)), batches, 1e-6)
    _descend_recorded(steps, batches, StepRate(how, 1))
    images, stream = weakref.ref(batches.dataset), weakref.ref(batches.random)
    del batches
    steps.wipe()
    gc.collect()
    assert images() is None and stream() is None
    for tensor in (steps._images, steps._labels, steps._kept, steps._key, *steps._sums):
        assert not tensor.any()
    first = steps._parameters[0].grad_sample  # of a convolution of images: 0 of 0
    assert not first.any()
    (padded,) = (
        held for name, held in steps._books.space._held.items()
        if isinstance(name, tuple) and name[:2] == ("padded", 3)
    )  # fmt: skip
    assert not padded.any()
    with pytest.raises(PrivacyError, match="no training"):
        steps.finish()


def test_noise_divisor_and_rate_are_each_trainings_own() -> None:
    """As of hospitals of other sizes, which share what was recorded for the first."""
    made, used = (
        step_of(steps=1),
        step_of(steps=1, noise_multiplier=50.0, expected_batch_size=10.0, sampling_rate=1e-9),
    )
    how = settings(optimizer="sgd", privacy=used, learning_rate=0.5)
    steps, start = recorded(how, made, 64), get_weights(build(SPEC, seed=0))
    batches = batches_of(used, how)
    steps.begin(start, batches, used.noise_multiplier)
    _descend_recorded(steps, batches, StepRate(how, 1))
    moved = flat(get_weights(steps.model)) - flat(start)
    std = GaussianSum(50.0, 0.5, len(moved)).std
    assert float(moved.std()) == pytest.approx(0.5 * std / 10.0, rel=0.05)


@on_gpu
def test_trainings_that_freeze_other_parts_share_nothing() -> None:
    start = get_weights(build(SPEC, seed=0))
    whole, part = build(SPEC), build(SPEC)
    freeze(part, ["stem"])
    one, other = (
        train(m, start, IMAGES, LABELS, settings(), seed=0, reuse="frozen") for m in (whole, part)
    )
    assert one.update["stem.0.weight"].any() and not other.update["stem.0.weight"].any()


class Thing:
    wiped = 0

    def wipe(self) -> None:
        self.wiped += 1


def test_what_cannot_be_recorded_is_tried_once(caplog: pytest.LogCaptureFixture) -> None:
    kept: Kept[Thing] = Kept()
    tries = []

    def make() -> Thing:
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing")

    for _ in range(2):
        with kept.lent("one", make) as found:
            assert found is None
    assert len(tries) == 1 and "slower" in caplog.text


def test_what_is_lent_is_wiped_also_after_an_error_and_few_are_kept() -> None:
    kept, thing = Kept[Thing](), Thing()

    def failing() -> None:
        with kept.lent("one", lambda: thing) as found:
            assert found is thing
            raise PrivacyError("something went wrong", "try again")

    for times in (1, 2):
        with pytest.raises(PrivacyError):
            failing()
        assert thing.wiped == times
    for i in range(9):
        with kept.lent(i, Thing):
            pass
    assert len(kept._made) == 4

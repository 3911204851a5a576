"""Training and evaluating at one hospital, private or not. Knows no Flower and no files.

Private training is DP-SGD (Abadi et al. 2016) through Opacus: Poisson batches of privacy units
(images or patients), each unit's gradient clipped to norm C, Gaussian noise of σ·C on the sum,
division by the *announced* batch size (the real one is private).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.devices import CPU, device_of, use_threads
from common.errors import ConsiliumError, PrivacyError
from common.model import Weights, get_weights, set_weights
from common.optimizers import make_optimizer
from common.privacy.batches import PoissonBatches
from common.privacy.clipping import CLIPPINGS, FLAT
from common.privacy.engine import SecureDPOptimizer, images_at_once, make_private
from common.privacy.guard import ContiguityWatch, Criterion, check_criterion, check_images
from common.privacy.randomness import SecureRandom
from common.privacy.views import SeededUniform, draw_views
from common.recorded.choose import recorded_private, recorded_step
from common.recorded.plain import Batch, PlainStep
from common.recorded.private import RecordedPrivateSteps
from common.schedule import learning_rate_factor


class TrainingError(ConsiliumError):
    """Training diverged: a loss or a weight is NaN or infinite."""

    code = "training"


@dataclass(frozen=True, kw_only=True)
class PrivateStep:
    """DP-SGD by public figures alone: nothing here may be derived from private data.

    Not even from how many images the hospital has: the true number is private, so the rate and
    the divisor are what the hospital announced, not what it counts. A *privacy unit* is one
    image, or one patient where ``train`` is given ``units``.

    Raises PrivacyError for figures that cannot be accounted for.
    """

    noise_multiplier: float
    """σ: the noise's standard deviation / clipping norm."""
    clipping_norm: float
    """C: the largest L2 norm of one privacy unit's gradient."""
    sampling_rate: float
    """q: each privacy unit is in each batch with this probability, independently of all else."""
    steps: int
    """Batches of one call to ``train``."""
    expected_batch_size: float
    """In privacy units: what the noisy sum is divided by, whatever the batch really holds."""
    views: int = 0
    """K: an image's gradient is the mean over K random views of it (augmentation multiplicity, De
    et al. 2022, §3.4), taken before clipping; 0: of the image itself."""
    clipping: str = FLAT
    """The clipping rule, of :data:`common.privacy.clipping.CLIPPINGS`."""

    def __post_init__(self) -> None:
        positive = (self.noise_multiplier, self.clipping_norm, self.expected_batch_size)
        ok = (
            all(math.isfinite(x) and x > 0 for x in positive)
            and 0 < self.sampling_rate <= 1
            and self.steps >= 1
            and self.views >= 0
            and self.clipping in CLIPPINGS
        )
        if not ok:
            raise PrivacyError(
                f"{self} is no private training",
                "use σ, C and an expected batch size > 0, a sampling rate in (0, 1], steps "
                f"≥ 1, views ≥ 0 and one of the clippings {', '.join(CLIPPINGS)}",
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How one hospital trains in one round.

    With ``privacy`` set, ``epochs``, ``batch_size`` and ``views`` are not used: the steps, the
    size of a batch and the views are ``privacy``'s public figures.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str
    threads: int = 1
    privacy: PrivateStep | None = None
    precision: str = "float32"
    """``bfloat16``: forward and backward compute in it where that is safe (PyTorch's autocast);
    weights and optimizer stay float32. Under privacy norms are those of the very numbers that are
    summed, and all passes have one shape (:class:`common.privacy.bookkeeping.module.BookKeeping`).
    """
    schedule: str = "constant"
    """How the learning rate falls over the steps of this call (:mod:`common.schedule`)."""
    views: int = 0
    """K ≥ 1: each image comes as K random views of itself (:mod:`common.privacy.views`), drawn anew
    in each pass; 0: as it is."""
    steps: int = 0
    """Without privacy: so many batches of the passes, which begin anew where ``epochs`` end; 0: all
    of them."""
    device: str = CPU
    """Of :data:`common.devices.DEVICES`. What is returned is on the CPU in any case."""

    @property
    def half(self) -> bool:
        """Whether passes compute in bfloat16."""
        return self.precision == "bfloat16"


@dataclass(frozen=True)
class TrainResult:
    """``update`` = θ after − θ before (float32; name → array); ``steps`` batches made it.

    ``loss`` (the mean over all images of all batches) and ``examples`` (the true number of
    images) are private figures, for the hospital's own eyes: no noise covers them.
    """

    update: Weights
    loss: float
    examples: int
    steps: int


def to_tensor(images: np.ndarray) -> Tensor:
    """(N, H, W, C) uint8 → contiguous (N, C, H, W) float32 in [-1, 1] (mean 0.5, std 0.5)."""
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(torch.float32)
    return x.div_(127.5).sub_(1.0)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches of one pass over ``images`` images; at least one."""
    return max(1, -(-images // batch_size))


def _shuffled(
    images: Tensor, labels: Tensor, settings: TrainSettings, seed: int
) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)  # batches without DP: no secret
    random, k = SeededUniform(seed), settings.views
    left = planned_steps(settings, len(labels))
    while left:
        order = torch.randperm(len(labels), generator=generator).to(images.device)
        for chosen in torch.split(order, settings.batch_size)[:left]:
            left -= 1
            views = draw_views(len(chosen), k, random).to(images.device) if k else None
            yield Batch(images[chosen], labels[chosen], views)


def train(
    model: nn.Module,
    start: Mapping[str, np.ndarray],
    images: Tensor,
    labels: Tensor,
    settings: TrainSettings,
    *,
    seed: int,
    units: Tensor | None = None,
    random: SecureRandom | None = None,
    criterion: Criterion = F.cross_entropy,
    reuse: Hashable = None,
) -> TrainResult:
    """Train ``model`` from the weights ``start`` on (N, C, H, W) ``images``, (N,) ``labels``.

    Without privacy the result depends on the arguments alone (for one number of threads), and
    not on ``units``. With privacy ``seed`` is not used: batches and noise come from ``random``,
    by default a fresh :class:`SecureRandom`.

    ``units`` (N,) int64: images with the same number are one privacy unit (a patient). They are
    sampled together and their summed gradient is clipped, so the guarantee is for the patient,
    whatever the number of images. None: each image is a unit of its own. ``criterion`` is the
    mean of per-image losses. Parameters that are frozen (:func:`common.model.freeze`) stay as
    they are in ``start``: the update is exactly zero there.

    ``reuse``: equal for models of one structure, such as a run's specification; which of its parts
    are frozen may differ. On a GPU the steps of the first of them are recorded then, and replayed
    for all (:mod:`common.recorded`); what is trained is a copy of ``model``. With patients, views
    of images under privacy or another criterion steps are taken one by one.

    Raises PrivacyError for what would break the guarantee (:mod:`common.privacy.guard`; bfloat16
    for a model with a layer that :mod:`common.privacy.bookkeeping` does not know), TrainingError
    when the loss or the update is not finite.
    """
    where = device_of(settings.device)
    set_weights(model, start)
    model.to(where).train()
    images, labels = images.to(where), labels.to(where)
    use_threads(settings.threads)
    alike = None if reuse is None else (reuse, criterion)
    if settings.privacy is None:
        batches = _shuffled(images, labels, settings, seed)
        steps = planned_steps(settings, len(labels))
        with recorded_step(model, settings, images, labels, alike) as recorded:
            step: PlainStep
            if recorded is None:
                optimizer = make_optimizer(model, settings)
                step = PlainStep(model, optimizer, criterion, half=settings.half)
            else:
                recorded.begin(start)
                step = recorded
            loss = _descend(step, batches, StepRate(settings, steps))
            end = get_weights(step.model)
    else:
        privacy, steps = settings.privacy, settings.privacy.steps
        private = PoissonBatches(
            images,
            labels,
            sampling_rate=privacy.sampling_rate,
            steps=steps,
            expected_batch_size=privacy.expected_batch_size,
            random=random or SecureRandom(),
            units=units,
            most_images=images_at_once(model),
            views=privacy.views,
        )
        _check(model, images, criterion)
        rate = StepRate(settings, steps)
        with recorded_private(model, private, settings, alike) as booked:
            if booked is None:
                loss = _train_private(model, private, settings, privacy, criterion, rate)
                end = get_weights(model)
            else:
                booked.begin(start, private, privacy.noise_multiplier)
                loss = _descend_recorded(booked, private, rate)
                end = get_weights(booked.model)
    update = {name: (end[name].astype(np.float64) - start[name]).astype(np.float32) for name in end}
    if not all(np.isfinite(u).all() for u in update.values()):
        raise TrainingError("the trained weights hold NaN or infinity", "lower the learning rate")
    return TrainResult(update, loss, len(labels), steps)


def _check(model: nn.Module, images: Tensor, criterion: Criterion) -> None:
    """PrivacyError for images and losses that would break the guarantee."""
    check_images(images)
    with torch.no_grad():
        num_classes = model(images[:1]).shape[1]
    check_criterion(criterion, num_classes)


def _train_private(
    model: nn.Module,
    batches: PoissonBatches,
    settings: TrainSettings,
    privacy: PrivateStep,
    criterion: Criterion,
    rate: StepRate,
) -> float:
    wrapped, optimizer, _ = make_private(
        model,
        make_optimizer(model, settings),
        batches,
        noise_multiplier=privacy.noise_multiplier,
        clipping_norm=privacy.clipping_norm,
        clipping=privacy.clipping,
        precision=settings.precision,
    )
    watch = ContiguityWatch(model)
    try:
        return _descend_private(wrapped, optimizer, batches, criterion, rate)
    finally:
        watch.remove()
        wrapped.remove_hooks()  # type: ignore[operator]  # the caller's model is plain again


def planned_steps(settings: TrainSettings, images: int) -> int:
    """Batches of one training without privacy on so many images."""
    return settings.steps or settings.epochs * steps_per_epoch(images, settings.batch_size)


@dataclass
class StepRate:
    """The learning rate before each of ``planned`` steps."""

    settings: TrainSettings
    planned: int
    done: int = 0

    def set(self, optimizer: torch.optim.Optimizer, *, ends: bool = True) -> None:
        """Set it for the next step; ``ends``: whether the step is over then."""
        factor = learning_rate_factor(self.settings.schedule, self.done / self.planned)
        for group in optimizer.param_groups:
            if isinstance(group["lr"], Tensor):  # where a recorded step reads it
                group["lr"].fill_(self.settings.learning_rate * factor)
            else:
                group["lr"] = self.settings.learning_rate * factor
        self.done += ends


_LOOKED_AT = {"cpu": 1, "cuda": 64}
"""Steps after which it is looked whether losses are finite: a GPU would wait for it each time."""


def _descend(step: PlainStep, batches: Iterator[Batch], rate: StepRate) -> float:
    total, images, steps = torch.zeros((), dtype=torch.float64), 0, 0
    for batch in batches:
        rate.set(step.optimizer)
        n, device = len(batch.labels), batch.labels.device
        total = total.to(device) + step(batch) * n
        if steps % _LOOKED_AT[device.type] == 0:
            _check_finite(total)
        images, steps = images + n, steps + 1
    return _check_finite(total) / max(images, 1)


def _descend_recorded(
    steps: RecordedPrivateSteps, batches: PoissonBatches, rate: StepRate
) -> float:
    images = 0
    for part in batches:
        rate.set(steps.optimizer, ends=part.last)
        steps(part)
        images += len(part.labels)
    return steps.finish() / max(images, 1)


def _descend_private(
    model: nn.Module,
    optimizer: SecureDPOptimizer,
    batches: PoissonBatches,
    criterion: Criterion,
    rate: StepRate,
) -> float:
    total, images = torch.zeros((), dtype=torch.float64), 0
    half = rate.settings.half
    for part in batches:
        optimizer.zero_grad()
        rate.set(optimizer, ends=part.last)
        optimizer.expect(part)
        if len(part.labels):
            with torch.autocast(part.images.device.type, torch.bfloat16, enabled=half):
                logits = model(part.images)
            loss = optimizer.backward(logits.float(), part.labels, criterion)
            # Not an error if it is not finite: whether it is hangs on single images.
            total = total.to(loss.device) + loss
        optimizer.step()  # adds noise and moves the weights at a batch's last part
        images += len(part.labels)
    return float(total) / max(images, 1)


def _check_finite(loss: Tensor) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss of a training is {value}",
            "lower the learning rate, or check the images",
        )
    return value

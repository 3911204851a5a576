"""Training and evaluating at one hospital, private or not. Knows no Flower and no files.

Private training is DP-SGD (Abadi et al. 2016) through Opacus: Poisson batches of privacy units
(images or patients), each unit's gradient clipped to norm C, Gaussian noise of σ·C on the sum,
division by the *announced* batch size (the real one is private).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import ConsiliumError, ModelError, PrivacyError
from common.model import Weights, get_weights, set_weights
from common.privacy.batches import PoissonBatches
from common.privacy.clipping import CLIPPINGS, FLAT
from common.privacy.engine import SecureDPOptimizer, images_at_once, make_private
from common.privacy.guard import ContiguityWatch, Criterion, check_criterion, check_images
from common.privacy.randomness import SecureRandom
from common.privacy.views import (
    DIHEDRAL,
    SINGLE,
    TEST_VIEWS,
    SeededUniform,
    apply_views,
    dihedral,
    draw_views,
)
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


@dataclass(frozen=True)
class EvalResult:
    """Sums over ``examples`` images, and each image's class probabilities (N, K) float32."""

    loss_sum: float
    correct: int
    examples: int
    probabilities: np.ndarray


def to_tensor(images: np.ndarray) -> Tensor:
    """(N, H, W, C) uint8 → contiguous (N, C, H, W) float32 in [-1, 1] (mean 0.5, std 0.5)."""
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(torch.float32)
    return x.div_(127.5).sub_(1.0)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Batches of one pass over ``images`` images; at least one."""
    return max(1, -(-images // batch_size))


def use_threads(n: int) -> None:
    """Compute with ``n`` CPU threads from now on, in this whole process.

    Float sums, and so results, depend on their number. It is not set back afterwards: the
    setting is the process's, and another hospital may be training in another thread of it.
    """
    if torch.get_num_threads() != n:
        torch.set_num_threads(n)


def usable_cores() -> int:
    """The CPU cores that this process may use: fewer than there are, where it is bound to some."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    # Fused: one pass over the parameters; Opacus hands its optimizers gradients one by one.
    how: dict[str, Any] = {"lr": settings.learning_rate, "fused": settings.privacy is None}
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), **how)
    return torch.optim.SGD(model.parameters(), momentum=0.9, **how)


def _shuffled(
    images: Tensor, labels: Tensor, settings: TrainSettings, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)  # batches without DP: no secret
    random, k = SeededUniform(seed), settings.views
    for _ in range(settings.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in torch.split(order, settings.batch_size):
            if not k:
                yield images[chosen], labels[chosen]
                continue
            of = chosen.repeat_interleave(k)
            views = draw_views(len(chosen), k, random).view(-1, 3)
            yield apply_views(images[of], views), labels[of]


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

    Raises PrivacyError for what would break the guarantee (:mod:`common.privacy.guard`; bfloat16
    for a model with a layer that :mod:`common.privacy.bookkeeping` does not know), TrainingError
    when the loss or the update is not finite.
    """
    set_weights(model, start)
    model.train()
    use_threads(settings.threads)
    if settings.privacy is None:
        batches = _shuffled(images, labels, settings, seed)
        optimizer = _make_optimizer(model, settings)
        planned = settings.epochs * steps_per_epoch(len(labels), settings.batch_size)
        rate = StepRate(settings, planned)
        loss, steps = _descend(model, optimizer, batches, criterion, rate)
    else:
        private = PoissonBatches(
            images,
            labels,
            sampling_rate=settings.privacy.sampling_rate,
            steps=settings.privacy.steps,
            expected_batch_size=settings.privacy.expected_batch_size,
            random=random or SecureRandom(),
            units=units,
            most_images=images_at_once(model),
            views=settings.privacy.views,
        )
        loss = _train_private(model, private, settings, settings.privacy, criterion)
        steps = settings.privacy.steps
    end = get_weights(model)
    update = {name: (end[name].astype(np.float64) - start[name]).astype(np.float32) for name in end}
    if not all(np.isfinite(u).all() for u in update.values()):
        raise TrainingError("the trained weights hold NaN or infinity", "lower the learning rate")
    return TrainResult(update, loss, len(labels), steps)


def _train_private(
    model: nn.Module,
    batches: PoissonBatches,
    settings: TrainSettings,
    privacy: PrivateStep,
    criterion: Criterion,
) -> float:
    images, _ = batches.dataset.tensors
    check_images(images)
    with torch.no_grad():
        num_classes = model(images[:1]).shape[1]
    check_criterion(criterion, num_classes)
    wrapped, optimizer, _ = make_private(
        model,
        _make_optimizer(model, settings),
        batches,
        noise_multiplier=privacy.noise_multiplier,
        clipping_norm=privacy.clipping_norm,
        clipping=privacy.clipping,
        precision=settings.precision,
    )
    watch = ContiguityWatch(model)
    try:
        rate = StepRate(settings, privacy.steps)
        return _descend_private(wrapped, optimizer, batches, criterion, rate)
    finally:
        watch.remove()
        wrapped.remove_hooks()  # type: ignore[operator]  # the caller's model is plain again


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
            group["lr"] = self.settings.learning_rate * factor
        self.done += ends


def _descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    criterion: Criterion,
    rate: StepRate,
) -> tuple[float, int]:
    total, images, steps = 0.0, 0, 0
    half = rate.settings.precision == "bfloat16"
    for x, y in batches:
        optimizer.zero_grad()
        rate.set(optimizer)
        # Anew for each step: it keeps the weights that it has converted until it ends.
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = criterion(model(x), y)
        total += _finite(loss) * len(y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        images, steps = images + len(y), steps + 1
    return total / max(images, 1), steps


def _descend_private(
    model: nn.Module,
    optimizer: SecureDPOptimizer,
    batches: PoissonBatches,
    criterion: Criterion,
    rate: StepRate,
) -> float:
    total, images = 0.0, 0
    half = rate.settings.precision == "bfloat16"
    for part in batches:
        optimizer.zero_grad()
        rate.set(optimizer, ends=part.last)
        optimizer.expect(part)
        if len(part.labels):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                logits = model(part.images)
            loss = criterion(logits.float() if half else logits, part.labels) * len(part.labels)
            # Not an error if it is not finite: whether it is hangs on single images.
            total += loss.item()
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()  # adds noise and moves the weights at a batch's last part
        images += len(part.labels)
    return total / max(images, 1)


def _finite(loss: Tensor) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss of a batch is {value}", "lower the learning rate, or check the images"
        )
    return value


def evaluate(
    model: nn.Module,
    weights: Mapping[str, np.ndarray],
    images: Tensor,
    labels: Tensor,
    *,
    threads: int = 1,
    batch_size: int = 256,
    views: str = SINGLE,
    precision: str = "float32",
) -> EvalResult:
    """Loss, accuracy and class probabilities of ``weights`` on ``images``, no gradient taken.

    With ``views`` ``dihedral`` an image's probabilities are the mean over its eight flips and
    quarter turns, so that they do not depend on how it lies; loss and accuracy are of that mean,
    and it takes eight times as long. ``precision`` as of :class:`TrainSettings`; losses and
    probabilities are float32 in any case. ModelError for views that are none of
    :data:`~common.privacy.views.TEST_VIEWS`.
    """
    if views not in TEST_VIEWS:
        raise ModelError(f"there are no '{views}' views", f"use one of: {', '.join(TEST_VIEWS)}")
    set_weights(model, weights)
    model.eval()
    use_threads(threads)
    loss, outputs = 0.0, []
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with torch.no_grad(), half:
        for x, y in zip(
            torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
        ):
            if views == DIHEDRAL:
                each = (model(view).float() for view in dihedral(x))
                seen = torch.stack([F.log_softmax(logits, dim=1) for logits in each])
                logits = seen.logsumexp(0)  # of the mean softmax, up to a constant
            else:
                logits = model(x).float()
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            outputs.append(F.softmax(logits, dim=1))
    probabilities = torch.cat(outputs).numpy()
    correct = int((probabilities.argmax(1) == labels.numpy()).sum())
    return EvalResult(loss, correct, len(labels), probabilities)

"""Training and evaluating at one hospital, private or not. Knows no Flower and no files.

Private training is DP-SGD (Abadi et al. 2016) through Opacus: Poisson batches, each image's
gradient clipped to norm C, Gaussian noise of σ·C on the sum, division by the *expected* batch
size (the real one is private).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import ConsiliumError
from common.model import Weights, get_weights, set_weights
from common.privacy.engine import PoissonBatches, make_private
from common.privacy.guard import ContiguityWatch, Criterion, check_criterion, check_images
from common.privacy.randomness import SecureRandom


class TrainingError(ConsiliumError):
    """Training diverged: a loss or a weight is NaN or infinite."""

    code = "training"


@dataclass(frozen=True, kw_only=True)
class PrivateStep:
    """The mechanism of every step: σ (noise std / C) and C (largest norm of one gradient)."""

    noise_multiplier: float
    clipping_norm: float


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How one hospital trains in one round."""

    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str
    threads: int = 1
    privacy: PrivateStep | None = None


@dataclass(frozen=True)
class TrainResult:
    """``update`` = θ after − θ before (float32; name → array), mean ``loss`` over all batches."""

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
    """Batches of one pass; under DP the sampling rate is one over this."""
    return max(1, -(-images // batch_size))


def use_threads(n: int) -> None:
    """Compute with ``n`` CPU threads from now on, in this whole process.

    Float sums, and so results, depend on their number. It is not set back afterwards: the
    setting is the process's, and another hospital may be training in another thread of it.
    """
    if torch.get_num_threads() != n:
        torch.set_num_threads(n)


def _make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    return torch.optim.SGD(model.parameters(), lr=settings.learning_rate, momentum=0.9)


def _shuffled(
    images: Tensor, labels: Tensor, batch_size: int, epochs: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)  # batches without DP: no secret
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(labels), generator=generator), batch_size):
            yield images[chosen], labels[chosen]


def train(
    model: nn.Module,
    start: Mapping[str, np.ndarray],
    images: Tensor,
    labels: Tensor,
    settings: TrainSettings,
    *,
    seed: int,
    random: SecureRandom | None = None,
    criterion: Criterion = F.cross_entropy,
) -> TrainResult:
    """Train ``model`` from the weights ``start`` on (N, C, H, W) ``images``, (N,) ``labels``.

    Without privacy the result depends on the arguments alone (for one number of threads). With
    privacy ``seed`` is not used: batches and noise come from ``random``, by default a fresh
    :class:`SecureRandom`.

    Raises PrivacyError for what would break the guarantee (:mod:`common.privacy.guard`),
    TrainingError when the loss or the update is not finite.
    """
    set_weights(model, start)
    model.train()
    use_threads(settings.threads)
    if settings.privacy is None:
        batches = _shuffled(images, labels, settings.batch_size, settings.epochs, seed)
        optimizer = _make_optimizer(model, settings)
        loss, steps = _descend(model, optimizer, batches, criterion)
    else:
        loss, steps = _train_private(
            model, images, labels, settings, settings.privacy, random or SecureRandom(), criterion
        )
    end = get_weights(model)
    update = {name: (end[name].astype(np.float64) - start[name]).astype(np.float32) for name in end}
    if not all(np.isfinite(u).all() for u in update.values()):
        raise TrainingError("the trained weights hold NaN or infinity", "lower the learning rate")
    return TrainResult(update, loss, len(labels), steps)


def _train_private(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: TrainSettings,
    privacy: PrivateStep,
    random: SecureRandom,
    criterion: Criterion,
) -> tuple[float, int]:
    check_images(images)
    with torch.no_grad():
        num_classes = model(images[:1]).shape[1]
    check_criterion(criterion, num_classes)
    epoch = PoissonBatches(
        images, labels, steps_per_epoch(len(labels), settings.batch_size), random
    )
    wrapped, optimizer, _ = make_private(
        model,
        _make_optimizer(model, settings),
        epoch,
        noise_multiplier=privacy.noise_multiplier,
        clipping_norm=privacy.clipping_norm,
    )
    watch = ContiguityWatch(model)
    try:
        batches = (batch for _ in range(settings.epochs) for batch in epoch)
        return _descend(wrapped, optimizer, batches, criterion)
    finally:
        watch.remove()
        wrapped.remove_hooks()  # type: ignore[operator]  # the caller's model is plain again


def _descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    criterion: Criterion,
) -> tuple[float, int]:
    total, images, steps = 0.0, 0, 0
    for x, y in batches:
        optimizer.zero_grad()
        loss = criterion(model(x), y) if len(y) else model(x).sum()  # empty: zero gradients
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {loss.item()} at step {steps + 1}",
                "lower the learning rate, or check the images",
            )
        loss.backward()
        optimizer.step()
        total, images, steps = total + loss.item() * len(y), images + len(y), steps + 1
    return total / max(images, 1), steps


def evaluate(
    model: nn.Module,
    weights: Mapping[str, np.ndarray],
    images: Tensor,
    labels: Tensor,
    *,
    threads: int = 1,
    batch_size: int = 256,
) -> EvalResult:
    """Loss, accuracy and class probabilities of ``weights`` on ``images``, no gradient taken."""
    set_weights(model, weights)
    model.eval()
    use_threads(threads)
    loss, outputs = 0.0, []
    with torch.no_grad():
        for x, y in zip(
            torch.split(images, batch_size), torch.split(labels, batch_size), strict=True
        ):
            logits = model(x)
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            outputs.append(F.softmax(logits, dim=1))
    probabilities = torch.cat(outputs).numpy()
    correct = int((probabilities.argmax(1) == labels.numpy()).sum())
    return EvalResult(loss, correct, len(labels), probabilities)

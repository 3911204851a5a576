"""The real private trainer, and trainers that differ from it in one thing.

Each :class:`Trainer` runs ``common.training.train`` itself. A planted bug replaces one part of
it for the time of a call (or a part and the guard that would refuse it). If a part has been
renamed, planting fails: no bug is planted beside the code that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import common.privacy.engine as engine
import common.training as training
from common.model import Weights
from common.privacy.engine import PoissonBatches, SecureDPOptimizer
from common.privacy.guard import Criterion
from common.privacy.randomness import SecureRandom
from common.training import StepRate, TrainSettings

Parts = Sequence[tuple[Any, str, Any]]
"""(module or class, name of the part, what stands in for it)."""


@contextmanager
def _planted(parts: Parts) -> Iterator[None]:
    """The ``parts`` are replaced inside; AttributeError if there is no such part."""
    with ExitStack() as undo:
        for owner, name, stand_in in parts:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, stand_in)
        yield


@contextmanager
def _fed(model: nn.Module, layout: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Inside, ``model`` gets its input in another ``layout``."""
    if layout is None:
        yield
        return
    # Not done to the tensor of all images: taking a batch out of it may lay it out anew.
    handle = model.register_forward_pre_hook(lambda _, inputs: (layout(inputs[0]),))
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A way to train; by default the real one."""

    name: str
    differs: str
    """In words, in what it differs from the real trainer."""
    parts: Parts = field(default=(), repr=False)
    layout: Callable[[Tensor], Tensor] | None = None
    """The memory layout in which the network is fed its batches; None: contiguous."""
    criterion: Criterion = F.cross_entropy
    knows_units: bool = True
    """Whether it is told which images are one patient's."""
    fixed_key: bytes | None = None
    """The same key for every call, whatever the caller gives."""

    def update(
        self,
        model: nn.Module,
        start: Weights,
        images: Tensor,
        labels: Tensor,
        settings: TrainSettings,
        *,
        units: Tensor | None = None,
        random: SecureRandom | None = None,
    ) -> Weights:
        """What leaves the hospital: the trained weights less ``start``, float32."""
        if self.fixed_key is not None:
            random = SecureRandom(key_for_tests=self.fixed_key)
        with _planted(self.parts), _fed(model, self.layout):
            result = training.train(
                model,
                start,
                images,
                labels,
                settings,
                seed=0,  # not used with privacy
                units=units if self.knows_units else None,
                random=random,
                criterion=self.criterion,
            )
        return result.update


def flat(update: Mapping[str, np.ndarray]) -> np.ndarray:
    """All entries of an update in one float64 vector."""
    return np.concatenate([u.ravel().astype(np.float64) for u in update.values()])


# --- the guard, told to look away -------------------------------------------------------------


class _NoWatch:
    def __init__(self, model: nn.Module) -> None:
        pass

    def remove(self) -> None:
        pass


def _pass(*_: Any) -> None:
    pass


_NO_LAYOUT_GUARD: Parts = ((training, "ContiguityWatch", _NoWatch),)
_NO_CRITERION_GUARD: Parts = ((training, "check_criterion", _pass),)
_OWN_SIZE: Parts = (
    (engine, "rows_of_parts", lambda model, batches, precision: len(batches.dataset)),
    (engine, "invariant_part", lambda model, batches, precision, rows, booked: rows),
)
"""Passes as large as the data set, as they are no more: what fills them up would thin a bug out."""


# --- what is planted --------------------------------------------------------------------------

_make_private = engine.make_private


def _with_less_noise(factor: float) -> Parts:
    def make_private(*args: Any, noise_multiplier: float, **rest: Any) -> Any:
        return _make_private(*args, noise_multiplier=factor * noise_multiplier, **rest)

    return ((training, "make_private", make_private),)


def channels_last(x: Tensor) -> Tensor:
    """The same images in NHWC memory."""
    return x.to(memory_format=torch.channels_last)


def batch_innermost(x: Tensor) -> Tensor:
    """The same images in CHWN memory: the batch is the axis that runs fastest."""
    return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)


def _two_passes(
    model: nn.Module,
    optimizer: SecureDPOptimizer,
    batches: PoissonBatches,
    criterion: Criterion,
    rate: StepRate,
) -> float:
    """DP-SGD with per-image gradients for the norms only; autograd sums, weighted by them.

    The way of "ghost" clipping and of book-keeping, which need not hold all gradients at once.
    """
    parameters = optimizer.params
    for part in batches:
        assert part.last and part.units is None and len(part.labels)  # the audit's are small
        optimizer.zero_grad()
        rate.set(optimizer)
        loss = criterion(model(part.images), part.labels) * len(part.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        square = sum(p.grad_sample.double().flatten(1).square().sum(1) for p in parameters)
        norms = torch.sqrt(square)[: len(part.labels)]  # without what the pass was filled up with
        factors = (optimizer.max_grad_norm / norms).clamp(max=1.0)
        model.disable_hooks()  # type: ignore[operator]
        losses = F.cross_entropy(model(part.images), part.labels, reduction="none")
        sums = torch.autograd.grad((factors * losses).sum(), parameters)
        model.enable_hooks()  # type: ignore[operator]
        for p, summed in zip(parameters, sums, strict=True):
            p.summed_grad = summed.double().contiguous()
        optimizer.add_noise()
        optimizer.scale_grad()
        optimizer.original_optimizer.step()
    return 0.0


def _clip_the_mean(
    sums: Sequence[Tensor],
    gradients: Sequence[Tensor],
    clipping_norm: float,
    clipping: str,
    *,
    kept: Tensor,
) -> None:
    images = int(kept.sum())
    if images == 0:
        return
    means = [g[kept].double().mean(0) for g in gradients]
    norm = torch.sqrt(sum(m.square().sum() for m in means))  # type: ignore[arg-type]
    factor = (clipping_norm / norm).clamp(max=1.0)
    for total, mean in zip(sums, means, strict=True):
        total += images * factor * mean


def centred_by_the_batch(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of logits less the batch's mean logits."""
    return F.cross_entropy(z - z.mean(0), y)


def weighted_by_class(z: Tensor, y: Tensor) -> Tensor:
    """torch's class-weighted mean: its divisor is the sum of the batch's weights.

    The last class is rare and weighs 1000 times as much.
    """
    weights = torch.ones(z.shape[1], dtype=z.dtype)
    weights[-1] = 1000.0
    return F.cross_entropy(z, y, weight=weights)


REAL = Trainer(name="real", differs="nothing")

TWO_PASSES = Trainer(
    name="two-pass clipping",
    differs="norms from per-image gradients, the sum from a second, weighted backward pass",
    parts=((training, "_descend_private", _two_passes),),
)
"""Sound while the per-image gradients are right: the control of the planted bug below."""

CHANNELS_LAST = Trainer(
    name="channels_last",
    differs="images in NHWC memory, the guard looks away",
    parts=_NO_LAYOUT_GUARD,
    layout=channels_last,
)
"""Learns the wrong thing and keeps its ε: see benchmarks/README.md."""

NO_NOISE = Trainer(
    name="noise forgotten",
    differs="a millionth of the claimed noise",
    parts=_with_less_noise(1e-6),
)
"""For the audit in one run, which cannot see smaller bugs."""

BUGS: dict[str, Trainer] = {
    bug.name: bug
    for bug in (
        Trainer(
            name="half the noise",
            differs="noise of half the claimed deviation",
            parts=_with_less_noise(0.5),
        ),
        Trainer(
            name="channels_last, two-pass clipping",
            differs="images in NHWC memory under two-pass clipping, the guard looks away",
            parts=(*_NO_LAYOUT_GUARD, *TWO_PASSES.parts),
            layout=channels_last,
        ),
        Trainer(
            name="batch innermost",
            differs="batches in CHWN memory, the guard looks away",
            parts=(*_NO_LAYOUT_GUARD, *_OWN_SIZE),
            layout=batch_innermost,
        ),
        Trainer(
            name="centred logits",
            differs="the loss subtracts the batch's mean logits, the guard looks away",
            parts=(*_NO_CRITERION_GUARD, *_OWN_SIZE),
            criterion=centred_by_the_batch,
        ),
        Trainer(
            name="class-weighted mean",
            differs="the loss is a class-weighted mean, the guard looks away",
            parts=_NO_CRITERION_GUARD,
            criterion=weighted_by_class,
        ),
        Trainer(
            name="clipped mean",
            differs="the batch's mean gradient is clipped, not each image's",
            parts=((engine, "add_clipped", _clip_the_mean),),
        ),
        Trainer(
            name="reused key",
            differs="every call draws its noise from the same key",
            fixed_key=bytes(32),
        ),
        Trainer(
            name="pictures for patients",
            differs="a patient's pictures are separate units, ε is claimed for patients",
            knows_units=False,
        ),
    )
}

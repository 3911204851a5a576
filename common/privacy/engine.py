"""Opacus's PrivacyEngine with its randomness, batches, clipping and noise replaced.

Opacus draws Poisson batches and noise from torch's Mersenne Twister unless ``torchcsprng`` is
there, which it is not for current torch; it takes the sampling rate and the divisor from the
data set's length, which is private; it clips in float32 and knows no patients. What stays
Opacus's own are the per-image gradients, the accounting hook and the validators.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.errors import PrivacyError
from common.privacy.clipping import add_clipped, unit_sums
from common.privacy.gaussian import GaussianSum
from common.privacy.guard import check_model, check_units
from common.privacy.randomness import SecureRandom

# Images need no gradient, and need none: Opacus hooks the layers' outputs.
warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)

_GRADIENT_NUMBERS = 1 << 28
"""Per-image gradients held at once: 1 GiB of float32."""


@dataclass(frozen=True)
class Part:
    """The images of a batch that go through the network at once."""

    images: Tensor
    labels: Tensor
    units: Tensor | None
    """(n,) int64: which unit of this part each image is of, from 0 on; None: each its own."""
    finished: bool = True
    """False: the part holds one unit alone, of which more images follow."""
    last: bool = False
    """Whether the batch ends here."""


class PoissonBatches:
    """``steps`` Poisson batches at the public ``sampling_rate``, as :class:`Part`.

    Each privacy unit is in each batch independently of all others, with all its images, so a
    batch may be empty (one part without images). ``units`` (N,) int64 tells which unit each
    image is of; None: each its own. A part holds at most ``most_images``, and whole units: only
    one that alone is larger is spread over several. Not thread-safe.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        sampling_rate: float,
        steps: int,
        expected_batch_size: float,
        random: SecureRandom,
        units: Tensor | None = None,
        most_images: int = 1024,
    ) -> None:
        self.dataset = TensorDataset(images, labels)
        self.sampling_rate = sampling_rate
        self.steps = steps
        self.expected_batch_size = expected_batch_size
        self.random = random
        self.most_images = most_images
        self.images_of = None if units is None else _group(check_units(units, len(labels)))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Part]:
        count = len(self.dataset) if self.images_of is None else len(self.images_of)
        for _ in range(self.steps):
            chosen = torch.from_numpy(self.random.bernoulli(count, self.sampling_rate))
            yield from self._parts(torch.nonzero(chosen).flatten())

    def _parts(self, chosen: Tensor) -> Iterator[Part]:
        """One batch: the units ``chosen``, at most ``most_images`` images at a time."""
        waiting: Part | None = None
        for rows, units, finished in self._divide(chosen):
            if waiting is not None:
                yield waiting
            images, labels = self.dataset.tensors
            waiting = Part(images[rows], labels[rows], units, finished)
        assert waiting is not None
        yield replace(waiting, last=True)

    def _divide(self, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor | None, bool]]:
        """(images, their units within the part, whether the units are complete)."""
        if self.images_of is None:
            for rows in torch.split(chosen, self.most_images):
                yield rows, None, True
            return
        together: list[Tensor] = []
        size = 0
        for unit in chosen.tolist():
            rows = self.images_of[unit]
            if together and size + len(rows) > self.most_images:
                yield torch.cat(together), _numbers(together), True
                together, size = [], 0
            if len(rows) > self.most_images:
                *first, rest = torch.split(rows, self.most_images)
                for piece in first:
                    yield piece, torch.zeros_like(piece), False
                yield rest, torch.zeros_like(rest), True
            else:
                together.append(rows)
                size += len(rows)
        if together or len(chosen) == 0:
            together.append(torch.empty(0, dtype=torch.int64))
            yield torch.cat(together), _numbers(together), True


def _group(units: Tensor) -> list[Tensor]:
    """The images of each unit; units in the order of their first image."""
    _, first, number = np.unique(units.numpy(), return_index=True, return_inverse=True)
    order = np.argsort(number, kind="stable")
    groups = np.split(order, np.cumsum(np.bincount(number))[:-1])
    return [torch.from_numpy(groups[unit]) for unit in np.argsort(first)]


def _numbers(groups: list[Tensor]) -> Tensor:
    lengths = torch.tensor([len(rows) for rows in groups])
    return torch.repeat_interleave(torch.arange(len(groups)), lengths)


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no type information
    """Flat clipping of each unit's summed gradient; cryptographic noise on a grid.

    Before each ``step()``, ``expect`` tells whose the images are whose gradients it will find.
    """

    random: SecureRandom
    whole_units_only = False
    """Whether images belong to units, so that a step without ``expect`` must be refused."""
    _part: Part | None = None
    _unfinished: list[Tensor] | None = None

    @property
    def mechanism(self) -> GaussianSum:
        """The mechanism of each step, over all trainable parameters."""
        dimension = sum(p.numel() for p in self.params)
        return GaussianSum(self.noise_multiplier, self.max_grad_norm, dimension)

    def expect(self, part: Part) -> None:
        """The next ``step()`` finds the gradients of ``part``; noise comes with the last part.

        For a part without images there is no need of a forward and backward pass.
        """
        self._part = part
        if len(part.labels) == 0:
            for p in self.params:
                p.grad_sample = p.new_zeros((0, *p.shape))
        self.signal_skip_step(not part.last)

    def clip_and_accumulate(self) -> None:
        """Add the units' clipped gradients to ``p.summed_grad``, float64."""
        part, self._part = self._part, None
        if part is None and self.whole_units_only:
            raise PrivacyError(
                "gradients without word of whose they are", "call expect() before each step()"
            )
        for p in self.params:
            gradient = self._get_flat_grad_sample(p)
            if hasattr(gradient, "_processed"):  # Opacus's own mark against a second use
                raise PrivacyError("gradients used twice", "call zero_grad() before each step()")
            if part is not None and part.units is not None:
                gradient = unit_sums(gradient, part.units)
            p.grad_sample = gradient
            if p.summed_grad is None:
                p.summed_grad = torch.zeros(p.shape, dtype=torch.float64, device=p.device)
            p.grad_sample._processed = True
        gradients = [p.grad_sample for p in self.params]
        if self._unfinished is not None:  # the one unit of this part began in the part before
            gradients = [a + b for a, b in zip(self._unfinished, gradients, strict=True)]
        if part is not None and not part.finished:
            self._unfinished = gradients
            return
        self._unfinished = None
        add_clipped([p.summed_grad for p in self.params], gradients, self.max_grad_norm)

    def scale_grad(self) -> None:
        """``p.grad`` becomes the noisy mean over the *announced* number of units."""
        for p in self.params:
            p.grad /= self.expected_batch_size

    def add_noise(self) -> None:
        """``p.grad`` = sum of the clipped gradients + noise, for each parameter."""
        for p in self.params:
            if hasattr(p.summed_grad, "_processed"):
                raise PrivacyError("a sum released twice", "call zero_grad() before each step()")
            p.summed_grad._processed = True
        # All at once: there are many small parameters, and each release has a cost of its own.
        whole = torch.cat([p.summed_grad.view(-1) for p in self.params])
        noisy = self.mechanism.release(whole, self.random)
        sizes = [p.numel() for p in self.params]
        for p, part in zip(self.params, torch.split(noisy, sizes), strict=True):
            p.grad = part.view_as(p).to(p.dtype)


class SecurePrivacyEngine(PrivacyEngine):  # type: ignore[misc]
    """A PrivacyEngine that accepts only :class:`PoissonBatches` and makes secure noise."""

    def __init__(self, random: SecureRandom) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Secure RNG turned off": it is ours that is on
            super().__init__(accountant="prv")
        self._random = random

    def _prepare_data_loader(self, data_loader: Any, **_: Any) -> Any:
        if not isinstance(data_loader, PoissonBatches):
            raise PrivacyError(
                f"batches come from {type(data_loader).__name__}, for which ε would be wrong",
                "use PoissonBatches",
            )
        return data_loader

    def _prepare_optimizer(self, **kwargs: Any) -> SecureDPOptimizer:
        if kwargs.pop("clipping", "flat") != "flat":
            raise PrivacyError("only flat clipping is accounted for", "use clipping='flat'")
        for unused in ("distributed", "noise_generator", "grad_sample_mode"):
            kwargs.pop(unused, None)
        optimizer = SecureDPOptimizer(**kwargs)
        optimizer.random = self._random
        return optimizer


def images_at_once(model: nn.Module) -> int:
    """How many images' gradients fit in 1 GiB; at least one."""
    return max(1, _GRADIENT_NUMBERS // sum(p.numel() for p in model.parameters()))


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: PoissonBatches,
    *,
    noise_multiplier: float,
    clipping_norm: float,
) -> tuple[nn.Module, SecureDPOptimizer, SecurePrivacyEngine]:
    """Wrap ``model`` and ``optimizer`` with Opacus for training on ``batches``.

    The wrapped model shares its parameters with ``model``. Call ``backward()`` on the *sum* of
    the images' losses: from a mean, Opacus would make up for 1/n by multiplying with n, which in
    float32 lets each image's gradient depend on n. Raises PrivacyError for what
    :func:`common.privacy.guard.check_model` refuses.
    """
    check_model(model)
    engine = SecurePrivacyEngine(batches.random)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped, private_optimizer, _ = engine.make_private(
            module=model,
            optimizer=optimizer,
            data_loader=batches,
            noise_multiplier=noise_multiplier,
            max_grad_norm=clipping_norm,
            loss_reduction="sum",
            poisson_sampling=True,
        )
    # Opacus takes q and the divisor from the length of the data, which is private.
    private_optimizer.expected_batch_size = batches.expected_batch_size
    private_optimizer.attach_step_hook(
        engine.accountant.get_optimizer_hook_fn(sample_rate=batches.sampling_rate)
    )
    private_optimizer.whole_units_only = batches.images_of is not None
    return wrapped, private_optimizer, engine

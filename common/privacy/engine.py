"""Opacus's PrivacyEngine with its randomness replaced by :class:`SecureRandom`.

Opacus draws Poisson batches and noise from torch's Mersenne Twister unless ``torchcsprng`` is
there, which it is not for current torch. Everything else (per-sample gradients, flat clipping,
accounting hooks, validators) is Opacus's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from common.errors import PrivacyError
from common.privacy.guard import check_model
from common.privacy.randomness import SecureRandom


class PoissonBatches:
    """One epoch of Poisson batches: ``steps`` of them at sampling rate 1 / ``steps``.

    Each image is in each batch independently of all others, so a batch may be empty. Looks like
    a DataLoader to Opacus, which takes q from ``1 / len(self)``.
    """

    def __init__(self, images: Tensor, labels: Tensor, steps: int, random: SecureRandom) -> None:
        self.dataset = TensorDataset(images, labels)
        self.steps = steps
        self.random = random

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self.dataset.tensors
        for _ in range(self.steps):
            chosen = torch.from_numpy(self.random.bernoulli(len(labels), 1.0 / self.steps))
            yield images[chosen], labels[chosen]


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no type information
    """Flat clipping as in Opacus; the noise comes from a cryptographic stream."""

    random: SecureRandom

    def add_noise(self) -> None:
        """``p.grad`` = sum of the clipped gradients + noise of std σ·C, for each parameter."""
        std = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            noise = self.random.normal(p.summed_grad.shape, std).to(p.summed_grad.device)
            p.grad = (p.summed_grad + noise).view_as(p)
            p.summed_grad._processed = True  # Opacus's own mark against a second use


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


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: PoissonBatches,
    *,
    noise_multiplier: float,
    clipping_norm: float,
) -> tuple[nn.Module, SecureDPOptimizer, SecurePrivacyEngine]:
    """Wrap ``model`` and ``optimizer`` with Opacus for training on ``batches``.

    The wrapped model shares its parameters with ``model``. Raises PrivacyError for what
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
            poisson_sampling=True,
        )
    return wrapped, private_optimizer, engine

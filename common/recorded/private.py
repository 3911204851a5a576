"""Private steps, recorded: gradients of one shape of batch, clipping, noise and the step itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import PrivacyError
from common.model import set_weights
from common.privacy.batches import Part, PoissonBatches
from common.privacy.bookkeeping.module import BookKeeping
from common.privacy.chacha import key_tensor
from common.privacy.clipping import add_clipped
from common.privacy.device_noise import normals
from common.privacy.engine import SecureDPOptimizer, SecurePrivacyEngine
from common.privacy.gaussian import GaussianSum, check_size, noisy_integers
from common.privacy.randomness import SecureRandom
from common.recorded.graph import Recorded
from common.recorded.plain import computed_in, forget


class RecordedPrivateSteps:
    """DP-SGD's steps of one model, each image a privacy unit, on a GPU.

    What :class:`common.privacy.engine.SecureDPOptimizer` does, in the same order with the same
    functions, but that all passes are of ``size`` images: places that a batch leaves empty count as
    images that were not sampled. Noise has a fresh key of the caller's stream for each step. For a
    model in book-keeping and the cross-entropy.
    """

    def __init__(
        self,
        books: BookKeeping,
        private: SecureDPOptimizer,
        engine: SecurePrivacyEngine,
        image: Tensor,
        *,
        size: int,
        half: bool,
    ) -> None:
        """``image``: one, for its shape; ``private`` wraps an optimizer that can be recorded."""
        books.together = None
        self.model: nn.Module = books._module
        self.optimizer: torch.optim.Optimizer = private.original_optimizer
        self.size = size
        self._books, self._private, self._engine, self._half = books, private, engine, half
        self._parameters = list(private.params)
        device = image.device
        self._images = image.new_zeros((size, *image.shape))
        self._labels = torch.zeros(size, dtype=torch.int64, device=device)
        self._kept = torch.zeros(size, dtype=torch.bool, device=device)
        self._sums = [torch.zeros_like(p, dtype=torch.float64) for p in self._parameters]
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._largest = torch.zeros((), dtype=torch.float64, device=device)
        self._key = torch.zeros(4, dtype=torch.int64, device=device)
        # Steps of the grid per unit, noise in steps, the grid's step, 1 / the announced batch.
        self._scale = torch.ones(4, dtype=torch.float64, device=device)
        self._training: tuple[PoissonBatches, GaussianSum] | None = None
        # The first training's: it has ended long before some other uses these steps.
        private.random = engine._random = SecureRandom()
        self._add, self._end = Recorded(self._accumulate), Recorded(self._release)

    def _accumulate(self) -> None:
        for p in self._parameters:
            p.grad = p.grad_sample = None
        self._books.expect(None)
        with computed_in(self._images.device, half=self._half):
            logits = self._books(self._images)
        losses = F.cross_entropy(logits.float(), self._labels, reduction="none")
        losses.sum().backward()  # type: ignore[no-untyped-call]
        self._loss += torch.where(self._kept, losses.detach(), 0.0).sum()
        gradients = [p.grad_sample for p in self._parameters]
        norm, rule = self._private.max_grad_norm, self._private.clipping
        add_clipped(self._sums, gradients, norm, rule, kept=self._kept)

    def _release(self) -> None:
        whole = torch.cat([s.view(-1) for s in self._sums])
        self._largest.copy_(torch.maximum(self._largest, whole.abs().amax()))
        per_step, noise, step, share = self._scale.unbind()
        noisy = noisy_integers(whole, normals(self._key, len(whole)), per_step, noise)
        # In float32 first, as every release is: what follows is a function of it alone.
        mean = noisy.mul_(step).to(torch.float32) * share.to(torch.float32)
        sizes = [p.numel() for p in self._parameters]
        for p, part in zip(self._parameters, torch.split(mean, sizes), strict=True):
            p.grad = part.view_as(p)
        self.optimizer.step()
        for s in self._sums:
            s.zero_()

    def begin(self, start: Mapping[str, np.ndarray], batches: PoissonBatches, sigma: float) -> None:
        """From these weights; ``batches`` come in parts of :attr:`size` images from now on."""
        set_weights(self.model, start)
        forget(self.optimizer)
        for tensor in (*self._sums, self._loss, self._largest):
            tensor.zero_()
        batches.most_images = self.size
        dimension = sum(p.numel() for p in self._parameters)
        mechanism = GaussianSum(sigma, self._private.max_grad_norm, dimension)
        grid, std = mechanism.step, mechanism.std
        scale = (1.0 / grid, std / grid, grid, 1.0 / batches.expected_batch_size)
        self._scale.copy_(torch.tensor(scale, dtype=torch.float64))
        self._engine.accountant.history = []  # of this training alone
        self._training = batches, mechanism

    def __call__(self, part: Part) -> None:
        """One part of a batch; with the last the weights move. PrivacyError for one too large."""
        batches, mechanism = self._begun()
        n = len(part.labels)
        if n > self.size:
            raise PrivacyError(
                f"{n} images at once, where steps of {self.size} are recorded",
                "take batches in parts (PoissonBatches.most_images)",
            )
        if n:
            self._images[:n].copy_(part.images)
            self._images[n:].zero_()
            self._labels[:n].copy_(part.labels)
            self._kept[:n].fill_(True)
            self._kept[n:].fill_(False)
            self._add()
        if part.last:
            self._key.copy_(key_tensor(batches.random.stream_key(), torch.device("cpu")))
            self._end()
            self._engine.accountant.step(
                noise_multiplier=mechanism.noise_multiplier, sample_rate=batches.sampling_rate
            )

    def finish(self) -> float:
        """The summed loss of all images. PrivacyError if a sum was more than noise would hide.

        Nothing of the steps has left by then.
        """
        check_size(self._largest.view(1), self._begun()[1])
        return float(self._loss)

    def wipe(self) -> None:
        """No image, gradient, sum or key of a training stays; weights are anything from then on.

        What was recorded is done once more on nothing, over all that it left behind on the GPU.
        """
        self._training = None
        held = [self._images, self._labels, self._kept, self._key, *self._sums]
        for tensor in held:
            tensor.zero_()
        self._add()
        self._end()
        for tensor in (*held, self._loss, self._largest):
            tensor.zero_()

    def _begun(self) -> tuple[PoissonBatches, GaussianSum]:
        if self._training is None:
            raise PrivacyError("steps of no training", "call begin() before each training")
        return self._training

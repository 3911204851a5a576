"""Opacus's PrivacyEngine with its randomness, batches, gradients, clipping and noise replaced.

Opacus draws Poisson batches and noise from torch's Mersenne Twister unless ``torchcsprng`` is
there, which it is not for current torch; it takes the sampling rate and the divisor from the
data set's length, which is private; it clips in float32 and knows neither patients nor views; and
its hooks compute the batch's gradient along with each image's (``python -m benchmarks.dp_step``).
What stays Opacus's own are the accounting hook, the validators, and the hooks for a model with a
layer that :mod:`common.privacy.bookkeeping` does not know.
"""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from common.errors import PrivacyError
from common.privacy import samplers  # noqa: F401  # Opacus learns of our own layers by it
from common.privacy.batches import Part, PoissonBatches
from common.privacy.bookkeeping.factors import Factors, dense, full
from common.privacy.bookkeeping.memory import images_together
from common.privacy.bookkeeping.module import BookKeeping, unknown_layer
from common.privacy.clipping import FLAT, add_clipped, check_clipping, unit_sums
from common.privacy.gaussian import GaussianSum
from common.privacy.guard import check_model
from common.privacy.randomness import SecureRandom

log = logging.getLogger("consilium.privacy")

# Images need no gradient, and need none: Opacus hooks the layers' outputs.
warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)

_GRADIENT_NUMBERS = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Per-image gradients held at once: 1 GiB of float32, and 8 GiB on a GPU."""

_TOGETHER = 16, 32
"""Images of a part in bfloat16, where batches are small and large (twice the second): all parts are
filled up to so many, which takes time for the last one of each batch."""
_MOST_TOGETHER = 1024
"""The same on a GPU, which wants whole batches: 2.5 standard deviations more than are expected (a
batch in 160 has more, and takes two passes), and at most so many."""


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus has no type information
    """Clipping of each unit's summed gradient; cryptographic noise on a grid.

    Before each ``step()``, ``expect`` tells whose the images are whose gradients it will find.
    """

    random: SecureRandom
    clipping: str = FLAT
    """The rule (:mod:`common.privacy.clipping`)."""
    whole_units_only = False
    """Whether rows belong to units (patients, or the views of an image), so that a step without
    ``expect`` must be refused."""
    books: BookKeeping | None = None
    """Where gradients come from; None: from Opacus' hooks."""
    _part: Part | None = None
    _unfinished: list[Tensor] | None = None

    @property
    def mechanism(self) -> GaussianSum:
        """The mechanism of each step, over all trainable parameters."""
        dimension = sum(p.numel() for p in self.params)
        return GaussianSum(self.noise_multiplier, self.max_grad_norm, dimension)

    @property
    def grad_samples(self) -> list[Tensor | Factors]:
        """The units' gradients by each parameter, for Opacus."""
        return [self._found(p) for p in self.params]

    @property
    def accumulated_iterations(self) -> int:
        """1, for Opacus' accountant: gradients of two passes are never taken for one step."""
        return 1

    def expect(self, part: Part) -> None:
        """The next ``step()`` finds the gradients of ``part``; noise comes with the last part.

        Called before the forward pass, it lets the gradients of a unit's images be summed as they
        are made; afterwards, each image's is in memory by itself. For a part without images there
        is no need of a forward and backward pass.
        """
        self._part = part
        if self.books is not None:
            self.books.expect(part.units)
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
            gradient = self._found(p)
            if hasattr(gradient, "_processed"):  # Opacus's own mark against a second use
                raise PrivacyError("gradients used twice", "call zero_grad() before each step()")
            p.grad_sample = gradient if part is None else self._of_units(gradient, part)
            if p.summed_grad is None:
                p.summed_grad = torch.zeros(p.shape, dtype=torch.float64, device=p.device)
            p.grad_sample._processed = True
        if self.books is not None:
            self.books.expect(None)
        gradients = [p.grad_sample for p in self.params]
        if self._unfinished is not None:  # the one unit of this part began in the part before
            pairs = zip(self._unfinished, gradients, strict=True)
            gradients = [a + full(dense(b)) for a, b in pairs]
        if part is not None and not part.finished:
            self._unfinished = [full(dense(g)).clone() for g in gradients]
            return
        self._unfinished = None
        sums = [p.summed_grad for p in self.params]
        add_clipped(sums, gradients, self.max_grad_norm, self.clipping)

    def _found(self, p: Any) -> Tensor | Factors:
        if isinstance(p.grad_sample, Factors):
            return p.grad_sample
        gradient: Tensor = self._get_flat_grad_sample(p)
        return gradient

    def _of_units(self, gradient: Tensor | Factors, part: Part) -> Tensor | Factors:
        """The gradient of each unit of ``part``, from that of each image or (book-kept) unit."""
        if part.units is None:
            return gradient
        if self.books is None or not self.books.summed:
            gradient = unit_sums(dense(gradient), part.units)
        return gradient if part.views == 1 else full(dense(gradient)) / part.views

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

    def _prepare_model(self, module: nn.Module, **kwargs: Any) -> nn.Module:
        unknown = unknown_layer(module)
        if unknown is None:
            self.validate(module=module, optimizer=None, data_loader=None)
            return BookKeeping(module)
        log.warning(
            "each image's gradient comes from Opacus' hooks, which are slower: no book-keeping for "
            "layer %s", unknown,
        )  # fmt: skip
        wrapped: nn.Module = super()._prepare_model(module, **kwargs)
        return wrapped

    def _prepare_data_loader(self, data_loader: Any, **_: Any) -> Any:
        if not isinstance(data_loader, PoissonBatches):
            raise PrivacyError(
                f"batches come from {type(data_loader).__name__}, for which ε would be wrong",
                "use PoissonBatches",
            )
        return data_loader

    def _prepare_optimizer(self, **kwargs: Any) -> SecureDPOptimizer:
        clipping = kwargs.pop("clipping", FLAT)
        check_clipping(clipping)
        for unused in ("distributed", "noise_generator", "grad_sample_mode"):
            kwargs.pop(unused, None)
        optimizer = SecureDPOptimizer(**kwargs)
        optimizer.random = self._random
        optimizer.clipping = clipping
        return optimizer


def images_at_once(model: nn.Module) -> int:
    """How many images' (or views') gradients fit in 1 GiB (a GPU: 8); at least one.

    Frozen parts have none.
    """
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return max(1, _GRADIENT_NUMBERS[parameters[0].device.type] // max(1, trained))


def filled_up_to(batches: PoissonBatches) -> int:
    """Images of each part in bfloat16, from public figures alone."""
    views = max(1, batches.views)
    if batches.dataset.tensors[0].is_cuda:
        units = batches.expected_batch_size
        likely = math.ceil((units + 2.5 * math.sqrt(units)) * views / 16.0) * 16
        return min(_MOST_TOGETHER, likely)
    few, many = _TOGETHER
    return many if batches.expected_batch_size * views >= 2 * many else few


def make_private(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: PoissonBatches,
    *,
    noise_multiplier: float,
    clipping_norm: float,
    clipping: str = FLAT,
    precision: str = "float32",
) -> tuple[nn.Module, SecureDPOptimizer, SecurePrivacyEngine]:
    """Wrap ``model`` and ``optimizer`` with Opacus for training on ``batches``.

    Where every layer with parameters is known to :mod:`common.privacy.bookkeeping`, gradients come
    from there; else from Opacus' hooks, and the log says for which layer. ``batches`` come in
    parts from then on that keep memory flat. With ``precision`` ``bfloat16`` run the wrapped model
    under autocast: then, and always on a GPU, all parts have one shape, so that rounding cannot
    tell how many images there are.

    The wrapped model shares its parameters with ``model``. Call ``backward()`` on the *sum* of
    the images' losses: from a mean, Opacus would make up for 1/n by multiplying with n, which in
    float32 lets each image's gradient depend on n. Parameters that are frozen take no part: they
    are in no gradient's norm, and no noise is drawn for them. Raises PrivacyError for what
    :func:`common.privacy.guard.check_model` refuses, an unknown ``clipping`` rule, a model without
    any parameter to train, and bfloat16 under Opacus' hooks.
    """
    check_model(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise PrivacyError(  # Opacus would take ordinary steps, without noise
            "the model has no parameter to train", "freeze fewer parts of it"
        )
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
            clipping=clipping,
        )
    # Opacus takes q and the divisor from the length of the data, which is private.
    private_optimizer.expected_batch_size = batches.expected_batch_size
    private_optimizer.attach_step_hook(
        engine.accountant.get_optimizer_hook_fn(sample_rate=batches.sampling_rate)
    )
    batches.most_images = images_together(
        model, batches.dataset.tensors[0], most=batches.most_images
    )
    books = private_optimizer.books = wrapped if isinstance(wrapped, BookKeeping) else None
    on_gpu = batches.dataset.tensors[0].is_cuda
    if precision != "float32" or (books is not None and on_gpu):
        if books is None:
            raise PrivacyError(
                f"private training in {precision} through Opacus' hooks: rounding in it may tell "
                "how many images a batch has",
                "set precision=float32, or use a model that book-keeping knows",
            )
        together = filled_up_to(batches)
        books.together = batches.most_images = min(together, batches.most_images)
    private_optimizer.whole_units_only = batches.images_of is not None or batches.views > 1
    return wrapped, private_optimizer, engine

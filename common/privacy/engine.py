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
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import PrivacyError
from common.fixed_shape import alike_rows, invariant_rows, padded, random_copy, structure_of
from common.privacy import samplers  # noqa: F401  # Opacus learns of our own layers by it
from common.privacy.batches import Part, PoissonBatches
from common.privacy.bookkeeping.factors import Factors, dense, full
from common.privacy.bookkeeping.memory import images_together, numbers_per_image
from common.privacy.bookkeeping.module import BookKeeping, unknown_layer, whole
from common.privacy.clipping import FLAT, add_clipped, check_clipping, unit_sums
from common.privacy.gaussian import GaussianSum
from common.privacy.guard import Criterion, check_model
from common.privacy.randomness import SecureRandom

log = logging.getLogger("consilium.privacy")

# Images need no gradient, and need none: Opacus hooks the layers' outputs.
warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)

_GRADIENT_NUMBERS = {"cpu": 1 << 28, "cuda": 1 << 31}
"""Per-image gradients held at once: 1 GiB of float32, and 8 GiB on a GPU."""

_TOGETHER = 16, 32
"""Images of a part in bfloat16, where batches are small and large (twice the second): all parts are
filled up to so many, which takes time for the last one of each batch."""
_PART_NUMBERS = 3 << 19
"""What a part costs besides its images on a CPU: as much as so many numbers of their gradients and
activations."""
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
    rows = 0
    """Images (or views) that each pass is filled up to: :func:`make_private` sets it."""
    fed = 0
    """How many images the last pass had, through Opacus' hooks."""
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

    def backward(self, logits: Tensor, labels: Tensor, criterion: Criterion) -> Tensor:
        """Backpropagate the images' losses, each by itself; their sum, detached.

        ``logits`` (n, K) of the wrapped model for a part's n ≥ 1 images, ``labels`` (n,) theirs.
        The losses, too, are taken of one number of rows.
        """
        size, n = max(self.rows, len(labels)), len(labels)
        loss = criterion(padded(logits, size), padded(labels, size)) * size
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return criterion(logits.detach(), labels) * n

    def clip_and_accumulate(self) -> None:
        """Add the units' clipped gradients to ``p.summed_grad``, float64.

        What passes were filled up with goes along, so that clipping has one shape, too, and adds
        nothing.
        """
        part, self._part = self._part, None
        if part is None and self.whole_units_only:
            raise PrivacyError(
                "gradients without word of whose they are", "call expect() before each step()"
            )
        for p in self.params:
            gradient = whole(self._found(p))
            if hasattr(gradient, "_processed"):  # Opacus's own mark against a second use
                raise PrivacyError("gradients used twice", "call zero_grad() before each step()")
            p.grad_sample = gradient if part is None else self._of_units(gradient, part)
            if p.summed_grad is None:
                p.summed_grad = torch.zeros(p.shape, dtype=torch.float64, device=p.device)
            p.grad_sample._processed = gradient._processed = True
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
        places = torch.arange(len(gradients[0]), device=self.params[0].device)
        kept = places < self._count(part, len(gradients[0]))
        add_clipped(sums, gradients, self.max_grad_norm, self.clipping, kept=kept)

    def _count(self, part: Part | None, places: int) -> int:
        """How many of the gradients' ``places`` are of images or units."""
        if part is None:
            return min(places, self.fed if self.books is None else self.books.fed)
        if part.units is None:
            return len(part.labels)
        return int(part.units.max()) + 1 if len(part.units) else 0

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
            rows = dense(gradient)[: len(part.units)]
            gradient = padded(unit_sums(rows, part.units), len(gradient))
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
    """Images of each part in bfloat16 and on a GPU, from public figures alone."""
    views = max(1, batches.views)
    if batches.dataset.tensors[0].is_cuda:
        return min(_MOST_TOGETHER, _likely(batches))
    few, many = _TOGETHER
    return many if batches.expected_batch_size * views >= 2 * many else few


def _likely(batches: PoissonBatches) -> int:
    """Images (or views) that few batches have more of: a multiple of 16."""
    units = min(batches.expected_batch_size, 1e9)
    likely = (units + 2.5 * math.sqrt(units)) * max(1, batches.views)
    return math.ceil(likely / 16.0) * 16


def rows_of_parts(model: nn.Module, batches: PoissonBatches, precision: str) -> int:
    """Images (or views) that each part of ``batches`` is filled up to, from public figures alone.

    On a CPU in float32 a batch of B images in parts of s takes (B/s + ½)·(o + s·c), where o is what
    a part costs besides its images, c what an image does: least for s = √(2·B·o/c). From 8 on, and
    multiples of 16 from 16 on, as kernels like it; no more than memory is for.
    """
    images = batches.dataset.tensors[0]
    most = images_together(model, images, most=batches.most_images)
    if precision != "float32" or images.is_cuda:
        return min(filled_up_to(batches), most)
    expected = min(batches.expected_batch_size, 1e9) * max(1, batches.views)
    best = math.sqrt(2 * expected * _PART_NUMBERS / numbers_per_image(model, images))
    rows = min(8 if best < 12 else math.ceil(best / 16) * 16, max(32, _likely(batches)))
    return max(1, min(rows, most))


def invariant_part(
    model: nn.Module, batches: PoissonBatches, precision: str, rows: int, *, booked: bool
) -> int:
    """Of ``rows`` and smaller numbers, the first at which an image's gradient has no place.

    As :func:`common.fixed_shape.invariant_rows`, for ``model`` before it is wrapped.
    """
    shape, device = batches.dataset.tensors[0].shape[1:], next(model.parameters()).device
    several = batches.images_of is not None or batches.views > 0
    fresh = cache(lambda: random_copy(model).to(device).train())

    def trial(size: int, seed: int) -> Iterator[Tensor]:
        own = fresh()
        wrapped = BookKeeping(own) if booked else GradSampleModule(own, loss_reduction="sum")
        x = alike_rows(shape, size, seed).to(device)
        try:
            for units in (None, torch.arange(size, device=device) // 2)[: 1 + several]:
                if units is not None and (not booked or size % 2):
                    continue
                for p in own.parameters():
                    p.grad = p.grad_sample = None  # type: ignore[attr-defined]
                if isinstance(wrapped, BookKeeping):
                    wrapped.expect(units)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision != "float32"):
                    logits = wrapped(x).float()
                yield logits.detach()
                # Not saturated, whatever the random weights make: its gradient would be 0.
                scaled = logits / (1 + logits.detach().abs().max())
                labels = torch.zeros(size, dtype=torch.int64, device=device)
                F.cross_entropy(scaled, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
                for p in own.parameters():
                    if p.requires_grad:
                        g = p.grad_sample  # type: ignore[attr-defined]
                        yield g.square_norms() if isinstance(g, Factors) else g
                        if isinstance(g, Factors):
                            yield g.left
        finally:
            wrapped.remove_hooks()

    sizes = [rows, *(s for s in (32, 16, 8) if s < rows)]
    key = ("training", structure_of(model), tuple(shape), precision, booked, several)
    return invariant_rows(key, sizes, trial)


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
    under autocast. All passes have one shape, in which an image's gradient is the same to the bit
    whatever goes with it (:mod:`common.fixed_shape`), so that rounding cannot tell of other images,
    nor of how many there are.

    The wrapped model shares its parameters with ``model``. Call ``backward()`` on the *sum* of
    the images' losses (:meth:`SecureDPOptimizer.backward` does): from a mean, Opacus would make up
    for 1/n by multiplying with n, which in float32 lets each image's gradient depend on n.
    Parameters that are frozen take no part: they are in no gradient's norm, and no noise is drawn
    for them. Raises PrivacyError for what :func:`common.privacy.guard.check_model` refuses, an
    unknown ``clipping`` rule, a model without any parameter to train, and bfloat16 under Opacus'
    hooks.
    """
    check_model(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise PrivacyError(  # Opacus would take ordinary steps, without noise
            "the model has no parameter to train", "freeze fewer parts of it"
        )
    booked = unknown_layer(model) is None
    if precision != "float32" and not booked:
        raise PrivacyError(
            f"private training in {precision} through Opacus' hooks: rounding in it may tell "
            "how many images a batch has",
            "set precision=float32, or use a model that book-keeping knows",
        )
    rows = rows_of_parts(model, batches, precision)
    rows = invariant_part(model, batches, precision, rows, booked=booked)
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
    batches.most_images = private_optimizer.rows = rows
    if isinstance(wrapped, BookKeeping):
        private_optimizer.books, wrapped.together = wrapped, rows
        wrapped.unit_rows = max(1, rows // max(1, batches.views))
    else:
        _fill_up(wrapped, private_optimizer)
    private_optimizer.whole_units_only = batches.images_of is not None or batches.views > 1
    return wrapped, private_optimizer, engine


def _fill_up(wrapped: nn.Module, optimizer: SecureDPOptimizer) -> None:
    """Let every pass of a model under Opacus' hooks have ``optimizer.rows`` images."""

    def fill(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x,) = inputs
        optimizer.fed = len(x)
        if len(x) > optimizer.rows:
            raise PrivacyError(
                f"{len(x)} images at once, where {optimizer.rows} go through the network together",
                "take batches in parts (PoissonBatches.most_images)",
            )
        return (padded(x, optimizer.rows),)

    # On the wrapper, which is thrown away, and not on the caller's model.
    wrapped.register_forward_pre_hook(fill)
    wrapped.register_forward_hook(lambda *called: called[2][: optimizer.fed])

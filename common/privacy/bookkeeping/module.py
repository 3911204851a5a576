"""A grad-sample mode for Opacus: per-image gradients from book-keeping in the backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.grad_sample.gsm_base import AbstractGradSampleModule
from torch import Tensor, nn

from common.errors import PrivacyError
from common.fixed_shape import padded
from common.privacy.bookkeeping.convolution import Workspace
from common.privacy.bookkeeping.factors import Factors, dense, full
from common.privacy.bookkeeping.layers import Made, function_of
from common.privacy.clipping import add_by_unit

_ROWS = 16
"""Images whose gradients are made at once where units have several."""


def unknown_layer(model: nn.Module) -> str | None:
    """The first layer of ``model`` that book-keeping cannot do, in words; None if there is none.

    It can do convolutions in two dimensions, group norm and linear layers of exactly these types,
    without hooks or parametrisations and without a parameter that two layers share.
    """
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        called = f"'{name or 'the model'}' ({type(module).__name__})"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{called}, which has hooks"
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        if own and function_of(module) is None:
            return called
        if not seen.isdisjoint(own):
            return f"{called}, which shares a parameter"
        seen.update(own)
    return None


class BookKeeping(AbstractGradSampleModule):  # type: ignore[misc]  # Opacus has no types
    """``module``, whose backward pass leaves ``p.grad_sample`` at each trainable parameter p.

    As under Opacus' hooks (``loss_reduction="sum"``): (n, *p.shape), the gradient of each image;
    or of each unit, where :meth:`expect` told the units before. In memory it may be laid out
    differently, in bfloat16 under autocast, or :class:`Factors`; :func:`whole` gives it with what
    passes are filled up with. ``p.grad`` stays None. The module
    shares parameters with ``module``; :meth:`remove_hooks` makes it plain again. Raises
    PrivacyError for a layer that is not known, and, like Opacus, for two passes without
    ``zero_grad()`` between them.
    """

    def __init__(self, module: nn.Module) -> None:
        unknown = unknown_layer(module)
        if unknown is not None:
            raise PrivacyError(
                f"no book-keeping for layer {unknown}", "use Opacus' hooks for this model"
            )
        super().__init__(module, batch_first=True, loss_reduction="sum")
        GradSampleHooks.validate(module, strict=True)
        self.enabled = True
        self.space = Workspace()
        self.units: Tensor | None = None
        self.summed = False
        """Whether the gradients that were kept last are of units, not of images."""
        self.together: int | None = None
        """How many images each pass is filled up to, with empty ones that add nothing.

        So all passes have the same shapes, and an image's gradient cannot depend on how many
        others go with it through matrix products that are cut up by their size
        (:mod:`common.fixed_shape`). None: to none."""
        self.unit_rows: int | None = None
        """As many places for units' sums where a pass has :attr:`together` images; None: as many as
        images."""
        self._images = 0
        self._pass = 0
        self._layers = [
            layer
            for layer in module.modules()
            if any(p.requires_grad for p in layer.parameters(recurse=False))
        ]
        for layer in self._layers:
            # On the object, for as long as this stands: the layer's class is nobody's to change.
            layer.forward = partial(self._compute, layer)

    def forward(self, x: Tensor) -> Tensor:
        """What ``module`` computes."""
        self._pass += 1
        n = self._images = len(x)
        if self.together is not None:
            if n > self.together:
                raise PrivacyError(
                    f"{n} images at once, where {self.together} go through the network together",
                    "take batches in parts (PoissonBatches.most_images)",
                )
            x = padded(x, self.together)
        y: Tensor = self._module(x)
        return y[:n]

    @property
    def fed(self) -> int:
        """How many images the last pass had."""
        return self._images

    def expect(self, units: Tensor | None) -> None:
        """Sum the gradients of each unit in the next backward pass: (n,) int64 from 0 on.

        So K images of a unit take the memory of one. None: each image is a unit.
        """
        self.units = units

    def keep(self, parameter: Any, images: int, made: Made) -> None:
        """See :class:`common.privacy.bookkeeping.layers.Book`."""
        before = parameter.grad_sample
        if before is not None:
            if parameter._forward_counter != self._pass:
                raise PrivacyError(
                    "gradients of two passes in one step", "call zero_grad() before each pass"
                )
            before = dense(whole(before)).clone()  # it may lie where the next ones are made
        found, count = self._per_unit(images, made, tuple(parameter.shape))
        if before is not None:  # a layer that is used twice
            found = before + dense(found)
        parameter.grad_sample, self.summed = _cut(found, count), self.units is not None
        parameter._forward_counter = self._pass

    def _per_unit(
        self, images: int, made: Made, shape: tuple[int, ...]
    ) -> tuple[Tensor | Factors, int]:
        """(gradients, of them so many are of images or units; the rest is what was filled up)."""
        n, units = self._images, self.units
        if images != (self.together or n):  # clipped by itself would be less than an image
            raise PrivacyError(
                f"a layer was fed {images} rows, where {n} images went through the network",
                "keep the images the first axis throughout, and nothing else in it",
            )
        if units is None:
            return made(slice(0, images)), n
        if len(units) != n:
            raise PrivacyError(
                f"{n} images went through the network, of which {len(units)} were told",
                "call expect() with the part that goes through it",
            )
        count = int(units.max()) + 1 if n else 0
        if count == n and bool((units.diff() == 1).all()):
            # Quicker, and rounded otherwise than a sum: so it may not hang on what other units
            # there are. Batches have parts of such units alone (common.privacy.batches).
            return made(slice(0, images)), n
        places = count if self.together is None else max(count, self.unit_rows or self.together)
        total: Tensor | None = None
        for start in range(0, images, _ROWS):
            piece = full(dense(made(slice(start, min(start + _ROWS, images)))))
            if total is None:
                total = piece.new_zeros((places, *shape))
            of = units[start : start + _ROWS]
            add_by_unit(total, of, piece[: len(of)])
        assert total is not None  # no images are no fewer units
        return total, count

    def _compute(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What ``layer`` computes of ``x``, booked where a backward pass may follow."""
        function = function_of(layer)
        if function is None or not (self.enabled and layer.training and torch.is_grad_enabled()):
            y: Tensor = type(layer).forward(layer, x)
        else:
            y = function.apply(  # type: ignore[no-untyped-call]
                x, layer.weight, layer.bias, layer, self
            )
        return y

    def forbid_grad_accumulation(self) -> None:
        """It is always forbidden; Opacus calls this where batches are Poisson."""

    def disable_hooks(self) -> None:
        """Until :meth:`enable_hooks`, an ordinary module with ordinary gradients."""
        self.enabled = False

    def enable_hooks(self) -> None:
        """Keep books again."""
        self.enabled = True

    def remove_hooks(self) -> None:
        """Make the wrapped module plain again."""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)
        self._layers, self.space = [], Workspace()


def whole(gradients: Any) -> Any:
    """Of what book-keeping left at a parameter (or anything else): with what was filled up."""
    return getattr(gradients, "_filled_up", gradients)


def _cut(gradients: Tensor | Factors, n: int) -> Tensor | Factors:
    """Those of the first ``n``, which refer to all of them for as long as they are there."""
    if n == len(gradients):
        return gradients
    cut: Any = gradients.first(n) if isinstance(gradients, Factors) else gradients[:n]
    cut._filled_up = gradients
    return cut  # type: ignore[no-any-return]

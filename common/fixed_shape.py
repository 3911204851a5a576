"""Passes of one shape, in which a row's result does not depend on the other rows or on its place.

In floating point a row of a matrix product changes, in its last digits, with the *number* of rows
(the product is cut up by its size) and, with some processors' kernels, with the row's *place*
(where the memory of rows is not aligned alike). A crafted model amplifies such digits to whole
clipping norms. Under differential privacy one picture less must change nothing but its own part
of a sum; so every pass over private pictures

* has one number of rows, which follows from public figures: missing ones are filled up with zeros
  (:func:`padded`, :func:`in_fixed_shape`);
* has it with operations that are the same to the bit at every place. Kernels do not look at what
  they multiply, so this is measured, once for each structure in a process, on random public weights
  and rows that are all the same (:func:`invariant_rows`). Where no number of rows passes, rows go
  through one by one: alone, a row has no place.

Linear layers are fed rows that begin at multiples of 64 bytes (:func:`aligned`): without it the
head of a prior (301 numbers) gives three pictures in four other last digits than the first one, on
an AMD processor with AVX2.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

log = logging.getLogger("consilium.privacy")

ROWS = {"cpu": 32, "cuda": 256}
"""Of a pass without gradients, by the type of the device. Never of the number of pictures."""

_ALIGNED_BYTES = 64
_ENOUGH, _MOST_TRIALS = 2048, 4
"""Numbers of one row that a trial should compare, and after how many trials it is enough anyway."""

M = TypeVar("M", bound=nn.Module)

_lock = threading.Lock()
_found: dict[Hashable, int] = {}


def padded(rows: Tensor, size: int) -> Tensor:
    """(n, ...) → (size, ...): zeros after the ``n`` ≤ ``size`` rows. Gradients pass through."""
    missing = size - len(rows)
    return rows if missing == 0 else torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))])


def in_fixed_shape(function: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """``function`` of all ``rows`` (N, ...), which it is given ``size`` at a time, padded.

    ``function``: (size, ...) → (size, ...), each row's result from that row alone. ``size`` is one
    that :func:`invariant_rows` found for it.
    """
    if len(rows) == 0:
        return function(padded(rows, size))[:0]
    parts = torch.split(rows, size)
    return torch.cat([function(padded(part, size))[: len(part)] for part in parts])


def invariant_rows(
    key: Hashable, sizes: Sequence[int], trial: Callable[[int, int], Iterable[Tensor]]
) -> int:
    """The first of ``sizes`` at which a row's results are the same to the bit at each place; or 1.

    ``trial(size, seed)`` gives the results (size, ...) for ``size`` rows that are all the same, of
    random public numbers: several tensors, any of which a place would show in. What was found is
    kept for ``key`` and the number of threads: of the structure, not of weights.
    """
    whole = (key, tuple(sizes), torch.get_num_threads())
    with _lock:
        if whole not in _found:
            passed = (size for size in sizes if size == 1 or _alike(trial, size))
            _found[whole] = next(passed, 1)
            if _found[whole] == 1 and 1 not in sizes:
                log.warning(
                    "a picture's result depends on its place among %s others on this processor: "
                    "pictures go through the network one by one, which is slower", sizes[0],
                )  # fmt: skip
        return _found[whole]


def _alike(trial: Callable[[int, int], Iterable[Tensor]], size: int) -> bool:
    compared = 0
    for seed in range(_MOST_TRIALS):
        for found in trial(size, seed):
            if not bool((found == found[:1]).all()):  # NaN is unlike itself: no trial at all
                return False
            compared += found[0].numel()
        if compared >= _ENOUGH:
            break
    return True


def alike_rows(shape: Sequence[int], size: int, seed: int) -> Tensor:
    """(size, *shape) float32, the same public row in every place: uniform in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.rand(1, *shape, generator=generator) * 2 - 1
    return row.expand(size, *shape).contiguous()


def random_copy(model: M) -> M:
    """A copy of ``model`` with random public weights, at which no activation vanishes.

    A server's own might hide what depends on a place: all zero, they give zeros everywhere.
    """
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if not tensor.is_floating_point():
                continue
            drawn = torch.randn(tensor.shape, generator=generator)
            fan_in = tensor[0].numel() if tensor.dim() > 1 else 0
            tensor.copy_(drawn / fan_in**0.5 if fan_in else 1 + 0.1 * drawn)
    return other


def structure_of(model: nn.Module) -> Hashable:
    """Equal for models that compute with the same operations, whatever their weights are."""
    tensors = (
        (name, tuple(t.shape), str(t.dtype), t.device.type)
        for name, t in model.state_dict().items()
    )
    trained = (name for name, p in model.named_parameters() if p.requires_grad)
    return str(model), tuple(tensors), tuple(trained), model.training


def aligned(tensor: Tensor, numbers: int = 0) -> Tensor:
    """(..., d) → (..., d' ≥ d), zeros behind: rows that begin at multiples of 64 bytes.

    ``numbers``: of which d' is a multiple, where not of as many as 64 bytes hold.
    """
    multiple = numbers or _ALIGNED_BYTES // tensor.element_size()
    return F.pad(tensor, (0, -tensor.shape[-1] % multiple))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As :func:`torch.nn.functional.linear`, of aligned rows.

    Under autocast ``x`` may be bfloat16 beside float32 weights: both are as long as it needs.
    """
    numbers = _ALIGNED_BYTES // min(x.element_size(), weight.element_size())
    return F.linear(aligned(x, numbers), aligned(weight, numbers), bias)


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


@contextmanager
def aligned_layers(model: nn.Module) -> Iterator[None]:
    """Inside, the linear layers of ``model`` compute as :func:`linear`."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear]
    for layer in layers:
        layer.__dict__["forward"] = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)

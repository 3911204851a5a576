"""A CUDA graph of a function without arguments, and a few of them kept for the calls to come."""

from __future__ import annotations

import gc
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar

import torch

log = logging.getLogger("consilium.training")

_WARM_UP = 3
_KEPT = 4


class Wiped(Protocol):
    """What holds nothing of a training once it was told to."""

    def wipe(self) -> None:
        """Hold nothing of the last training any more."""


T = TypeVar("T", bound=Wiped)


class Recorded:
    """``step`` as a CUDA graph: calling it does again, to the same memory, what ``step`` did.

    ``step`` reads and writes tensors that stay where they are, and never waits for the GPU. It is
    run a few times before it is recorded, so whatever it changes must be set anew afterwards.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            step()

    def __call__(self) -> None:
        """Once more."""
        self._graph.replay()


class Kept(Generic[T]):
    """The last few of what was made for a key; None where it could not be made.

    Recorded steps hold a model's memory on the GPU.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._made: OrderedDict[Hashable, T | None] = OrderedDict()

    @contextmanager
    def lent(self, key: Hashable, make: Callable[[], T]) -> Iterator[T | None]:
        """What was made for ``key``, or is now: this caller's alone until the end, then wiped.

        None, and a line in the log the first time, for a GPU that cannot do it.
        """
        with self._lock:
            found = self._get(key, make)
            try:
                yield found
            finally:
                if found is not None:
                    found.wipe()

    def _get(self, key: Hashable, make: Callable[[], T]) -> T | None:
        if key not in self._made:
            while len(self._made) >= _KEPT:
                self._made.popitem(last=False)
            gc.collect()  # layers and their hooks hold each other, and memory of the GPU
            try:
                self._made[key] = make()
            except RuntimeError as error:
                log.warning("training steps are not recorded, which is slower: %s", error)
                self._made[key] = None
        self._made.move_to_end(key)
        return self._made[key]

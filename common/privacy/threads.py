"""Computing on one thread for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on the calling thread alone.

    For work in pieces of microseconds: there, waiting for other threads at every step costs more
    than they help, and twenty times as much on a busy machine. Torch's setting is per thread; one
    that first uses torch meanwhile starts with 1 (:func:`common.training.use_threads` mends it).
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

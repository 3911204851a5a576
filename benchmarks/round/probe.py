"""When the product's functions ran: they are wrapped as their modules are imported.

Child processes load a copy of this file as ``sitecustomize``, so it imports the standard library
only. One JSON line a call goes to the file that ``$CONSILIUM_PROBE`` names: what, process, thread,
begin and end in seconds of the machine's clock. Of calls inside calls the outermost is noted.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

VARIABLE = "CONSILIUM_PROBE"
SPANS = {
    "common.training": {"train": "train"},
    "common.evaluation": {"evaluate": "validate"},
    "common.privacy.clipped_sum": {"clipped_sum": "train"},
    "common.privacy.statistics": {"statistic_sum": "train"},
    "server_app.evaluation": {"Evaluator.__call__": "test"},
    "server_app.fedavg": {"FedAvg._start": "start"},
    "server_app.progress": {
        "Progress.round_starts": "round-starts",
        "Progress.round_ends": "round-ends",
    },
}
"""Module → function → what its time is called."""

_at_hand = threading.local()


def install(path: str) -> None:
    """Wrap every function of :data:`SPANS` when its module is imported; lines go to ``path``."""
    sys.meta_path.insert(0, _Finder(path))


def wrapped(function: Callable[..., Any], label: str, path: str) -> Callable[..., Any]:
    """``function``, whose outermost calls are noted."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if getattr(_at_hand, "busy", False):
            return function(*args, **kwargs)
        _at_hand.busy, begin, cpu = True, time.time(), time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            _at_hand.busy = False
            _note(path, label, begin, time.thread_time() - cpu)

    return call


def _note(path: str, label: str, begin: float, cpu: float) -> None:
    line = json.dumps([label, os.getpid(), threading.get_ident(), begin, time.time(), cpu]) + "\n"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        os.write(fd, line.encode())  # one write: lines of two processes do not mix
    finally:
        os.close(fd)


def _wrap_all(module: ModuleType, path: str) -> None:
    for name, label in SPANS[module.__name__].items():
        *owners, last = name.split(".")
        owner = functools.reduce(getattr, owners, module)
        setattr(owner, last, wrapped(getattr(owner, last), label, path))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing by itself: it has a found module wrapped once it is executed."""

    def __init__(self, path: str) -> None:
        self.path = path

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec that the others find, with a loader that wraps."""
        if name not in SPANS:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, self.path)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, real: importlib.abc.Loader, path: str) -> None:
        self._real, self._path = real, path

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._real.exec_module(module)
        _wrap_all(module, self._path)

    def __getattr__(self, name: str) -> Any:  # what else a loader can do (sources, resources)
        return getattr(self._real, name)


if __name__ == "sitecustomize" and os.environ.get(VARIABLE):
    install(os.environ[VARIABLE])

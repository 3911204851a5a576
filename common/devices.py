"""Where training and evaluation compute: the processor, or a GPU where there is one."""

from __future__ import annotations

import os

import torch

from common.errors import ConfigError

AUTO, CPU, CUDA = DEVICES = ("auto", "cpu", "cuda")
"""What the run config's ``device`` may be."""


def device_of(name: str) -> torch.device:
    """The device of a run config's ``device``: with ``auto`` a GPU if this process sees one.

    On a GPU float32 means float32 (no TF32), and convolutions take only algorithms that give the
    same result each time: an image's gradient must not change with the moment. ConfigError for
    ``cuda`` where there is none.
    """
    if name not in DEVICES:
        raise ConfigError(f"there is no device '{name}'", f"use one of: {', '.join(DEVICES)}")
    if name == CPU or (name == AUTO and not torch.cuda.is_available()):
        return torch.device(CPU)
    if not torch.cuda.is_available():
        raise ConfigError(
            "device is 'cuda', and this process sees no GPU",
            "set device=auto or cpu, or install a CUDA build of torch and its driver",
        )
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return torch.device(CUDA)


def gpu_count(name: str) -> int:
    """How many GPUs a run config's ``device`` may use: 0 for ``cpu``."""
    return torch.cuda.device_count() if device_of(name).type == CUDA else 0


def device_name(device: torch.device) -> str:
    """As a table shows it: ``cpu``, or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == CUDA else CPU


def use_threads(n: int) -> None:
    """Compute with ``n`` CPU threads from now on, in this whole process.

    Float sums, and so results, depend on their number. It is not set back afterwards: the
    setting is the process's, and another hospital may be training in another thread of it.
    """
    if torch.get_num_threads() != n:
        torch.set_num_threads(n)


def usable_cores() -> int:
    """The CPU cores that this process may use: fewer than there are, where it is bound to some."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

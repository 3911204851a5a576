"""How many files and connections a process may hold open."""

from __future__ import annotations

import resource

WANTED = 8192
"""Descriptors: many times what a federation's server needs, and cheap where nobody uses them."""


def raise_open_files(wanted: int = WANTED) -> int:
    """Raise this process's limit of open files to ``wanted``, or as far as it may; what it is now.

    A limit that is above stays. Many systems start a process with 1,024, which a thousand idle
    connections use up.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return wanted if soft == resource.RLIM_INFINITY else soft

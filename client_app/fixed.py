"""What rounds do not move in a model, kept at the hospital: it need not be sent again each round.

A prior's features are 8 MB, the head on them 10 kB. What is kept is named after its digest, and
compared with it when a file is read, so nothing else can take its place. It is a copy of what a
server sent, and no secret.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np
from safetensors.numpy import save

from client_app.hospital import Hospital
from common.errors import FixedMissing
from common.files import atomic_write
from common.fixed import groups_of
from common.messages import Job
from common.model import (
    ModelSpec,
    Weights,
    check_dtypes,
    check_weights,
    state_dtypes,
    state_shapes,
    weights_digest,
)
from common.tensors import parse_tensors

_FILES = 12
"""That are kept, of parts of models: each other one that a server sends would leave one more."""
_known: OrderedDict[str, Weights] = OrderedDict()
"""Digest → the entries that this process has read: a simulation's hospitals share one set."""
_lock = Lock()
"""Of ``_known``: a simulation's hospitals are threads of one process."""


def completed(job: Job, spec: ModelSpec, hospital: Hospital) -> Job:
    """``job`` with the entries that were left out of it; its model is then whole.

    :class:`~common.errors.FixedMissing` where one is not there, or not what it was; ModelError for
    entries that are not those of ``spec``'s model.
    """
    fixed = dict(job.fixed)
    for digest in job.left_out:
        found = _recall(folder_of(hospital), digest)
        if found is None:
            raise FixedMissing(
                "the server left out entries of the model that this hospital does not have",
                "nothing: the server sends them when it is told",
            )
        fixed.update(found)
    job = replace(job, fixed=fixed, left_out=())
    check_weights(state_shapes(spec), job.model)
    check_dtypes(state_dtypes(spec), job.model)
    return job


def keep(fixed: Mapping[str, np.ndarray], hospital: Hospital) -> None:
    """Keep entries that came with a request, so that they can be left out the next time.

    To be called when they are known to be of the run's model, and the request to be admissible.
    """
    folder = folder_of(hospital)
    for digest, entries in groups_of(fixed).items():
        if _recall(folder, digest) is not None and _touched(folder, digest):
            continue
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic_write(_path(folder, digest), save(entries), mode=0o600)
        for old in sorted(folder.glob("*.safetensors"), key=_age)[_FILES:]:
            old.unlink(missing_ok=True)


def folder_of(hospital: Hospital) -> Path:
    """In the hospital's home; one for all hospitals of a simulation, who are sent the same."""
    return (hospital.home if hospital.own is not None else hospital.home.parent) / "fixed"


def _path(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.safetensors"


def _recall(folder: Path, digest: str) -> Mapping[str, np.ndarray] | None:
    with _lock:
        if digest in _known:
            _known.move_to_end(digest)
            return _known[digest]
    try:
        found = parse_tensors(_path(folder, digest).read_bytes())
    except (OSError, ValueError):
        return None
    if weights_digest(found) != digest:
        return None
    for array in found.values():
        array.flags.writeable = False
    _touched(folder, digest)
    with _lock:
        _known[digest] = found
        while len(_known) > _FILES:
            _known.popitem(last=False)
    return found


def _touched(folder: Path, digest: str) -> bool:
    """Note that a file was used, so that older ones go first; False if it is not there."""
    try:
        os.utime(_path(folder, digest))
    except OSError:
        return False
    return True


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime_ns
    except OSError:  # another process of this node was faster
        return float("inf")

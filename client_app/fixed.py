"""What rounds do not move in a model, kept at the hospital: it need not be sent again each round.

A prior's features are 8 MB, the head on them 10 kB. What is kept is named after its digest, and
compared with it when a file is read, so nothing else can take its place. It is a copy of what a
server sent, and no secret.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from client_app.hospital import Hospital
from common.errors import ProtocolError
from common.files import atomic_write
from common.messages import Job
from common.model import weights_digest

_FILES = 4
"""That are kept: each other model that a server sends would leave one more."""

_known: OrderedDict[str, Mapping[str, np.ndarray]] = OrderedDict()
"""Digest → the entries that this process has read: a simulation's hospitals share one set."""


class FixedMissing(ProtocolError):
    """The server left out entries that this hospital does not have; it will send them again."""

    code = "fixed-missing"


def completed(job: Job, hospital: Hospital) -> Job:
    """``job`` with its fixed entries: kept now if they came along, else read.

    :class:`FixedMissing` where they are not there, or not what they were.
    """
    folder = folder_of(hospital)
    if job.fixed:
        _keep(folder, job.fixed)
    if not job.left_out:
        return job
    found = _recall(folder, job.left_out)
    if found is None:
        raise FixedMissing(
            "the server left out entries of the model that this hospital does not have",
            "nothing: they come with the next round",
        )
    return replace(job, fixed=found, left_out="")


def folder_of(hospital: Hospital) -> Path:
    """In the hospital's home; one for all hospitals of a simulation, who are sent the same."""
    return (hospital.home if hospital.own is not None else hospital.home.parent) / "fixed"


def _keep(folder: Path, fixed: Mapping[str, np.ndarray]) -> None:
    path = folder / f"{weights_digest(fixed)}.safetensors"
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    atomic_write(path, save(dict(fixed)), mode=0o600)
    newest_first = sorted(folder.glob("*.safetensors"), key=lambda p: -p.stat().st_mtime_ns)
    for old in newest_first[_FILES:]:
        old.unlink(missing_ok=True)


def _recall(folder: Path, digest: str) -> Mapping[str, np.ndarray] | None:
    if digest in _known:
        _known.move_to_end(digest)
        return _known[digest]
    try:
        found = load((folder / f"{digest}.safetensors").read_bytes())
    except (OSError, SafetensorError, ValueError):
        return None
    if weights_digest(found) != digest:
        return None
    _known[digest] = found
    if len(_known) > _FILES:
        _known.popitem(last=False)
    return found

"""The way out where vectors are not merged: the fine-tuned models themselves, asked together.

An ensemble has one model for each vector that was trained from the current base and counts: the
base plus that vector. Its answer is the mean of their softmax probabilities, weighted by their
buckets (:func:`common.vectors.ensemble`). A withdrawn or excluded vector has no part in it.

On the disk it is a folder: ``SERIAL-DIGEST.safetensors`` for each model, and ``ensemble.json``
(:mod:`server_app.vectors.manifest`), which is written last. So a kill at any moment leaves the
ensemble that was there, or the new one. Whoever has the folder and the base has each hospital's
vector: only its owner may read it, and it is to be kept like the registry.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.datasets import ImageSet
from common.devices import use_threads
from common.errors import DataError
from common.files import atomic_write
from common.model import ModelSpec, build, check_weights, get_weights, set_weights
from common.training import to_tensor
from common.vectors import Base, Contribution, VectorError, apply_update, ensemble
from common.vectors.tensors import Arrays, pack, unpack
from server_app.registry import Registry, VectorRow
from server_app.registry.history import ACCEPTED
from server_app.vectors.manifest import Manifest, Member, is_member_file, read_at_most

FOLDER = "ensemble"
"""Where a run keeps its ensemble, in its directory."""
MANIFEST = "ensemble.json"
BATCH = 256
"""Images that a model is given at once."""
_TRIES = 5


@dataclass(frozen=True, eq=False)
class Ensemble:
    """The ensemble in a folder; of its models, one at a time is in memory."""

    folder: Path
    manifest: Manifest

    @classmethod
    def read(cls, folder: Path) -> Ensemble:
        """The ensemble that :func:`write_ensemble` has left in ``folder``; every file is checked.

        VectorError: ``ensemble-file`` for one that is missing or cannot be read,
        ``ensemble-format`` (``vector-format``) for a malformed manifest, ``ensemble-digest`` for
        a model's file that was changed; ModelError for weights that do not fit the model or are
        not finite.
        """
        made = cls(folder, Manifest.read(folder / MANIFEST))
        shapes = {k: tuple(v.shape) for k, v in get_weights(build(made.manifest.spec)).items()}
        for member in made.manifest.members:
            check_weights(shapes, made.weights_of(member))
        return made

    @property
    def hospitals(self) -> list[str]:
        """Whose models are in it."""
        return sorted({m.hospital for m in self.manifest.members})

    def weights_of(self, member: Member) -> Arrays:
        """One model, from its file, whose digest is compared each time; see :meth:`read`."""
        data = read_at_most(self.folder / member.file, member.size)
        if hashlib.sha256(data).hexdigest() != member.digest:
            raise VectorError(
                "ensemble-digest",
                f"the file {member.file} in {self.folder} was changed",
                "do not use it; `consilium vectors ensemble` makes the ensemble anew",
            )
        return unpack(data, limit=member.size)[0]

    def probabilities(self, images: np.ndarray, *, threads: int = 1) -> np.ndarray:
        """(N, H, W, C) uint8 images → (N, classes) float64, rows summing to 1.

        Each model is loaded once, and given :data:`BATCH` images at a time. DataError for images
        of another kind; the errors of :meth:`read`.
        """
        spec = self.manifest.spec
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != spec.channels:
            raise DataError(
                f"the images are {images.dtype} of shape {images.shape}, not uint8 of shape "
                f"(N, height, width, {spec.channels})",
                "give images like those that the hospitals trained on",
            )
        if not len(images):
            raise DataError("there is no image to classify", "give one or more")
        use_threads(threads)
        model = build(spec)
        logits, weights = {}, {}
        for member in self.manifest.members:
            set_weights(model, self.weights_of(member))
            logits[member.serial] = _logits(model, images)
            weights[member.serial] = float(member.weight)
        return ensemble(logits, weights)

    def figures(self, images: ImageSet, *, threads: int = 1) -> dict[str, Any]:
        """What :class:`server_app.evaluation.Evaluator` says of a model; the same errors."""
        # scikit-learn takes a while to load, and `consilium vectors list` has no use for it.
        from server_app.evaluation import figures

        found = self.probabilities(images.images, threads=threads)
        chosen = found[np.arange(len(images.labels)), images.labels]
        loss = -np.log(np.maximum(chosen, np.finfo(np.float64).tiny))
        return {
            "loss": float(loss.mean()),
            **figures(images.labels, found, self.manifest.classes),
        }


def write_ensemble(
    registry: Registry, folder: Path, *, run: str, spec: ModelSpec, classes: Sequence[str]
) -> Ensemble:
    """Write the ensemble of what waits for the current base into ``folder``, and read it back.

    One that is there is replaced; other files in the folder stay. In memory are the vectors, as
    for a merge, and one model. VectorError: ``ensemble-empty`` if no such vector waits,
    ``base-model`` if ``spec`` is not the base's, ``registry-moved`` if bases or vectors were
    changed meanwhile, and those of the registry.
    """
    forget_ensemble(registry, folder)
    base, given, rows = _waiting(registry)
    if spec.digest() != base.model_digest:
        raise VectorError(
            "base-model", f"the base is of another model than {spec}", "give the run's own model"
        )
    if not given:
        raise VectorError(
            "ensemble-empty",
            f"no vector waits for the current base, {base.version}: there is no model to ask",
            "wait for vectors; those of a published base wait again once it is taken back "
            "(consilium vectors take-back)",
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(folder):
        members = tuple(_write(folder, base, c, rows[c.serial]) for c in given)
        manifest = Manifest(run, base.id, base.version, spec, tuple(classes), members)
        atomic_write(folder / MANIFEST, manifest.to_json(), mode=0o600)
        _sweep(folder, {m.file for m in members})
    # A hospital may have taken its vector back while the files were written.
    if forget_ensemble(registry, folder):
        raise moved()
    return Ensemble.read(folder)


def forget_ensemble(registry: Registry, folder: Path) -> bool:
    """Remove the ensemble in ``folder`` if what is in it counts no more; whether it did.

    That is: one of its vectors is withdrawn or excluded by now, or its base has been made anew
    without one, or was taken back. One whose manifest is malformed goes as well: nobody can say
    who is in it.
    """
    path = folder / MANIFEST
    if not path.exists():
        return False
    with _alone(folder):
        log = registry.log()
        counting = {v.serial for v in log.vectors if v.state == ACCEPTED}
        try:
            told = Manifest.read(path)
            stands = told.base in {base.id for base in log.line}
            if stands and all(m.serial in counting for m in told.members):
                return False
        except VectorError:
            pass
        path.unlink(missing_ok=True)
        _sweep(folder, set())
    return True


def moved() -> VectorError:
    """The refusal (``registry-moved``) where the registry does not keep still."""
    return VectorError(
        "registry-moved",
        "bases or vectors were changed while the ensemble was made",
        "make it once more",
    )


def _waiting(registry: Registry) -> tuple[Base, list[Contribution], dict[str, VectorRow]]:
    """The current base, the vectors that were trained from it, and their rows: of one moment."""
    for _ in range(_TRIES):
        base = registry.current()
        given = [c for c in registry.contributions() if c.staleness == 0]
        log = registry.log()
        rows = {i.row.serial: i.row for i in log.pending() if i.staleness == 0}
        same = (log.line[-1].version, log.line[-1].id) == (base.version, base.id)
        if same and set(rows) == {c.serial for c in given}:
            return base, given, rows
    raise moved()


def _write(folder: Path, base: Base, given: Contribution, row: VectorRow) -> Member:
    data = pack(apply_update(base.weights, given.values), {"serial": given.serial, "base": base.id})
    made = Member(
        serial=given.serial, hospital=given.hospital, weight=row.bucket, epsilon=row.epsilon,
        delta=row.delta, size=len(data), digest=hashlib.sha256(data).hexdigest(),
    )  # fmt: skip
    atomic_write(folder / made.file, data, mode=0o600)
    return made


def _logits(model: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """(N, H, W, C) uint8 → (N, classes) float32."""
    model.eval()
    outputs = []
    with torch.no_grad():
        for start in range(0, len(images), BATCH):
            outputs.append(model(to_tensor(images[start : start + BATCH])).numpy())
    return np.concatenate(outputs)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """With no other process writing into ``folder``."""
    path = folder / ".lock"
    with path.open("w") as file:
        path.chmod(0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path, kept: set[str]) -> None:
    """Remove models that the manifest does not name, and no other file."""
    for path in folder.iterdir():
        if path.name not in kept and is_member_file(path.name) and path.is_file():
            path.unlink(missing_ok=True)

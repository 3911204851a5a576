"""A prior's features of pictures, computed once: in a process, and at a hospital on its disk.

A head's round takes milliseconds, a prior's forward pass over a hospital's pictures many seconds.
What is kept is named after the prior's tensors and the pictures themselves, so that no other
prior's, and no other picture's, is taken for it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from common.files import atomic_write
from common.fixed_shape import (
    ROWS,
    alike_rows,
    in_fixed_shape,
    invariant_rows,
    random_copy,
    structure_of,
)
from common.model import set_weights
from common.prior.features import PriorFeatures
from common.prior.model import PriorHead
from common.tensors import parse_tensors

_BATCH = 16
"""Pictures that go through the prior together: always so many (:mod:`common.fixed_shape`)."""
_MADE = b"in passes of one shape"
"""Part of the names of what is kept: features of other passes have other last digits."""
_FILES = 4
"""Files of features that a hospital keeps: of train and val, of two priors."""
_KEPT = 64
"""Sets of pictures whose features a process keeps: a simulation's hospitals, train and val."""

_kept: OrderedDict[str, Tensor] = OrderedDict()
_mapped: OrderedDict[str, tuple[bytes, Tensor]] = OrderedDict()
"""Of the same sets: the latest mean and whitening, as a hash, and what the head sees under them."""
_pictures: MutableMapping[Tensor, tuple[int, bytes]] = WeakTensorKeyDictionary()
"""Pictures → (version of the tensor, their hash): hashing a hospital's takes longer than a step."""
_last_prior: tuple[dict[str, Tensor], bytes] = ({}, b"")
"""The last prior's tensors and their hash: comparing takes a tenth of the time of hashing."""


class _Rows:
    """Features of single pictures under the latest prior, whatever set of pictures they were in.

    A simulation shares the same pictures out in many ways, one run after the other.
    """

    MOST = 50_000
    """Of them, 60 MB; more are computed and not kept."""

    def __init__(self) -> None:
        self._prior = b""
        self._kept: dict[bytes, Tensor] = {}

    def of(self, model: PriorHead, pictures: Tensor) -> Tensor:
        """(N, d): the prior's features of ``pictures``, zeros where they are not finite."""
        prior = _prior_hash(model.features)
        if prior != self._prior:
            self._prior, self._kept = prior, {}
        names = [hashlib.sha256(p.contiguous().numpy().data).digest() for p in pictures]
        missing = [i for i, name in enumerate(names) if name not in self._kept]
        features = model.features.eval()
        size = _invariant(features, features.spec, (3, features.spec.size, features.spec.size))
        new: dict[bytes, Tensor] = {}
        for start in range(0, len(missing), _BATCH):
            part = missing[start : start + _BATCH]
            rows = _finite(in_fixed_shape(features, pictures[part], size))
            new.update(zip([names[i] for i in part], rows, strict=True))
        found = [self._kept[name] if name in self._kept else new[name] for name in names]
        if len(self._kept) + len(new) <= self.MOST:
            self._kept |= new
        return torch.stack(found) if found else torch.zeros(0, model.features.spec.dimension)


_rows = _Rows()


def features_of(model: PriorHead, pictures: Tensor, folder: Path | None = None) -> Tensor:
    """The prior's features of all ``pictures``, (N, d): computed once for a prior and pictures.

    They are kept in this process, and in ``folder`` (a hospital's own, since features tell of
    pictures), where a file that cannot be read is made anew.
    """
    return _features(_digest(model, pictures), model, pictures, folder)


def _features(key: str, model: PriorHead, pictures: Tensor, folder: Path | None) -> Tensor:
    if key in _kept:
        _kept.move_to_end(key)
        return _kept[key]
    path = folder / f"{key}.safetensors" if folder else None
    found = _read(path, len(pictures)) if path and path.exists() else None
    if found is None:
        found = _rows.of(model, pictures)
        if path:
            _keep(path, found)
    _kept[key] = found
    if len(_kept) > _KEPT:
        _kept.popitem(last=False)
    return found


def centred_features(model: PriorHead, pictures: Tensor, folder: Path | None = None) -> Tensor:
    """What the second moment is taken of: features less the released mean, of norm 1."""
    return _mapped_rows(model, features_of(model, pictures, folder), centred=True)


def head_alone(
    model: nn.Module,
    weights: Mapping[str, np.ndarray],
    pictures: Tensor,
    folder: Path | None = None,
) -> tuple[nn.Module, Mapping[str, np.ndarray], Tensor]:
    """(network, its weights, its inputs): of a prior's classifier the head and what it sees.

    The same logits and gradients, without the prior's forward pass for each picture again. Other
    models are returned as they came. ModelError for weights that do not fit.
    """
    if not isinstance(model, PriorHead):
        return model, weights, pictures
    set_weights(model, weights)
    network = model.trained
    own = {name: weights[name] for name in network.state_dict()}
    return network, own, _inputs(model, pictures, folder)


def _inputs(model: PriorHead, pictures: Tensor, folder: Path | None) -> Tensor:
    """What the head sees: mapped once, since mean and whitening stay after the first rounds."""
    key, of = _digest(model, pictures), _hash([("mean", model.mean), ("matrix", model.matrix)])
    if key in _mapped and _mapped[key][0] == of:
        _mapped.move_to_end(key)
        return _mapped[key][1]
    found = _mapped_rows(model, _features(key, model, pictures, folder), centred=False)
    _mapped[key] = of, found
    if len(_mapped) > _KEPT:
        _mapped.popitem(last=False)
    return found


def _mapped_rows(model: PriorHead, features: Tensor, *, centred: bool) -> Tensor:
    """Features less the released mean, or as the head sees them: a row by its picture alone."""

    def function(of: PriorHead) -> Callable[[Tensor], Tensor]:
        return of.map.centred if centred else of.map

    size = _invariant(
        model, (model.features.spec, centred), features.shape[1:], function, size=ROWS["cpu"]
    )
    return _finite(in_fixed_shape(function(model), features, size))


M = TypeVar("M", bound=nn.Module)


def _invariant(
    model: M,
    beside: Hashable,
    shape: Sequence[int],
    of: Callable[[M], Callable[[Tensor], Tensor]] = lambda model: model,
    size: int = _BATCH,
) -> int:
    """How many rows go through a part of ``model`` together: ``size``, or fewer."""

    @cache
    def fresh() -> M:
        return random_copy(model).eval()

    def trial(rows: int, seed: int) -> Iterator[Tensor]:
        with torch.no_grad():
            yield of(fresh())(alike_rows(shape, rows, seed))

    return invariant_rows((structure_of(model), beside, tuple(shape)), [size, 8], trial)


def _finite(features: Tensor) -> Tensor:
    """Rows that are not finite as zeros: a crafted model must not make a round fail on a picture.

    Such a failure would tell, without noise, that there is a picture on which it overflows.
    """
    wrong = ~torch.isfinite(features).all(dim=1, keepdim=True)
    return features.masked_fill(wrong, 0.0)


def _keep(path: Path, features: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    atomic_write(path, save({"features": features.numpy()}), mode=0o600)
    # Each other model that a server sends would leave one more.
    oldest_last = sorted(path.parent.glob("*.safetensors"), key=lambda p: -p.stat().st_mtime_ns)
    for old in oldest_last[_FILES:]:
        old.unlink(missing_ok=True)


def _digest(model: PriorHead, pictures: Tensor) -> str:
    h = hashlib.sha256(_MADE + _prior_hash(model.features))
    h.update(_pictures_hash(pictures))
    return h.hexdigest()


def _prior_hash(features: PriorFeatures) -> bytes:
    """Of its tensors, and of how it looks at a picture, which is in none of them."""
    global _last_prior
    (last, found), state = _last_prior, features.state_dict()
    if list(last) != list(state) or not all(torch.equal(last[n], t) for n, t in state.items()):
        found = _hash(state.items())
        _last_prior = {name: tensor.clone() for name, tensor in state.items()}, found
    return found + repr(features.spec).encode()


def _pictures_hash(pictures: Tensor) -> bytes:
    """Kept for as long as the tensor lives unchanged."""
    kept = _pictures.get(pictures)
    if kept is None or kept[0] != pictures._version:
        kept = _pictures[pictures] = pictures._version, _hash([("pictures", pictures)])
    return kept[1]


def _hash(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    h = hashlib.sha256()
    for name, tensor in tensors:
        h.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        h.update(tensor.detach().contiguous().numpy().data)
    return h.digest()


def _read(path: Path, count: int) -> Tensor | None:
    try:
        found = torch.from_numpy(parse_tensors(path.read_bytes())["features"])
    except (OSError, KeyError, TypeError, ValueError):  # a copy of what can be computed again
        return None
    return found if len(found) == count else None

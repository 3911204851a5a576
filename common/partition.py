"""One data set divided among simulated hospitals."""

from __future__ import annotations

import heapq
import math

import numpy as np
from numpy.typing import ArrayLike

from common.datasets.base import IntArray
from common.datasets.splitting import Units, make_units
from common.errors import PartitionError

SCHEMES = ("iid", "size-skew", "dirichlet")
_TRIES = 200


def hospital_name(index: int) -> str:
    """Return the name of a simulated hospital: ``hospital-00``, ``hospital-01`` and so on."""
    return f"hospital-{index:02d}"


def partition(
    labels: ArrayLike,
    num_hospitals: int,
    scheme: str = "iid",
    *,
    alpha: float = 0.5,
    min_size: int = 1,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> list[IntArray]:
    """Divide the images with these ``labels`` among hospitals; return an index array for each.

    Every index is in exactly one array; each array is sorted, int64, and holds ``min_size``
    images or more; images of one group (patient) stay together; the same arguments give the same
    division. Schemes:

    * ``iid``: shuffled and dealt out evenly.
    * ``size-skew``, the paper's: shuffled (so that a file sorted by class is skewed in size
      only), cut into equal contiguous slices; then hospitals 0 and 1, 2 and 3 ... are pairs, in
      which one, chosen at random, gives a random part, up to half, of its slice to the other.
      Of an odd number the last one is in no pair.
    * ``dirichlet``: each class is divided by proportions drawn from Dirichlet(``alpha``): the
      smaller alpha, the more the hospitals' classes differ. Drawn anew, a bounded number of
      times, until every hospital has ``min_size``.

    Raises :class:`PartitionError` when the arguments are impossible or ``min_size`` cannot be
    honoured.
    """
    label_array, group_array = _arrays(labels, groups)
    total = len(label_array)
    if scheme not in SCHEMES:
        raise PartitionError(
            f"There is no partition scheme {scheme!r}.", f"Choose one of {', '.join(SCHEMES)}."
        )
    if num_hospitals < 1 or min_size < 1:
        raise PartitionError(
            f"{num_hospitals} hospitals with at least {min_size} images each were asked for.",
            "Both must be 1 or more.",
        )
    if scheme == "dirichlet" and not (math.isfinite(alpha) and alpha > 0):
        raise PartitionError(f"alpha is {alpha}.", "Choose a positive number, such as 0.5.")
    if num_hospitals * min_size > total:
        raise PartitionError(
            f"{total} images are too few for {num_hospitals} hospitals with at least "
            f"{min_size} each.",
            "Use fewer hospitals, a smaller minimum, or more images.",
        )
    units = make_units(label_array, group_array)
    rng = np.random.default_rng(seed % 2**64)
    if scheme == "iid":
        owners = _iid(units, num_hospitals, rng)
    elif scheme == "size-skew":
        owners = _size_skew(units, num_hospitals, min_size, rng)
    else:
        owners = _dirichlet(units, num_hospitals, alpha, min_size, rng)
    parts = [units.indices(np.flatnonzero(owners == h)) for h in range(num_hospitals)]
    smallest = min(len(part) for part in parts)
    if smallest < min_size:
        raise _too_small(scheme, smallest, min_size, len(units.members) < total)
    return parts


def _arrays(labels: ArrayLike, groups: ArrayLike | None) -> tuple[IntArray, IntArray | None]:
    label_array = np.asarray(labels)
    group_array = None if groups is None else np.asarray(groups)
    for what, array in (("labels", label_array), ("groups", group_array)):
        if array is None or not array.size:
            continue
        if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) != len(label_array):
            raise PartitionError(
                f"The {what} are {array.dtype} of shape {array.shape}.",
                "Give one integer for each image.",
            )
    if label_array.size and int(label_array.min()) < 0:
        raise PartitionError("A label is negative.", "Number the classes from 0.")
    if not label_array.size:
        raise PartitionError("There are no images to divide.", "Load a data set with images.")
    if group_array is not None and len(group_array) != len(label_array):
        raise PartitionError(
            f"There are {len(group_array)} groups for {len(label_array)} images.",
            "Give one group for each image, or none at all.",
        )
    return label_array.astype(np.int64), None if group_array is None else group_array.astype(
        np.int64
    )


def _too_small(scheme: str, smallest: int, min_size: int, grouped: bool) -> PartitionError:
    remedies = ["Use fewer hospitals or a smaller minimum"]
    if scheme == "dirichlet":
        remedies.append("a larger alpha, or another seed")
    if grouped:
        remedies.append("or smaller groups: a patient's images stay together")
    return PartitionError(
        f"The scheme {scheme} leaves a hospital with {smallest} image(s); "
        f"the minimum is {min_size}.",
        ", ".join(remedies) + ".",
    )


def _iid(units: Units, hospitals: int, rng: np.random.Generator) -> IntArray:
    """Deal shuffled units, the large ones first, each to a hospital with the fewest images."""
    owners = np.empty(len(units.members), dtype=np.int64)
    order = rng.permutation(len(units.members))
    order = order[np.argsort(-units.sizes[order], kind="stable")]
    heap = [(0, hospital) for hospital in range(hospitals)]
    for unit in order:
        held, hospital = heap[0]
        owners[unit] = hospital
        heapq.heapreplace(heap, (held + int(units.sizes[unit]), hospital))
    return owners


def _size_skew(units: Units, hospitals: int, min_size: int, rng: np.random.Generator) -> IntArray:
    """Cut shuffled units into equal slices and move a part of one slice within each pair."""
    order = rng.permutation(len(units.members))
    ends = np.cumsum(units.sizes[order])
    middles = ends - units.sizes[order] / 2
    total = int(ends[-1])
    # A unit is in the slice where its middle lies: boundaries snap to whole groups.
    slices = np.minimum((middles * hospitals / total).astype(np.int64), hospitals - 1)
    owners = np.empty(len(units.members), dtype=np.int64)
    owners[order] = slices
    for first in range(0, hospitals - 1, 2):
        giver = first + int(rng.integers(2))
        mine = order[slices == giver]
        held = int(units.sizes[mine].sum())
        part = int(rng.integers(held // 2 + 1))
        # Moving more than this would break the minimum, which outranks the skew.
        part = min(part, max(held - min_size, 0))
        moved = mine[np.cumsum(units.sizes[mine]) <= part]
        owners[moved] = 2 * first + 1 - giver
    return owners


def _dirichlet(
    units: Units, hospitals: int, alpha: float, min_size: int, rng: np.random.Generator
) -> IntArray:
    """Divide each class by drawn proportions; the best of the draws where none is enough."""
    best, most = np.zeros(len(units.members), dtype=np.int64), -1
    classes = [np.flatnonzero(units.labels == label) for label in np.unique(units.labels)]
    for _ in range(_TRIES):
        owners = np.empty(len(units.members), dtype=np.int64)
        for mine in classes:
            shuffled = rng.permutation(mine)
            ends = np.cumsum(units.sizes[shuffled])
            middles = (ends - units.sizes[shuffled] / 2) / ends[-1]
            edges = np.cumsum(rng.dirichlet(np.full(hospitals, alpha)))[:-1]
            owners[shuffled] = np.searchsorted(edges, middles)
        held = np.bincount(owners, weights=units.sizes, minlength=hospitals)
        if int(held.min()) > most:
            best, most = owners, int(held.min())
        if most >= min_size:
            break
    return best

"""Dividing labelled images without ever separating a group (a patient, identical files)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from common.datasets.base import ImageSet, IntArray
from common.errors import DataError


@dataclass(frozen=True, eq=False)
class Units:
    """What moves as one: the images of one group.

    ``members[u]`` holds the sorted image indices of unit u, ``sizes`` int64 (U,) their numbers,
    ``labels`` int64 (U,) each unit's most frequent class (the lowest number among equals).
    """

    members: list[IntArray]
    sizes: IntArray
    labels: IntArray

    def indices(self, chosen: Sequence[int] | IntArray) -> IntArray:
        """Return the sorted image indices of the ``chosen`` units."""
        if not len(chosen):
            return np.empty(0, dtype=np.int64)
        return np.sort(np.concatenate([self.members[int(u)] for u in chosen]))


def make_units(labels: IntArray, groups: IntArray | None = None) -> Units:
    """Gather images into units by ``groups`` (None: every image alone)."""
    if groups is None:
        groups = np.arange(len(labels), dtype=np.int64)
    _, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable").astype(np.int64)
    members = np.split(order, np.cumsum(sizes)[:-1]) if len(sizes) else []
    pairs, votes = np.unique(np.stack([inverse, labels], axis=1), axis=0, return_counts=True)
    # By unit, then most votes, then lowest class: the first row of a unit is its class.
    ranked = pairs[np.lexsort((pairs[:, 1], -votes, pairs[:, 0]))]
    _, first = np.unique(ranked[:, 0], return_index=True)
    return Units(members, sizes.astype(np.int64), ranked[first, 1].astype(np.int64))


def _quotas(counts: IntArray, fraction: float) -> IntArray:
    """Share ``fraction`` of all images out over the classes by largest remainder.

    A class always keeps one image for training: one that is only validated is never learnt.
    """
    exact = counts * fraction
    quota: IntArray = np.minimum(np.floor(exact), np.maximum(counts - 1, 0)).astype(np.int64)
    missing = round(float(counts.sum()) * fraction) - int(quota.sum())
    for label in np.lexsort((-counts, -(exact - quota))):
        if missing <= 0:
            break
        if quota[label] < counts[label] - 1:
            quota[label] += 1
            missing -= 1
    return quota


def split_train_val(
    images: ImageSet, fraction: float = 0.2, seed: int = 0
) -> tuple[ImageSet, ImageSet]:
    """Divide ``images`` into training and validation, about ``fraction`` of them for the latter.

    Deterministic for a seed; stratified by class as far as the groups allow; a group is never
    on both sides; neither side is empty; the images keep their order. Raises
    :class:`DataError` for a fraction outside (0, 1) or fewer than two groups.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(
            f"The validation fraction is {fraction}.", "Choose one between 0 and 1, such as 0.2."
        )
    units = make_units(images.labels, images.groups)
    if len(units.members) < 2:
        raise DataError(
            f"{len(images)} image(s) in {len(units.members)} group(s) cannot be divided "
            "into training and validation.",
            "Provide images of two patients (groups) or more.",
        )
    rng = np.random.default_rng(seed % 2**64)
    order = rng.permutation(len(units.members))
    counts = np.bincount(units.labels, weights=units.sizes).astype(np.int64)
    left = _quotas(counts, fraction)
    chosen: list[int] = []
    for unit in order:
        label, size = int(units.labels[unit]), int(units.sizes[unit])
        # A unit that overshoots is taken only where that lands nearer to the quota.
        if left[label] > 0 and abs(left[label] - size) < left[label]:
            chosen.append(int(unit))
            left[label] -= size
    if not chosen:
        # Groups too large for any quota: the smallest one makes the validation set.
        chosen = [int(order[np.argmin(units.sizes[order])])]
    taken = np.zeros(len(units.members), dtype=bool)
    taken[chosen] = True
    if taken.all():
        # The mirror image: quotas that swallow every group give the largest one back.
        taken[int(order[np.argmax(units.sizes[order])])] = False
    train = units.indices(np.flatnonzero(~taken))
    val = units.indices(np.flatnonzero(taken))
    return images.subset(train), images.subset(val)


def split_three(
    labels: IntArray,
    groups: IntArray,
    keys: Sequence[str],
    *,
    val: float = 0.1,
    test: float = 0.2,
) -> tuple[IntArray, IntArray, IntArray]:
    """Return sorted indices of (train, val, test), stratified, in the order of ``keys``.

    ``keys`` holds a content digest for each image: the split depends on what the images are, not
    on what they are called or where they lie. A unit's key is the least of its members'. A class
    of three units or more is in every split; one of two is in train and test; a single one is in
    train only.
    """
    units = make_units(labels, groups)
    unit_keys = [min(keys[int(i)] for i in members) for members in units.members]
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in np.unique(units.labels):
        mine = [int(u) for u in np.flatnonzero(units.labels == label)]
        mine.sort(key=lambda u: unit_keys[u])
        n = len(mine)
        n_test = max(round(n * test), int(n >= 2))
        n_val = max(round(n * val), int(n >= 3))
        parts[2].extend(mine[:n_test])
        parts[1].extend(mine[n_test : n_test + n_val])
        parts[0].extend(mine[n_test + n_val :])
    return units.indices(parts[0]), units.indices(parts[1]), units.indices(parts[2])

"""Dividing labelled images: groups (a patient, identical pictures) kept together, or, where
privacy is promised, each privacy unit by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.datasets.base import ImageSet, IntArray
from common.datasets.identity import digest_keys, split_keys
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

    def ranked(self, keys: Sequence[bytes]) -> IntArray:
        """Return all unit numbers by key, which is the least of their images' ``keys``."""
        least = [min(keys[i] for i in images.tolist()) for images in self.members]
        return np.array(sorted(range(len(least)), key=least.__getitem__), dtype=np.int64)


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

    Stratified by class as far as the groups allow; a group, a patient or an identical picture is
    never on both sides; neither side is empty; the images keep their order. The units of a class
    are ranked by a hash of what they are (patient or picture) and of ``seed``, and cut at the
    fraction: the same images always fall the same way, in whatever order and under whatever name
    they come, and further images move only units next to the cut. Where privacy is promised that
    is too many: see :func:`split_independently`.

    Raises :class:`DataError` for a fraction outside (0, 1) or fewer than two units.
    """
    _check_fraction(fraction)
    units = make_units(images.labels, images.linked())
    if len(units.members) < 2:
        raise DataError(
            f"{len(images)} image(s) in {len(units.members)} group(s) cannot be divided "
            "into training and validation.",
            "Provide images of two patients (groups) or more.",
        )
    keys = split_keys(images.digests, images.patients, seed)
    taken = _ranked(units, keys, fraction)
    train = units.indices(np.flatnonzero(~taken))
    val = units.indices(np.flatnonzero(taken))
    return images.subset(train), images.subset(val)


def split_independently(
    images: ImageSet, fraction: float = 0.2, seed: int = 0, *, by_patient: bool = False
) -> tuple[ImageSet, ImageSet]:
    """Divide ``images`` into training and validation, each privacy unit by itself.

    Differential privacy for one unit assumes that a unit more or less changes nothing about the
    others: neither the side on which any of them is nor which of their images are used. So an
    image is on the validation side if a hash of whose it is (of which picture it is, where no
    patient is known) and of ``seed`` is below the ``fraction``, and nothing else has a say. The
    price is that neither the fraction nor the classes are met exactly, and that the validation
    side of a handful of patients may be empty. The images keep their order; their groups are not
    looked at, since a group may join several units.

    What two patients hold both is where the unit matters:

    * ``by_patient`` (the unit is the patient): each row goes with its own patient, so that the
      picture may be on both sides. A copy in validation of a training picture makes the figures
      too good; that either patient's rows depended on the other's would break the promise.
    * otherwise (the unit is the picture): all its rows go where the least of their hashes says.
      They are one unit, on one side.

    Raises :class:`DataError` for a fraction outside (0, 1), or where nothing is left to train on.
    """
    _check_fraction(fraction)
    keys = split_keys(images.digests, images.patients, seed)
    if not by_patient:
        pictures = digest_keys(images.digests)
        least: dict[bytes | None, bytes] = {}
        for picture, key in zip(pictures, keys, strict=True):
            least[picture] = min(key, least.get(picture, key))
        keys = [least[picture] for picture in pictures]
    taken = np.array([int.from_bytes(key[:8], "big") < fraction * 2.0**64 for key in keys], bool)
    if taken.all():
        raise DataError(
            f"All of the {len(images)} image(s) fall on the validation side: none is left to "
            "train on.",
            "Provide images of more patients; on which side one is cannot be chosen.",
        )
    return images.subset(np.flatnonzero(~taken)), images.subset(np.flatnonzero(taken))


def _check_fraction(fraction: float) -> None:
    if not 0.0 < fraction < 1.0:
        raise DataError(
            f"The validation fraction is {fraction}.", "Choose one between 0 and 1, such as 0.2."
        )


def _ranked(units: Units, keys: Sequence[bytes], fraction: float) -> NDArray[np.bool_]:
    order = units.ranked(keys)
    counts = np.bincount(units.labels, weights=units.sizes).astype(np.int64)
    quotas = _quotas(counts, fraction)
    taken = np.zeros(len(units.members), dtype=bool)
    for label, quota in enumerate(quotas.tolist()):
        left = quota
        for unit in order[units.labels[order] == label]:
            size = int(units.sizes[unit])
            if size >= 2 * quota:  # would overshoot by more than it fills, wherever it ranks
                continue
            # A plain cut: filling the rest with smaller units further down would come nearer to
            # the quota, but twice as many images would change sides when one is added.
            if left <= 0 or size >= 2 * left:
                break
            taken[unit] = True
            left -= size
    if not taken.any():
        # Groups too large for any quota: the smallest one makes the validation set.
        taken[order[np.argmin(units.sizes[order])]] = True
    if taken.all():
        # The mirror image: quotas that swallow every group give the largest one back.
        taken[order[np.argmax(units.sizes[order])]] = False
    return taken


def split_three(
    labels: IntArray,
    groups: IntArray,
    keys: Sequence[bytes],
    *,
    val: float = 0.1,
    test: float = 0.2,
) -> tuple[IntArray, IntArray, IntArray]:
    """Return sorted indices of (train, val, test), stratified, in the order of ``keys``.

    ``keys`` holds a key for each image (:func:`~common.datasets.identity.split_keys`): the split
    depends on what the images are, not on what they are called or where they lie. A class
    of three units or more is in every split; one of two is in train and test; a single one is in
    train only.
    """
    units = make_units(labels, groups)
    order = units.ranked(keys)
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in np.unique(units.labels):
        mine = order[units.labels[order] == label].tolist()
        n = len(mine)
        n_test = max(round(n * test), int(n >= 2))
        n_val = max(round(n * val), int(n >= 3))
        parts[2].extend(mine[:n_test])
        parts[1].extend(mine[n_test : n_test + n_val])
        parts[0].extend(mine[n_test + n_val :])
    return units.indices(parts[0]), units.indices(parts[1]), units.indices(parts[2])

"""Whose images an entry of the ledger is about, across versions of a data set.

A budget is of an image (or of a patient), not of a file name or of a folder: an image that is in
two versions of a data set has paid for both. The ledger therefore remembers each data set as the
keyed hashes of its images, and asks, for the data set at hand, in which others each of its images
was. Images that were in the same ones form a *history*; what a data set has spent is what the
worst of its histories has. No threshold of "mostly the same images" is needed, and none can be
played with.

Hashes are keyed by the ledger's own salt: who has an image and an exported ledger, but not the
ledger itself, cannot tell whether the image is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.errors import PrivacyError
from common.privacy.ledger.chain import Chain, Entry
from common.privacy.limits import PATIENT
from common.privacy.plan import PARTS

Digests = NDArray[np.uint8]
"""(N, 16): one digest an image."""

Where = tuple[str, str]
"""(data set, part)."""

_UNKNOWN = bytes(16)


@dataclass(frozen=True, eq=False)
class Subjects:
    """The images of one part of a data set: which they are, and whose (zeros: unknown)."""

    images: Digests
    patients: Digests

    def __post_init__(self) -> None:
        for array in (self.images, self.patients):
            if array.dtype != np.uint8 or array.shape != (len(self.images), 16):
                raise PrivacyError(
                    f"digests are {array.dtype} of shape {array.shape}",
                    "give uint8 (N, 16) for images and for patients",
                )


@dataclass(frozen=True)
class DataSet:
    """A data set as the ledger knows it."""

    fingerprint: str
    images: int
    largest_patient: int
    """Most images of one patient in one part; 1 where no patient is known."""
    overlaps: Mapping[str, int] = field(default_factory=dict)
    """Earlier data set → how many images are in both."""


def remember(chain: Chain, parts: Mapping[str, Subjects]) -> DataSet:
    """The data set of these ``parts`` (train, val), recorded if it is new; inside a transaction.

    Raises PrivacyError for an image that is in both parts: its budget would be spent twice.
    """
    rows = {part: _keyed(chain.meta("salt"), parts[part]) for part in PARTS}
    both = {image for image, _ in rows["train"]} & {image for image, _ in rows["val"]}
    if both:
        raise PrivacyError(
            f"{len(both)} image(s) are in training and in validation",
            "keep copies of an image on one side; a data set of consilium's own split does",
        )
    name = _fingerprint(rows)
    for entry in chain.entries():
        if entry.kind == "dataset" and entry.dataset == name:
            return _data_set(entry)
    mine = {image for part in PARTS for image, _ in rows[part]}
    overlaps: dict[str, int] = {}
    for (dataset, _), images in _images_by_place(chain).items():
        common = len(images & mine)
        if common:
            overlaps[dataset] = overlaps.get(dataset, 0) + common
    sizes: dict[tuple[str, bytes], int] = {}
    for part in PARTS:
        for _, patient in rows[part]:
            if patient != _UNKNOWN:
                sizes[part, patient] = sizes.get((part, patient), 0) + 1
    known = DataSet(
        name, sum(len(r) for r in rows.values()), max(sizes.values(), default=1), overlaps
    )
    chain.add_members((name, part, *row) for part in PARTS for row in rows[part])
    chain.append(Entry(kind="dataset", dataset=name, part="all", note=_note(known)))
    return known


def histories(chain: Chain, dataset: str, unit: str) -> list[frozenset[Where]]:
    """In which data sets and parts the images of ``dataset`` were, itself included.

    One set for each distinct history that no other one contains. Under the unit ``patient`` a
    patient was wherever any of their images was, images that are no longer here included.
    """
    here = chain.members("dataset = ?", [dataset])
    images = chain.members("image IN (SELECT image FROM members WHERE dataset = ?)", [dataset])
    places: dict[bytes, set[Where]] = {}
    for name, part, image, _ in images:
        places.setdefault(image, set()).add((name, part))
    if unit != PATIENT:
        return _largest(places)
    of_patient: dict[bytes, set[Where]] = {}
    for _, _, image, patient in here:
        of_patient.setdefault(patient if patient != _UNKNOWN else image, set()).update(
            places[image]
        )
    for name, part, _, patient in chain.members(
        "patient IN (SELECT patient FROM members WHERE dataset = ?)", [dataset]
    ):
        if patient != _UNKNOWN:
            of_patient.setdefault(patient, set()).add((name, part))
    return _largest(of_patient)


def check_members(chain: Chain) -> None:
    """LedgerError unless every data set's images are those that its entry was made for."""
    found: dict[str, dict[str, list[tuple[bytes, bytes]]]] = {}
    for name, part, image, patient in chain.members("1", []):
        if part not in PARTS:
            raise chain.damaged(f"data set {name} has images in a part '{part}'")
        found.setdefault(name, {p: [] for p in PARTS})[part].append((image, patient))
    for entry in chain.entries():
        if entry.kind == "dataset" and (
            entry.dataset not in found or _fingerprint(found[entry.dataset]) != entry.dataset
        ):
            raise chain.damaged(f"the images of data set {entry.dataset} were changed")


def data_sets(chain: Chain) -> list[DataSet]:
    """All data sets, in the order in which they came."""
    return [_data_set(entry) for entry in chain.entries() if entry.kind == "dataset"]


def _keyed(salt: bytes, subjects: Subjects) -> list[tuple[bytes, bytes]]:
    def key(digest: np.ndarray, person: bytes) -> bytes:
        return hashlib.blake2b(digest.tobytes(), digest_size=16, key=salt, person=person).digest()

    return [
        (key(image, b"image"), key(patient, b"patient") if patient.any() else _UNKNOWN)
        for image, patient in zip(subjects.images, subjects.patients, strict=True)
    ]


def _fingerprint(rows: Mapping[str, list[tuple[bytes, bytes]]]) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        digest.update(part.encode() + len(rows[part]).to_bytes(8, "big"))
        for image, patient in sorted(rows[part]):
            digest.update(image + patient)
    return digest.hexdigest()[:32]


def _images_by_place(chain: Chain) -> dict[Where, set[bytes]]:
    places: dict[Where, set[bytes]] = {}
    for name, part, image, _ in chain.members("1", []):
        places.setdefault((name, part), set()).add(image)
    return places


def _largest(places: Mapping[bytes, set[Where]]) -> list[frozenset[Where]]:
    distinct = sorted({frozenset(p) for p in places.values()}, key=len, reverse=True)
    kept: list[frozenset[Where]] = []
    for history in distinct:
        if not any(history <= other for other in kept):
            kept.append(history)
    return kept


def _note(known: DataSet) -> str:
    return json.dumps(
        {
            "images": known.images,
            "largest_patient": known.largest_patient,
            "overlaps": dict(known.overlaps),
        }
    )


def _data_set(entry: Entry) -> DataSet:
    note = entry.notes()
    return DataSet(entry.dataset, note["images"], note["largest_patient"], note["overlaps"])

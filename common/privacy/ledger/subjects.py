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
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache

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

History = Mapping[Where, int]
"""Where a unit was → with how many images."""

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
    """Most images of one patient; 1 where no patient is known."""
    overlaps: Mapping[str, int] = field(default_factory=dict)
    """Earlier data set → how many images are in both."""


def remember(chain: Chain, parts: Mapping[str, Subjects]) -> DataSet:
    """The data set of these ``parts`` (train, val), recorded if it is new; inside a transaction.

    Raises PrivacyError for an image that is in both parts: its budget would be spent twice.
    """
    salt = chain.meta("salt")
    content = [a.tobytes() for p in PARTS for a in (parts[p].images, parts[p].patients)]
    name, both = _named(salt, *content)
    if both:
        raise PrivacyError(
            f"{both} image(s) are in training and in validation",
            "keep copies of an image on one side; a data set of consilium's own split does",
        )
    for entry in chain.entries():
        if entry.kind == "dataset" and entry.dataset == name:
            return _data_set(entry)
    rows = _rows(salt, *content)
    mine = {image for part in PARTS for image, _ in rows[part]}
    overlaps: dict[str, int] = {}
    for (dataset, _), images in _images_by_place(chain).items():
        common = len(images & mine)
        if common:
            overlaps[dataset] = overlaps.get(dataset, 0) + common
    whose = Counter(p for part in PARTS for _, p in rows[part] if p != _UNKNOWN)
    largest = max(whose.values(), default=1)
    known = DataSet(name, sum(len(r) for r in rows.values()), largest, overlaps)
    chain.add_members((name, part, *row) for part in PARTS for row in rows[part])
    chain.append(Entry(kind="dataset", dataset=name, part="all", note=_note(known)))
    return known


def histories(chain: Chain, dataset: str, unit: str) -> list[History]:
    """Where the units of ``dataset`` were, and with how many images; itself included.

    One history for each that no other one contains. Under the unit ``patient``, a patient was
    wherever any of their images was: those that are no longer here, too, and those of which only
    another version of the data says whose they are.
    """
    here = {image for _, _, image, _ in chain.members("dataset = ?", [dataset])}
    if unit == PATIENT:
        rows = chain.members("1", [])
        unit_of = _patients(rows)
    else:
        rows = chain.members("image IN (SELECT image FROM members WHERE dataset = ?)", [dataset])
        unit_of = {image: image for image in here}
    found: dict[bytes, Counter[Where]] = {unit_of[image]: Counter() for image in here}
    for name, part, image in {row[:3] for row in rows}:
        if (history := found.get(unit_of[image])) is not None:
            history[name, part] += 1
    return _largest(found.values())


def _patients(rows: Iterable[tuple[str, str, bytes, bytes]]) -> dict[bytes, bytes]:
    """Image → one image that stands for all of the same patient, by what any row says."""
    parent: dict[bytes, bytes] = {}

    def root(image: bytes) -> bytes:
        while parent.setdefault(image, image) != image:
            parent[image] = image = parent[parent[image]]
        return image

    first: dict[bytes, bytes] = {}
    for _, _, image, patient in rows:
        other = image if patient == _UNKNOWN else first.setdefault(patient, image)
        parent[root(image)] = root(other)
    return {image: root(image) for image in list(parent)}


def check_members(chain: Chain) -> None:
    """LedgerError unless every data set's images are those that its entry was made for."""
    found: dict[str, dict[str, list[tuple[bytes, bytes]]]] = {}
    try:
        for name, part, image, patient in chain.members("1", []):
            sides = found.setdefault(name, {p: [] for p in PARTS})
            if type(image) is not bytes or type(patient) is not bytes:
                raise TypeError("a digest is no bytes")
            sides[part].append((image, patient))
        names = {name: _fingerprint(rows) for name, rows in found.items()}
    except (KeyError, TypeError, ValueError, sqlite3.Error) as error:
        raise chain.damaged(f"the images of a data set were changed ({error})") from None
    known = [entry.dataset for entry in chain.entries() if entry.kind == "dataset"]
    wrong = [name for name in {*known, *names} if names.get(name) != name or name not in known]
    if wrong:
        raise chain.damaged(f"the images of data set {wrong[0]} were changed")


def data_sets(chain: Chain) -> list[DataSet]:
    """All data sets, in the order in which they came."""
    return [_data_set(entry) for entry in chain.entries() if entry.kind == "dataset"]


@lru_cache(maxsize=64)
def _named(salt: bytes, *content: bytes) -> tuple[str, int]:
    """The fingerprint of :func:`_rows`, and how many images are in both parts.

    Kept, since a hospital asks with the same images for every message of a run.
    """
    rows = _rows(salt, *content)
    both = {image for image, _ in rows["train"]} & {image for image, _ in rows["val"]}
    return _fingerprint(rows), len(both)


def _rows(salt: bytes, *content: bytes) -> dict[str, list[tuple[bytes, bytes]]]:
    """(image, patient) of each part, keyed; ``content``: the digests of images, of patients, …"""

    def key(digest: bytes, person: bytes) -> bytes:
        return hashlib.blake2b(digest, digest_size=16, key=salt, person=person).digest()

    def each(digests: bytes) -> list[bytes]:
        return [digests[i : i + 16] for i in range(0, len(digests), 16)]

    return {
        part: [
            (key(image, b"image"), _UNKNOWN if patient == _UNKNOWN else key(patient, b"patient"))
            for image, patient in zip(each(images), each(patients), strict=True)
        ]
        for part, images, patients in zip(PARTS, content[::2], content[1::2], strict=True)
    }


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


def _largest(histories: Iterable[Counter[Where]]) -> list[History]:
    distinct = {tuple(sorted(h.items())): h for h in histories}
    kept: list[Counter[Where]] = []
    for history in sorted(distinct.values(), key=Counter.total, reverse=True):
        if not any(history <= other for other in kept):
            kept.append(history)
    return list(kept)


def _data_set(entry: Entry) -> DataSet:
    note = entry.notes()
    return DataSet(entry.dataset, note["images"], note["largest_patient"], note["overlaps"])


def _note(known: DataSet) -> str:
    note = asdict(known)
    del note["fingerprint"]
    return json.dumps(note)

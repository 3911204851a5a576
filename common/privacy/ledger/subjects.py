"""Whose images an entry of the ledger is about, across versions of a data set.

A budget is of an image (or of a patient), not of a file name or of a folder: an image that is in
two versions of a data set has paid for both. The ledger therefore remembers each data set as the
keyed hashes of its images, and asks, for the data set at hand, in which others each of its images
was. Images that were in the same ones form a *history*; what a data set has spent is what the
worst of its histories has. No threshold of "mostly the same images" is needed, and none can be
played with.

Sides are part of a history and not of who it is about: an image, or a patient, that changes sides
(an update of consilium divides otherwise, a table is corrected) has paid for both. A picture that
two patients hold in one data set is two patients' business: each pays for their own rows, and for
what was done with the picture while they did not hold it.

Hashes are keyed by the ledger's own salt: who has an image and an exported ledger, but not the
ledger itself, cannot tell whether the image is in it.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from common.errors import PrivacyError
from common.privacy.ledger.chain import Chain, Entry
from common.privacy.limits import IMAGE, PATIENT
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


def remember(chain: Chain, parts: Mapping[str, Subjects], unit: str | None = IMAGE) -> DataSet:
    """The data set of these ``parts`` (train, val), recorded if it is new; inside a transaction.

    Raises PrivacyError for an image that is in both parts: its budget would be spent twice. Where
    the ``unit`` is the patient, two patients may hold the same picture on two sides: each of them
    is on one side only. None: nothing is promised to any unit, nothing is refused.
    """
    salt = chain.meta("salt")
    content = [a.tobytes() for p in PARTS for a in (parts[p].images, parts[p].patients)]
    name, both, torn = _named(salt, *content)
    if wrong := {IMAGE: both, PATIENT: torn}.get(unit or "", 0):
        raise PrivacyError(
            f"{wrong} image(s) are in training and in validation",
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
    if unit == PATIENT:
        return _largest(_of_patients(dataset, chain.members("1", [])))
    rows = chain.members("image IN (SELECT image FROM members WHERE dataset = ?)", [dataset])
    found: dict[bytes, Counter[Where]] = {}
    for name, part, image in {row[:3] for row in rows}:
        found.setdefault(image, Counter())[name, part] += 1
    return _largest(found.values())


def _of_patients(
    dataset: str, rows: Sequence[tuple[str, str, bytes, bytes]]
) -> list[Counter[Where]]:
    """The history of each patient of ``dataset``, and of each image of which no row says whose.

    Whose an image is, any version may say. Versions that name different patients mean the same
    person under a new name, unless one version names both: then they are two, who share it.
    """
    named: dict[bytes, dict[str, set[bytes]]] = {}
    for name, _, image, patient in rows:
        whose = named.setdefault(image, {}).setdefault(name, set())
        if patient != _UNKNOWN:
            whose.add(patient)
    shared = {image for image, sets in named.items() if any(len(w) > 1 for w in sets.values())}
    parent: dict[bytes, bytes] = {}

    def root(key: bytes) -> bytes:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    # Patients' keys and images' keys are hashes of different kinds: no two are the same.
    for _, _, image, patient in rows:
        if patient != _UNKNOWN and image not in shared:
            parent[root(image)] = root(patient)
    holders: dict[bytes, dict[bytes, set[bytes]]] = {}  # image → who → the names it had there
    here: dict[bytes, set[bytes]] = {}  # who → the names it has in this data set
    for name, _, image, patient in rows:
        who = root(image if patient == _UNKNOWN else patient)
        holders.setdefault(image, {}).setdefault(who, set()).add(patient)
        if name == dataset:
            here.setdefault(who, set()).add(patient)
    used: dict[bytes, set[tuple[str, str, bytes]]] = {who: set() for who in here}
    for name, part, image, patient in rows:
        mine = root(image if patient == _UNKNOWN else patient)
        for who in holders[image].keys() & here.keys():
            # A row of another patient's is theirs, if this one has a row of their own there: under
            # the name that they have now, since that two names are one person is a guess only.
            names = holders[image][who] & here[who] or holders[image][who]
            if who == mine or patient == _UNKNOWN or names - named[image][name]:
                used[who].add((name, part, image))
    return [Counter((name, part) for name, part, _ in places) for places in used.values()]


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
def _named(salt: bytes, *content: bytes) -> tuple[str, int, int]:
    """The fingerprint of :func:`_rows`; how many images are in both parts, and how many of them
    not only by patients who are in one part each.

    Kept, since a hospital asks with the same images for every message of a run.
    """
    rows = _rows(salt, *content)
    both = {image for image, _ in rows["train"]} & {image for image, _ in rows["val"]}
    one_sided = {p for _, p in rows["train"]} ^ {p for _, p in rows["val"]}
    torn = {
        image
        for part in PARTS
        for image, patient in rows[part]
        if image in both and (patient == _UNKNOWN or patient not in one_sided)
    }
    return _fingerprint(rows), len(both), len(torn)


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

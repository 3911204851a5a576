"""The pictures, read as the node reads them: classes, counts, sides, patients."""

from __future__ import annotations

import difflib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.datasets import ImageSet, UInt8Array, load_folder_as_one, split_independently
from common.datasets.listing import Listing, list_folders
from common.datasets.manifest import find_manifest, list_manifest
from common.datasets.pictures import read_picture
from common.errors import DataError
from common.privacy.limits import PATIENT
from common.simulation import VALIDATION_FRACTION
from deploy.doctor.case import Case
from deploy.doctor.result import Finding, NotChecked, fail, good, warn

FEWEST = 2
"""Pictures that training and validation have at least, each."""
_NAMED = 3


def classes(case: Case) -> Finding:
    """Every folder, or label of the manifest, is one of the federation's classes."""
    listing = _listed(case)
    theirs = case.federation.description.classes
    own, _ = case.file.own_classes(theirs)
    if unknown := [name for name in listing.classes if name not in own]:
        what = "label(s) of the manifest" if listing.sha256 else "folder(s)"
        entries = "; ".join(f"{_quoted(name)} = {_guess(name, theirs)}" for name in unknown)
        return fail(
            f"{len(unknown)} {what} in {case.file.folder} that are no class: "
            f"{', '.join(unknown[:10])}",
            f"add to [classes] in {case.folder.file}: {entries}. The federation's classes are: "
            f"{', '.join(theirs)}. Or take those pictures out of the folder",
        )
    mapped = sum(name in case.file.classes for name in listing.classes)
    told = f", {mapped} by [classes] in hospital.toml" if mapped else ""
    return good(f"{len(listing.classes)} own name(s), all of the federation's classes{told}")


def pictures(case: Case) -> Finding:
    """Every picture can be read; how many there are of each class."""
    told = case.federation.description
    own, numbers = case.file.own_classes(told.classes)
    try:
        images, _, _ = load_folder_as_one(
            case.file.folder,
            own,
            image_size=told.image_size,
            channels=told.channels,
            crop=case.file.crop,
            manifest=case.file.manifest or "",
        )
    except DataError:
        if bad := _unreadable(case):
            some = "; ".join(error.what.rstrip(".") for error in bad[:_NAMED])
            more = f" (and {len(bad) - _NAMED} more)" if len(bad) > _NAMED else ""
            return fail(f"{len(bad)} picture(s) cannot be used: {some}{more}", bad[0].remedy)
        raise
    labels = np.array(numbers, dtype=np.int64)[images.labels]
    case.images = replace(images, labels=labels)
    counts = case.images.class_counts(len(told.classes)).tolist()
    by_class = ", ".join(f"{n} {c}" for n, c in zip(told.classes, counts, strict=True))
    copies = len(images) - len(np.unique(images.digests, axis=0))
    repeated = f"; {copies} of them repeat another one (one picture, one unit)" if copies else ""
    found = f"{len(images)}: {by_class}{repeated}"
    if empty := [n for n, c in zip(told.classes, counts, strict=True) if not c]:
        return warn(
            f"{found}; none of: {', '.join(empty)}",
            "if this hospital has pictures of these classes, put them into folders of those names, "
            "or map your own names in hospital.toml; else nothing needs to be done",
        )
    return good(found)


def split(case: Case) -> Finding:
    """The hospital's own split leaves enough pictures for training and for validation."""
    train, val = split_independently(_images(case), VALIDATION_FRACTION)
    found = f"{len(train)} for training, {len(val)} for validation"
    if min(len(train), len(val)) < FEWEST:
        return fail(
            f"{found}: fewer than {FEWEST} on one side",
            "add pictures; those of one patient always stay on one side, which cannot be chosen",
        )
    return good(found)


def patients(case: Case) -> Finding:
    """Whose each picture is, is known where the policy promises privacy to patients."""
    images, unit = _images(case), case.policy.privacy.unit
    known = int(images.patients.any(axis=1).sum())
    found = f"known for {known} of {len(images)} pictures; the policy's privacy unit is the {unit}"
    if unit == PATIENT and known < len(images):
        return fail(
            found,
            "name the patient of every picture (a column patient in manifest.csv, or one folder a "
            f'patient inside each class folder), or set unit = "image" in {case.folder.policy}',
        )
    whose = np.unique(np.concatenate([images.digests, images.patients], axis=1), axis=0)
    if shared := len(whose) - len(np.unique(images.digests, axis=0)):
        return warn(
            f"{found}; {shared} picture(s) are another patient's too{_torn(images, unit)}",
            "name one patient for each picture: what is promised to a patient is about the rows "
            "under their own name, and says nothing of a copy under another's",
        )
    return good(found)


def delta(case: Case) -> Finding:
    """The policy's δ is below one over the number of privacy units."""
    images, privacy = _images(case), case.policy.privacy
    if privacy.unit == PATIENT:
        count = int(images.units().max()) + 1 if images.has_patients else len(images)
    else:
        count = len(np.unique(images.digests, axis=0))
    return judge_delta(privacy.total_delta, count, privacy.unit, case.folder.policy)


def judge_delta(value: float, count: int, unit: str, where: Path) -> Finding:
    """WARN unless δ < 1/n: a mechanism may with probability δ give one of n units away."""
    if value * count >= 1:
        return warn(
            f"δ = {value:g} is not below 1/{count} ({1 / count:.2g}), one over the number of "
            f"{unit}s",
            f"set total-delta in {where} below {1 / count:.2g}, better ten times below",
        )
    return good(f"δ = {value:g}, below 1/{count} ({unit}s)")


def _torn(images: ImageSet, unit: str) -> str:
    """How many pictures train with one patient and validate with another."""
    train, val = split_independently(images, VALIDATION_FRACTION, by_patient=unit == PATIENT)
    both = len(_rows(train.digests) & _rows(val.digests))
    return f", {both} of them on both sides (validation figures too good)" if both else ""


def _rows(digests: UInt8Array) -> set[bytes]:
    return {row.tobytes() for row in digests}


def _images(case: Case) -> ImageSet:
    if case.images is None:
        raise NotChecked("pictures")
    return case.images


def _listed(case: Case) -> Listing:
    """What is in the folder, under the hospital's own names."""
    root = case.file.folder
    if not root.is_dir():
        raise DataError(
            f"there is no folder {root} with pictures",
            f"say in {case.folder.file} where they are ([data] folder), and let this user read it",
        )
    if table := find_manifest(root, case.file.manifest or ""):
        return list_manifest(root, table, splits=False)
    return list_folders(root, splits=False)


def _unreadable(case: Case) -> list[DataError]:
    found = []
    for file in _listed(case).files:
        try:
            read_picture(file.path, case.federation.description.image_size, case.file.crop)
        except DataError as error:
            found.append(error)
    return found


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _guess(name: str, theirs: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name.lower(), theirs, n=1)
    return _quoted(near[0]) if near else '"(its class)"'

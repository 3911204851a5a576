"""Whose budget an entry is charged to: against a model that follows each image by hand."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import PrivacyError
from common.privacy.accounting import epsilon_of, group_event
from common.privacy.filter import epsilon_at, renyi
from common.privacy.ledger import Chain, Entry, Ledger, Subjects
from common.privacy.ledger.ledger import DEFAULT_ORDER
from common.privacy.ledger.runs import COUNT, TRAINING, Use, reserved_use
from common.privacy.ledger.subjects import histories, remember
from common.privacy.limits import IMAGE, PATIENT, PrivacyLimits
from tests.common.privacy.ledger.building import data, plan, promise, subjects

WHOSE = {1: 1, 2: 1, 3: 1, 4: 2, 5: 2, 6: 3}
"""Six images of three patients. A data set may know this or not."""


@dataclass(frozen=True)
class Version:
    """One version of a data set: the sides of its images, and of which it says whose they are."""

    sides: Mapping[int, str]
    named: frozenset[int]

    def parts(self) -> dict[str, Subjects]:
        train, val = ([i for i, s in self.sides.items() if s == side] for side in ("train", "val"))
        return data(train, val, {i: WHOSE[i] for i in self.named})


versions = st.builds(
    Version,
    st.dictionaries(st.sampled_from(sorted(WHOSE)), st.sampled_from(("train", "val")), min_size=1),
    st.frozensets(st.sampled_from(sorted(WHOSE))),
)


def remembered(chain: Chain, known: list[Version]) -> list[str]:
    with chain.transaction():
        return [remember(chain, version.parts()).fingerprint for version in known]


def owner(image: int, known: list[Version]) -> int | None:
    """Whose an image is, if any version that has it says so."""
    told = any(image in v.sides and image in v.named for v in known)
    return WHOSE[image] if told else None


def images_of(image: int, unit: str, known: list[Version]) -> set[int]:
    """All images that share the unit of ``image``, as far as the versions tell."""
    mine = owner(image, known) if unit == PATIENT else None
    if mine is None:
        return {image}
    return {i for v in known for i in v.sides if owner(i, known) == mine}


@settings(max_examples=150, deadline=None)
@given(known=st.lists(versions, min_size=1, max_size=4), unit=st.sampled_from((IMAGE, PATIENT)))
def test_histories_are_where_each_image_or_patient_was(known: list[Version], unit: str) -> None:
    """Every unit of the data set at hand has a history that holds all of its places."""
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain(Path(folder) / "ledger.sqlite")
        names = remembered(chain, known)
        found = histories(chain, names[-1], unit)
        chain.close()
    expected = [
        frozenset(
            (name, v.sides[i])
            for name, v in zip(names, known, strict=True)
            for i in images_of(image, unit, known)
            if i in v.sides
        )
        for image in known[-1].sides
    ]
    for places in expected:
        assert any(places <= history.keys() for history in found)
    for history in found:  # and none pays for what it was not in
        assert any(history.keys() <= places for places in expected)


rows = st.lists(
    st.tuples(st.sampled_from((1, 2, 3, 4)), st.sampled_from((1, 2, 3))), min_size=1, max_size=6
)
"""(image, patient): patients hold each other's pictures, and change their names."""


@settings(max_examples=100, deadline=None)
@given(versions=st.lists(rows, min_size=1, max_size=4), sides=st.lists(st.integers(0, 7)))
@example(versions=[[(1, 1), (1, 2), (3, 1)], [(1, 3), (3, 3)]], sides=[2])
def test_whatever_patients_share_each_has_a_history_of_all_that_is_theirs(
    versions: list[list[tuple[int, int]]], sides: list[int]
) -> None:
    """Their own rows in every version; their pictures' where they do not hold them themselves."""
    side = [  # of each patient, in each version
        {p: "val" if n < len(sides) and sides[n] >> p & 1 else "train" for p in (1, 2, 3)}
        for n in range(len(versions))
    ]
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain(Path(folder) / "ledger.sqlite")
        names = []
        for n, version in enumerate(versions):
            parts = {}
            for part in ("train", "val"):
                each = [subjects([i], {i: p}) for i, p in version if side[n][p] == part]
                nothing = np.zeros((0, 16), np.uint8)
                parts[part] = Subjects(
                    np.concatenate([nothing, *(s.images for s in each)]),
                    np.concatenate([nothing, *(s.patients for s in each)]),
                )
            with chain.transaction():
                names.append(remember(chain, parts, PATIENT).fingerprint)
        found = histories(chain, names[-1], PATIENT)
        chain.close()
    for patient in {p for _, p in versions[-1]}:
        mine = {i for version in versions for i, p in version if p == patient}
        places = {
            (name, side[n][p])
            for n, (name, version) in enumerate(zip(names, versions, strict=True))
            for i, p in version
            if p == patient or (i in mine and (i, patient) not in version)
        }
        assert any(places <= history.keys() for history in found)


uses = st.tuples(
    st.sampled_from(("a", "b", "c")),
    st.integers(0, 3),
    st.sampled_from(("train", "val", "all")),
    st.sampled_from((IMAGE, PATIENT)),
    st.sampled_from((3.0, 8.0, math.inf)),
)
"""(run, version, part, unit, σ); infinite: nothing but a count of pure ε = 0.1."""

LIMITS = {unit: PrivacyLimits(unit=unit, total_delta=1e-4) for unit in (IMAGE, PATIENT)}


def reserved(name: str, run: str, part: str, unit: str, sigma: float) -> Entry:
    entry = Entry(kind="reserve", run=run, dataset=name, part=part, unit=unit)
    if math.isinf(sigma):
        return dataclasses.replace(entry, mechanism=COUNT, pure_epsilon=0.1)
    return dataclasses.replace(
        entry, mechanism=TRAINING, noise_multiplier=sigma, sampling_rate=1.0, steps=2
    )


THREE_IMAGES_WERE_NAMED_LATER = [
    Version({1: "train", 2: "train", 3: "train"}, frozenset()),
    Version({1: "train", 2: "train", 3: "train"}, frozenset({1, 2, 3})),
]
DELETED_AFTER_IT_WAS_NAMED = [
    Version({1: "train"}, frozenset()),
    Version({1: "train"}, frozenset({1})),
    Version({2: "train"}, frozenset({2})),
]


def by_hand(mine: list[tuple[Use, int]], delta: float) -> float:
    """ε of uses, each of a group of so many images.

    One run's steps: as both accountants say, and counts added. Several runs': the filter's, and
    counts left away, of which it asks for less than their sum.
    """
    events = [group_event(u.event, n) for u, n in mine if u.event is not None]
    if len({u.run for u, _ in mine if u.event is not None}) < 2:
        return epsilon_of(events, delta, pure=sum(u.pure * n for u, n in mine)).value
    return epsilon_at(sum(renyi([event], DEFAULT_ORDER) for event in events), DEFAULT_ORDER, delta)


@settings(max_examples=40, deadline=None)
@example(known=THREE_IMAGES_WERE_NAMED_LATER, done=[("a", 0, "train", IMAGE, 3.0)], unit=PATIENT)
@example(known=DELETED_AFTER_IT_WAS_NAMED, done=[("a", 0, "train", PATIENT, 3.0)], unit=PATIENT)
@given(
    known=st.lists(versions, min_size=1, max_size=4),
    done=st.lists(uses, min_size=1, max_size=5),
    unit=st.sampled_from((IMAGE, PATIENT)),
)
def test_the_total_is_never_less_than_what_the_worst_off_image_or_patient_has_spent(
    known: list[Version], done: list[tuple[str, int, str, str, float]], unit: str
) -> None:
    """Composed by hand for each image, with as many images of the patient as were really used."""
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "l.sqlite") as ledger:
        names = remembered(ledger.chain, known)
        with ledger.chain.transaction():
            for run, at, part, what, sigma in done:
                ledger.chain.append(reserved(names[at % len(names)], run, part, what, sigma))
        entries = [reserved_use(e) for e in ledger.chain.entries() if e.kind == "reserve"]
        total = ledger.total(names[-1], LIMITS[unit])
    for image in known[-1].sides:
        mine = images_of(image, unit, known)
        touched = []
        for use in entries:
            sides = known[names.index(use.dataset)].sides
            hit = sum(i in sides and use.part in (sides[i], "all") for i in mine)
            if hit:
                touched.append((use, hit if unit == PATIENT != use.unit else 1))
        assert total.epsilon >= by_hand(touched, total.delta) * (1 - 1e-9)


def test_the_same_images_are_the_same_data_set_in_any_order(tmp_path: Path) -> None:
    with Ledger(tmp_path / "l.sqlite") as ledger, ledger.chain.transaction():
        first = remember(ledger.chain, data([1, 2, 3], [4, 5], WHOSE))
        again = remember(ledger.chain, data([3, 1, 2], [5, 4], WHOSE))
        assert first == again
        assert len(ledger.chain.members("1", [])) == 5
        for other in (
            data([1, 2], [4, 5], WHOSE),
            data([1, 2, 3, 4], [5], WHOSE),
            data([1, 2, 3], [4, 5]),
            data([4, 5], [1, 2, 3], WHOSE),
        ):
            assert remember(ledger.chain, other).fingerprint != first.fingerprint


def test_an_exported_ledger_does_not_tell_which_images_it_is_about(tmp_path: Path) -> None:
    """The same images in two hospitals' ledgers have nothing in common."""
    stored = []
    for name in ("one.sqlite", "other.sqlite"):
        with Ledger(tmp_path / name) as ledger:
            ledger.admit("a", promise(), data([1, 2], [4], WHOSE), LIMITS[IMAGE], plan)
            rows = ledger.chain.members("1", [])
            stored.append({cell for row in rows for cell in (row[0], row[2], row[3])})
            digests = {row.tobytes() for row in subjects([1, 2, 4], WHOSE).images}
            assert not digests & stored[-1]
    assert not stored[0] & stored[1]


@pytest.mark.parametrize(
    ("images", "patients"),
    [
        (np.zeros((2, 16), np.uint8), np.zeros((1, 16), np.uint8)),
        (np.zeros((2, 15), np.uint8), np.zeros((2, 16), np.uint8)),
        (np.zeros((2, 16), np.int64), np.zeros((2, 16), np.uint8)),
    ],
)
def test_digests_of_another_form_are_refused(images: np.ndarray, patients: np.ndarray) -> None:
    with pytest.raises(PrivacyError, match="digests"):
        Subjects(images, patients)

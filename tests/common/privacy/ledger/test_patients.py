"""What a hospital's total means where patients are protected: all images of one pay together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from common.errors import PrivacyError
from common.privacy.accounting import Event, epsilon_of
from common.privacy.ledger import Ledger, Subjects
from common.privacy.limits import PATIENT
from tests.common.privacy.ledger.building import (
    COUNT,
    DELTA,
    LIMITS,
    data,
    limits,
    plan,
    promise,
    refuses,
    subjects,
    use_up,
)

IMAGES = data(range(8), (8, 9))


BY_PATIENT = dataclasses.replace(LIMITS, unit=PATIENT, total_epsilon=1e4)


def test_a_patient_pays_for_an_old_image_that_was_deleted(path: Path) -> None:
    whose = {1: 1, 2: 1, 3: 3, 9: 9}
    asked = promise(unit=PATIENT)
    with Ledger(path) as ledger:
        for run, parts in (("a", data([1, 3], [9], whose)), ("b", data([2, 3], [9], whose))):
            ledger.admit(run, asked, parts, BY_PATIENT, lambda: plan(asked, sigma=2.0))
            use_up(ledger, run)
        alone = data([2], [9], whose)
        third = ledger.admit("c", asked, alone, BY_PATIENT, lambda: plan(asked))
        total = ledger.total(third.dataset, BY_PATIENT)
        assert total.runs == ("a", "b", "c")
        by_image = dataclasses.replace(BY_PATIENT, unit="image")
        assert ledger.total(third.dataset, by_image).epsilon < total.epsilon


def test_what_was_done_for_single_images_counts_for_all_of_a_patients(path: Path) -> None:
    """Three images of one patient under image-level DP: a group of three."""
    whose = dict.fromkeys((1, 2, 3), 1) | {4: 4, 9: 9}
    with Ledger(path) as ledger:
        state = ledger.admit("a", promise(), data([1, 2, 3, 4], [9], whose), LIMITS, plan)
        use_up(ledger, "a")
        patient = ledger.total(state.dataset, BY_PATIENT).epsilon
        three = epsilon_of([Event(4.0 / 3, 1.0, 3)], DELTA, pure=3 * COUNT)
        assert patient == pytest.approx(three.value)
        assert ledger.total(state.dataset, LIMITS).epsilon < patient / 3


def test_a_patient_known_only_later_pays_for_all_of_their_images(path: Path) -> None:
    """The first run knew no patients; the manifest that came after it says: ten of one."""
    with Ledger(path) as ledger:
        ledger.admit("a", promise(), data(range(10), [90]), LIMITS, plan)
        use_up(ledger, "a")
        asked = promise(unit=PATIENT)
        whose = dict.fromkeys(range(10), 1) | {90: 2}
        state = ledger.admit(
            "b", asked, data(range(10), [90], whose), BY_PATIENT, lambda: plan(asked)
        )
        ten = epsilon_of([Event(4.0 / 10, 1.0, 3)], DELTA).value
        assert ledger.total(state.dataset, BY_PATIENT).epsilon >= ten


def test_a_patient_on_both_sides_pays_for_the_images_of_both(path: Path) -> None:
    whose = {1: 1, 2: 1, 3: 1, 4: 4}
    with Ledger(path) as ledger:
        state = ledger.admit("a", promise(), data([1, 2], [3, 4], whose), LIMITS, plan)
        # Both numbers of images change when the patient goes: by two and by one.
        assert ledger.total(state.dataset, BY_PATIENT).epsilon >= 3 * COUNT - 1e-12


def test_a_promise_for_images_is_not_enough_where_patients_are_protected(path: Path) -> None:
    with Ledger(path) as ledger:
        refuses(
            ledger,
            PrivacyError,
            lambda: ledger.admit("a", promise(), IMAGES, limits(unit=PATIENT), plan),
        )


def one_side_each(sides: dict[int, str], pictures: dict[int, list[int]]) -> dict[str, Subjects]:
    """Patients' pictures, each patient on a side: what two hold may be on both."""
    parts = {}
    for side in ("train", "val"):
        rows = [(i, p) for p, images in pictures.items() if sides[p] == side for i in images]
        found = [subjects([i], {i: p}) for i, p in rows]
        parts[side] = Subjects(
            np.concatenate([np.zeros((0, 16), np.uint8), *(f.images for f in found)]),
            np.concatenate([np.zeros((0, 16), np.uint8), *(f.patients for f in found)]),
        )
    return parts


def test_what_two_patients_hold_is_on_both_sides_and_each_pays_for_their_own(path: Path) -> None:
    """A run may spend the whole total on either side: nobody is on both."""
    asked = promise(unit=PATIENT)
    parts = one_side_each({1: "train", 2: "val", 3: "val"}, {1: [1, 2], 2: [2, 3], 3: [9]})
    made = plan(asked, sigma=2.0, validation_sigma=2.3)
    trained = epsilon_of([Event(2.0, 1.0, 3)], DELTA, pure=COUNT).value
    validated = epsilon_of([Event(2.3, 1.0, 4)], DELTA, pure=COUNT).value
    tight = dataclasses.replace(BY_PATIENT, total_epsilon=max(trained, validated) * 1.001)
    with Ledger(path) as ledger:
        state = ledger.admit("a", asked, parts, tight, lambda: made)
        use_up(ledger, "a")
        assert ledger.total(state.dataset, tight).epsilon == pytest.approx(max(trained, validated))


def test_a_patient_is_refused_on_both_sides_with_one_picture(path: Path) -> None:
    asked = promise(unit=PATIENT)
    torn = one_side_each({1: "train", 2: "val"}, {1: [1, 2], 2: [2]})
    same = {side: Subjects(s.images, np.full_like(s.patients, 7)) for side, s in torn.items()}
    nobody = {side: Subjects(s.images, np.zeros_like(s.patients)) for side, s in torn.items()}
    with Ledger(path) as ledger:
        for parts in (same, nobody):
            refuses(
                ledger,
                PrivacyError,
                lambda: ledger.admit("a", asked, parts, BY_PATIENT, lambda: plan(asked)),  # noqa: B023
            )
        # Where images are promised something, it is one image on both sides, whoever holds it.
        refuses(ledger, PrivacyError, lambda: ledger.admit("a", promise(), torn, LIMITS, plan))


def test_a_patient_whom_an_update_puts_on_the_other_side_has_no_second_budget(path: Path) -> None:
    """Before: joined with whoever shares a picture. After: by themselves. The ledger is one."""
    asked = promise(unit=PATIENT)
    pictures = {1: [1, 2], 2: [2, 3], 3: [9]}
    old = one_side_each({1: "train", 2: "train", 3: "val"}, pictures)
    new = one_side_each({1: "val", 2: "train", 3: "val"}, pictures)
    made = plan(asked, sigma=2.0, validation_sigma=2.3)
    with Ledger(path) as ledger:
        first = ledger.admit("a", asked, old, BY_PATIENT, lambda: made)
        use_up(ledger, "a")
        one = ledger.total(first.dataset, BY_PATIENT).epsilon
        full = dataclasses.replace(BY_PATIENT, total_epsilon=one * 1.01)
        refuses(ledger, PrivacyError, lambda: ledger.admit("b", asked, new, full, lambda: made))
        second = ledger.admit("b", asked, new, BY_PATIENT, lambda: made)
        use_up(ledger, "b")
        both = [Event(2.0, 1.0, 3), Event(2.3, 1.0, 4)]
        assert ledger.total(second.dataset, BY_PATIENT).epsilon >= epsilon_of(both, DELTA).value


def test_a_new_name_and_a_copy_under_the_old_one_are_no_second_budget(path: Path) -> None:
    """Patient 1 becomes 5, and a copy under the old name says that they are two."""
    asked = promise(unit=PATIENT)
    one_event = [Event(2.0, 1.0, 3)]
    with Ledger(path) as ledger:
        for run, pictures in (("a", {1: [1, 2]}), ("b", {1: [1, 2], 5: [1, 2]})):
            parts = one_side_each(
                dict.fromkeys(pictures, "train") | {9: "val"}, pictures | {9: [9]}
            )
            state = ledger.admit(run, asked, parts, BY_PATIENT, lambda: plan(asked, sigma=2.0))
            use_up(ledger, run)
        renamed = one_side_each({5: "train", 9: "val"}, {5: [1, 2], 9: [9]})
        state = ledger.admit("c", asked, renamed, BY_PATIENT, lambda: plan(asked, sigma=2.0))
        spent = ledger.total(state.dataset, BY_PATIENT)
        assert {"a", "b"} <= set(spent.runs)
        assert spent.epsilon >= epsilon_of(one_event * 2, DELTA).value

"""What a hospital's total means where patients are protected: all images of one pay together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from common.errors import PrivacyError
from common.privacy.accounting import Event, epsilon_of
from common.privacy.ledger import Ledger
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

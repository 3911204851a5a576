"""Who may ask for a kit."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.secagg.keys import Identity
from deploy.runtime.kit_request import (
    HOSPITAL,
    SIGNATURE,
    TIME,
    WINDOW,
    KitRefused,
    headers_for,
    verify,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
ONE, OTHER = Identity(bytes(32)), Identity(bytes([1]) * 32)
MEMBERS = {"one": ONE.public, "other": OTHER.public}
GOOD = headers_for("blood", "one", ONE, NOW)


def refused(headers: dict[str, str], federation: str = "blood", now: datetime = NOW) -> str:
    with pytest.raises(KitRefused) as error:
        verify(headers, federation, MEMBERS, now)
    return str(error.value)


@given(st.integers(-WINDOW, WINDOW))
def test_a_members_own_signature_is_taken_within_the_window(seconds: int) -> None:
    assert verify(GOOD, "blood", MEMBERS, NOW + timedelta(seconds=seconds)) == "one"


@given(st.integers(WINDOW + 1, 10**9), st.sampled_from([1, -1]))
def test_a_stale_or_future_one_is_not(seconds: int, sign: int) -> None:
    refused(GOOD, now=NOW + sign * timedelta(seconds=seconds))


@given(st.sampled_from([HOSPITAL, TIME, SIGNATURE]), st.text(max_size=100))
def test_no_header_can_be_another(name: str, text: str) -> None:
    if text != GOOD[name]:
        refused(GOOD | {name: text})


@pytest.mark.parametrize("text", ["", "٣", "1e9", "nan", "-", "9" * 5000])
def test_no_spelling_of_a_time_brings_anything_but_the_refusal(text: str) -> None:
    refused(GOOD | {TIME: text})


def test_one_hospitals_signature_is_nobody_elses_and_of_no_other_federation() -> None:
    said = {
        refused(GOOD | {HOSPITAL: "other"}),
        refused(GOOD, federation="skin"),
        refused(headers_for("blood", "one", OTHER, NOW)),
        refused(headers_for("blood", "nobody", ONE, NOW)),
        refused({}),
    }
    assert len(said) == 1, "which it was is told to nobody"

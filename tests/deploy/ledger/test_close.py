"""`consilium ledger close`: gives back what a run holds, and nothing unasked."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.errors import ConsiliumError
from common.privacy.ledger import Ledger
from common.privacy.limits import PrivacyLimits
from tests.deploy.ledger.building import (
    LATER,
    RUN,
    SECOND,
    consilium,
    error,
    home,
    policy,
    said,
    snapshot,
    told,
    train,
    train_openly,
)


def test_close_gives_back_what_the_run_holds(path: Path) -> None:
    train(path, rounds=1)
    policy()
    before = told("show")["data_sets"][0]
    text = said("close", RUN, answer="y\n")
    assert "1 of 2 rounds used" in text and "cannot go on" in text
    after = told("show")
    (data,), (row,) = after["data_sets"], after["runs"]
    assert (row["state"], row["hold_until"], data["held_epsilon"]) == ("closed", None, 0.0)
    assert data["spent"] == before["spent"]
    assert data["left_epsilon"] == pytest.approx(before["left_epsilon"] + before["held_epsilon"])
    assert f"gives back ε={before['held_epsilon']:.3f} to data set {data['data_set'][:8]}" in text
    assert f"{data['left_epsilon']:.3f} are left then" in text
    assert f"note it down: {after['ledger']['head']}" in text
    with Ledger(path, create=False) as ledger, pytest.raises(ConsiliumError, match="closed"):
        ledger.reserve_round(RUN, 2, "2" * 64)


def test_what_other_runs_hold_is_not_given_back(path: Path) -> None:
    train(path, rounds=1)
    train(path, LATER, rounds=1, parts=SECOND, limits=PrivacyLimits(total_epsilon=20.0))
    policy("total-epsilon = 20.0")
    before = told("show")["data_sets"]
    text = said("close", LATER, "--yes")
    after = told("show")["data_sets"]
    for old, new in zip(before, after, strict=True):
        gained = new["left_epsilon"] - old["left_epsilon"]
        assert gained > 0 and new["held_epsilon"] > 0
        assert f"ε={gained:.3f} to data set {new['data_set'][:8]}" in text


def test_close_asks_and_a_no_or_nobody_changes_nothing(path: Path) -> None:
    train(path, rounds=1)
    before = snapshot(home())
    for answer in ("n\n", ""):
        assert consilium("close", RUN, answer=answer).exit_code == 1
    assert snapshot(home()) == before


def test_closing_what_holds_nothing_says_so(path: Path) -> None:
    train(path, rounds=1)
    train_openly(path, "open")
    policy("hold-days = 0")
    assert "knows no run nope" in error("close", "nope", "--yes").what
    assert "was not private" in said("close", "open", "--yes")
    assert "holds nothing" in said("close", RUN, "--yes")
    before = snapshot(home())
    assert "closed already" in said("close", RUN, "--yes")
    assert snapshot(home()) == before

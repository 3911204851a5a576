"""`consilium ledger show`: what it says is what the ledger holds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.privacy.ledger import Chain, Ledger
from common.privacy.limits import PrivacyLimits
from deploy.ledger.export import COLUMNS
from deploy.ledger.text import render
from deploy.ledger.view import json_ready
from tests.common.privacy.ledger.building import data
from tests.deploy.ledger.building import (
    LATER,
    LIMITS,
    PROMISE,
    RUN,
    SECOND,
    error,
    home,
    plan,
    policy,
    said,
    strict,
    told,
    train,
    train_openly,
)


def test_the_document_says_what_the_ledger_holds(path: Path) -> None:
    train(path, rounds=2, settled=1)
    policy("hold-days = 3")
    document = told("show")
    with Ledger(path, create=False) as ledger:
        cost = ledger.spent_by_run(RUN)
        (name,) = {e.dataset for e in ledger.chain.entries()}
        spent, both = (ledger.total(name, LIMITS, held=held) for held in (False, True))
        entries = ledger.chain.entries()
        identity = ledger.chain.meta("id").decode()
    time = document.pop("time")
    assert time > entries[-1].time
    (row,) = document.pop("runs")
    (images,) = document.pop("data_sets")
    assert document == {
        "format": "consilium-ledger",
        "version": 1,
        "run": None,
        "ledger": {
            "path": str(path),
            "hospital": "",
            "id": identity,
            "entries": 6,
            "head": entries[-1].hash,
            "head_noted": True,
            "other_ledgers": [],
        },
        "policy": {
            "path": str(home() / "policy.toml"),
            "total_epsilon": 8.0,
            "total_delta": 2e-4,
            "run_epsilon": 8.0,
            "min_noise_multiplier": 0.4,
            "min_clipping_norm": 1e-6,
            "allow_non_private": False,
            "shared_noise": False,
            "unit": "image",
            "metrics": "noised",
            "hold_days": 3.0,
        },
    }
    assert images == {
        "data_set": name,
        "images": 100,
        "largest_patient": 1,
        "since": entries[0].time,
        "overlaps": [],
        "unit": "image",
        "delta": 2e-4,
        "spent": {"epsilon": spent.epsilon, "accountant": "prv", "runs": [RUN]},
        "spent_and_held": {"epsilon": both.epsilon, "accountant": "prv", "runs": [RUN]},
        "held_epsilon": both.epsilon - spent.epsilon,
        "left_epsilon": 8.0 - both.epsilon,
        "over": False,
    }
    assert 2 < spent.epsilon <= both.epsilon < 3
    until = row.pop("hold_until")
    assert until > entries[-1].time and len(until) == len(entries[-1].time)
    assert row == {
        "run": RUN,
        "data_sets": [name],
        "unit": "image",
        "state": "complete",
        "promise": {
            "epsilon": 3.0,
            "delta": 1.9e-4,
            "clipping_norm": 7.0,
            "rounds": 2,
            "local_epochs": 1,
            "batch_size": 40,
            "sampling_rate": 0.0,
            "min_cohort": 1,
            "colluders": 0,
            "whitening": False,
        },
        "mechanism": {
            "noise_multiplier": plan().noise_multiplier,
            "sampling_rate": 0.5,
            "steps_per_round": 2,
            "train_count": 80,
            "validation_noise_multiplier": plan().validation_noise_multiplier,
            "count_epsilon": 0.06,
        },
        "rounds_used": 2,
        "rounds_planned": 2,
        "validations_used": 0,
        "validations_planned": 3,
        "spent": {
            "epsilon": cost.value,
            "prv": cost.prv,
            "pld": cost.pld,
            "accountant": cost.accountant,
            "agree": True,
        },
        "last": entries[-1].time,
        "unsettled": [{"seq": 6, "round": 2, "mechanism": "sampled-gaussian"}],
    }


def test_a_crash_left_open_counts_like_a_round_that_was_settled(path: Path, tmp_path: Path) -> None:
    train(path, rounds=1, settled=0)
    train(tmp_path / "other" / "ledger.sqlite", rounds=1)
    crashed, whole = told("show"), told("show", "--home", tmp_path / "other")
    assert crashed["data_sets"][0]["spent"] == whole["data_sets"][0]["spent"]
    assert crashed["runs"][0]["spent"] == whole["runs"][0]["spent"]
    assert (len(crashed["runs"][0]["unsettled"]), whole["runs"][0]["unsettled"]) == (1, [])
    assert "not settled in round 1" in " ".join(said("show").split())
    assert "not settled" not in said("show", "--home", tmp_path / "other")


def test_two_versions_of_a_data_set_are_told_with_what_they_share(path: Path) -> None:
    train(path)
    train(path, LATER, rounds=1, parts=SECOND)
    policy()
    document = told("show", "--entries")
    old, new = document["data_sets"]
    came = {e["dataset"]: e["time"] for e in document["entries"] if e["kind"] == "dataset"}
    assert came == {row["data_set"]: row["since"] for row in (old, new)}
    assert (old["overlaps"], new["images"]) == ([], 110)
    assert new["overlaps"] == [{"data_set": old["data_set"], "images": 90}]
    for row in (old, new):
        assert row["spent"]["runs"] == [RUN, LATER]
        assert row["spent"]["accountant"] == "renyi-filter"
        assert row["spent"]["epsilon"] > max(r["spent"]["epsilon"] for r in document["runs"])
        assert row["held_epsilon"] > 0
        assert row["left_epsilon"] == 8 - row["spent_and_held"]["epsilon"]
    assert [r["data_sets"] for r in document["runs"]] == [[old["data_set"]], [new["data_set"]]]
    assert [r["state"] for r in document["runs"]] == ["complete", "active"]


def test_one_run_is_shown_alone_but_the_images_have_spent_what_they_have(path: Path) -> None:
    train(path)
    train(path, LATER, rounds=1, parts=SECOND)
    everything, one = told("show", "--entries"), told("show", "--run", LATER, "--entries")
    assert one["run"] == LATER
    assert one["runs"] == everything["runs"][1:]
    assert one["data_sets"] == everything["data_sets"]
    assert one["entries"] == [e for e in everything["entries"] if e["run"] == LATER]
    assert "knows no run nope" in error("show", "--run", "nope").what


def test_entries_are_listed_with_all_their_columns(path: Path) -> None:
    train(path, rounds=1)
    with Ledger(path, create=False) as ledger:
        kept = ledger.chain.entries()
    listed = told("show", "--entries")["entries"]
    assert "entries" not in told("show")
    assert [tuple(e) for e in listed] == [COLUMNS] * len(kept)
    assert [e["hash"] for e in listed] == [e.hash for e in kept]
    text = said("show", "--entries")
    assert all(e.hash[:8] in text for e in kept)


def test_training_without_privacy_is_infinite(path: Path) -> None:
    train(path, rounds=0)
    train_openly(path, LATER)
    policy()
    document = told("show")
    (images,) = document["data_sets"]
    assert (images["spent"]["epsilon"], images["held_epsilon"]) == ("inf", None)
    assert (images["left_epsilon"], images["over"]) == (0.0, True)
    row = document["runs"][1]
    assert (row["state"], row["promise"], row["mechanism"]) == ("not private", None, None)
    assert (row["spent"]["epsilon"], row["spent"]["accountant"]) == ("inf", "none")
    text = " ".join(said("show").split())
    assert f"run {LATER} was trained without privacy" in text
    assert "more than the policy allows" in text


def test_a_run_that_went_on_without_privacy_is_infinite_whatever_it_spent_before(
    path: Path,
) -> None:
    train(path, rounds=1)
    train_openly(path, RUN)
    assert told("show")["runs"][0]["spent"]["epsilon"] == "inf"


def test_a_run_that_only_released_its_counts_has_spent_them(path: Path) -> None:
    train(path, rounds=0)
    document = told("show")
    assert document["runs"][0]["spent"]["epsilon"] == pytest.approx(0.06)
    assert document["data_sets"][0]["spent"]["epsilon"] == pytest.approx(0.06)
    assert document["runs"][0]["state"] == "active"


def test_under_patients_the_figures_are_of_the_worst_off_patient(path: Path) -> None:
    parts = data(range(80), range(80, 100), {n: n // 4 for n in range(100)})  # four images each
    train(path, rounds=1, parts=parts, promise=replace(PROMISE, unit="patient"))
    alone = told("show")
    assert (alone["policy"]["unit"], alone["runs"][0]["unit"]) == ("patient", "patient")
    assert alone["data_sets"][0]["largest_patient"] == 4
    assert "worst-off patient" in said("show")
    train(path, LATER, rounds=1, parts=parts, limits=PrivacyLimits.none())
    assert told("show")["policy"]["unit"] == "image"  # no longer what every run promises
    image = told("show")["data_sets"][0]["spent"]["epsilon"]
    policy('unit = "patient"')
    assert told("show")["data_sets"][0]["spent"]["epsilon"] > 2 * image


def test_an_empty_ledger_is_shown_as_empty(path: Path) -> None:
    Chain(path).close()
    document = told("show", "--entries")
    assert (document["data_sets"], document["runs"], document["entries"]) == ([], [], [])
    assert document["ledger"]["head"] == "0" * 64
    assert "0 entries" in said("show", "--entries")


def test_accountants_that_disagree_are_told(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(path, rounds=1)
    document = told("show")
    render(document, width=100)
    assert "differ" not in capsys.readouterr().out
    document["runs"][0]["spent"]["agree"] = False
    render(document, width=100)
    assert "the accountants differ by more than 2 %" in capsys.readouterr().out


@pytest.mark.parametrize("run", [RUN, "[bold]not markup[/bold]" + "x" * 41])
def test_the_tables_fit_100_columns_and_need_no_colour(path: Path, run: str) -> None:
    train(path, run, rounds=1, settled=0)
    train(path, "later", rounds=0, parts=SECOND)
    text = said("show", "--entries")
    lines = [line for line in text.splitlines() if str(path) not in line]
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in text
    assert run[:10] in text
    for word in ("also in", "renyi-filter", "σ=", "q=0.5", "2 steps/round", "1 of 2", "prv"):
        assert word in text


@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.just(math.inf),
                  st.floats(allow_nan=False, allow_infinity=False)),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)  # fmt: skip
def test_infinity_is_text_and_everything_else_stays(value: Any) -> None:
    ready = json_ready(value)
    assert strict(json.dumps(ready, allow_nan=False)) == ready

    def undo(new: Any, old: Any) -> Any:
        if isinstance(new, dict):
            return {k: undo(new[k], old[k]) for k in new}
        if isinstance(new, list):
            return [undo(a, b) for a, b in zip(new, old, strict=True)]
        return math.inf if new == "inf" and old == math.inf else new

    assert undo(ready, value) == value

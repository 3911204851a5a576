"""Which ledger and which policy a command takes: the ones that its options mean."""

from __future__ import annotations

import os
from pathlib import Path

from common.privacy.limits import PrivacyLimits
from deploy.ledger.choice import choose
from tests.deploy.ledger.building import (
    LATER,
    RUN,
    error,
    home,
    policy,
    said,
    simulated,
    told,
    train,
)


def test_the_ledger_is_the_given_homes_then_the_hospitals_then_consiliums(tmp_path: Path) -> None:
    other = tmp_path / "other" / "ledger.sqlite"
    for path in (other, simulated("hospital-00"), home() / "ledger.sqlite"):
        train(path, rounds=0)

    def chosen(*arguments: object) -> tuple[str, str]:
        ledger = told("show", *arguments)["ledger"]
        return ledger["path"], ledger["hospital"]

    assert chosen("--home", other.parent, "--hospital", "hospital-00") == (str(other), "")
    assert chosen("--hospital", "hospital-00") == (str(simulated("hospital-00")), "hospital-00")
    assert chosen() == (str(home() / "ledger.sqlite"), "")
    refused = error("show", "--hospital", "../simulation/hospital-00")
    assert "hospital-00" in refused.remedy


def test_the_only_ledger_of_a_simulation_needs_no_option() -> None:
    train(simulated("hospital-03", RUN), rounds=0)
    assert told("verify")["ledger"]["path"] == str(simulated("hospital-03", RUN))
    assert choose(None, None, RUN).hospital == "hospital-03"


def test_several_ledgers_are_listed_with_what_picks_one() -> None:
    for name in ("hospital-00", "hospital-01"):
        train(simulated(name, RUN), rounds=0)
    train(simulated("hospital-01", LATER), rounds=0)
    train(simulated("hospital-02"), rounds=0)
    refused = error("show")
    assert f"hospital-00: {RUN}" in refused.what
    assert f"hospital-01: {RUN}, {LATER}" in refused.what
    assert "hospital-02: one for all runs" in refused.what
    assert "--hospital" in refused.remedy and "--run" in refused.remedy
    assert RUN in error("show", "--run", RUN).what
    refused = error("show", "--hospital", "hospital-01", "--run", "other")
    assert RUN in refused.remedy and LATER in refused.remedy


def test_where_each_run_has_a_ledger_the_latest_is_taken_or_the_one_asked_for() -> None:
    for run in (LATER, RUN):  # RUN was written last
        train(simulated("hospital-00", run), run, rounds=0)
    old, new = simulated("hospital-00", LATER), simulated("hospital-00", RUN)
    os.utime(old, ns=(1, new.stat().st_mtime_ns - 1))
    latest = told("show", "--hospital", "hospital-00")
    assert latest["ledger"]["path"] == str(new)
    assert latest["ledger"]["other_ledgers"] == [f"runs/{LATER}/ledger.sqlite"]
    assert "1 other ledger(s)" in said("show", "--hospital", "hospital-00")
    asked = told("show", "--hospital", "hospital-00", "--run", LATER)
    assert (asked["ledger"]["path"], asked["run"]) == (str(old), LATER)
    assert told("verify", "--run", LATER)["ledger"]["path"] == str(old)
    assert "closed" in said("close", LATER, "--yes")
    assert told("show", "--run", LATER)["runs"][0]["state"] == "closed"


def test_the_policy_is_the_given_one_then_the_hospitals_then_consiliums(tmp_path: Path) -> None:
    hospital = tmp_path / "hospital"
    train(hospital / "ledger.sqlite", rounds=0)

    def total(*arguments: object) -> object:
        return told("show", "--home", hospital, *arguments)["policy"]["total_epsilon"]

    assert total() == "inf"
    policy("total-epsilon = 5.0")
    assert total() == 5.0
    policy("total-epsilon = 4.0", hospital / "policy.toml")
    assert total() == 4.0
    assert total("--policy", policy("total-epsilon = 6.0", tmp_path / "p.toml")) == 6.0
    assert "nowhere.toml" in error("show", "--home", hospital, "--policy", "nowhere.toml").what
    policy("total-epsilom = 5.0")
    (hospital / "policy.toml").unlink()
    assert "total-epsilom" in error("show", "--home", hospital).what


def test_without_a_policy_there_is_no_limit(path: Path) -> None:
    train(path, limits=PrivacyLimits.none())
    document = told("show")
    assert document["policy"]["path"] is None
    assert document["policy"]["total_epsilon"] == "inf"
    (data,) = document["data_sets"]
    assert (data["delta"], data["left_epsilon"], data["over"]) == (1.9e-4, "inf", False)
    assert data["spent"]["epsilon"] == document["runs"][0]["spent"]["epsilon"]
    assert "no policy: no limit" in said("show")


def test_a_policy_without_a_total_leaves_no_limit(path: Path) -> None:
    train(path)
    policy("total-epsilon = inf\nrun-epsilon = inf")
    document = told("show")
    assert document["policy"]["path"] == str(home() / "policy.toml")
    assert document["policy"]["total_epsilon"] == "inf"
    assert document["data_sets"][0]["left_epsilon"] == "inf"
    assert document["data_sets"][0]["delta"] == 2e-4
    assert "any image: no limit" in said("show")


def test_a_lowered_policy_and_an_expired_hold_are_told(path: Path) -> None:
    train(path, rounds=1)
    policy("total-epsilon = 1.0\nhold-days = 0")
    document = told("show")
    (row,), (data,) = document["runs"], document["data_sets"]
    assert (row["state"], row["hold_until"]) == ("hold expired", None)
    assert (data["held_epsilon"], data["left_epsilon"], data["over"]) == (0.0, 0.0, True)
    assert "hold expired" in " ".join(said("show").split())

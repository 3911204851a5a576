"""A hospital's policy: what is silent has a safe value, what is misspelt is no policy at all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from client_app.policy import HospitalPolicy
from common.errors import ConfigError
from common.privacy.limits import PrivacyLimits


def load(tmp_path: Path, text: str) -> HospitalPolicy:
    file = tmp_path / "policy.toml"
    file.write_text(text)
    return HospitalPolicy.load(file)


@pytest.mark.parametrize(
    "text",
    [
        "", "version = 2", 'version = "1"', "version = 1\nx = 1", "not toml =",
        "version = 1\n[aggregation]\nmin-kohort = 4", "version = 1\naggregation = 4",
        "version = 1\n[aggregation]\nmin-cohort = 2", "version = 1\n[aggregation]\nmin_cohort = 5",
        'version = 1\n[aggregation]\nsecagg = "off"',
        "version = 1\n[aggregation]\nmin-cohort = true",
        "version = 1\n[privacy]\ntotal-epsilon = 0",
        "version = 1\n[privacy]\ntotal-epsilon = nan",
        'version = 1\n[privacy]\ntotal-epsilon = "8"',
        "version = 1\n[privacy]\ntotal-delta = 0.5",
        "version = 1\n[privacy]\nmin-noise-multiplier = inf",
        'version = 1\n[privacy]\nallow-non-private = "no"',
        'version = 1\n[privacy]\nunit = "hospital"', 'version = 1\n[privacy]\nmetrics = "all"',
        "version = 1\n[privacy]\ntotal_epsilon = 8", "version = 1\n[privacy]\nhold-days = -1",
        'version = 1\n[vectors]\nevaluate = "sums"', "version = 1\n[vectors]\nevaluates = true",
    ],
)  # fmt: skip
def test_a_policy_that_is_wrong_anywhere_means_no_training(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.toml") as error:
        load(tmp_path, text)
    assert error.value.remedy


def test_the_error_names_the_entry(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.total-epsilon"):
        load(tmp_path, "version = 1\n[privacy]\ntotal-epsilon = -1")


def test_a_missing_policy_means_no_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        HospitalPolicy.load(tmp_path / "none.toml")


def test_what_a_policy_does_not_say_is_strict(tmp_path: Path) -> None:
    policy = load(tmp_path, "version = 1")
    assert policy == HospitalPolicy()
    assert policy.secagg_required
    assert policy.secagg.require_roster
    assert policy.privacy == PrivacyLimits()
    assert not policy.privacy.allow_non_private
    assert math.isfinite(policy.privacy.total_epsilon)
    assert policy.privacy.metrics == "noised"
    assert policy.vectors.send == "never"
    assert not policy.vectors.evaluate


def test_whole_numbers_and_infinity_are_read(tmp_path: Path) -> None:
    policy = load(tmp_path, "version = 1\n[privacy]\ntotal-epsilon = inf\nrun-epsilon = 6")
    assert policy.privacy.total_epsilon == math.inf
    assert policy.privacy.run_epsilon == 6.0


def test_only_a_simulation_has_no_limits() -> None:
    assert HospitalPolicy.for_simulation().privacy == PrivacyLimits.none()

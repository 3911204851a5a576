"""A run's privacy plan: charged before training, kept on disk, never exceeded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import PrivacyError
from common.privacy.plan import PrivacyPlan


@pytest.fixture
def plan() -> PrivacyPlan:
    return PrivacyPlan.calibrated(
        epsilon=6.0, delta=1e-4, clipping_norm=7.0, sampling_rate=0.1, steps_per_round=10, rounds=4
    )


def test_all_rounds_together_cost_at_most_the_promise(plan: PrivacyPlan) -> None:
    costs = []
    for _ in range(plan.rounds):
        plan = plan.charge_round()
        costs.append(plan.spent().value)
    assert costs == sorted(costs)
    assert 5.9 < costs[-1] <= 6.0


def test_a_round_beyond_the_plan_is_refused(plan: PrivacyPlan) -> None:
    for _ in range(plan.rounds):
        plan = plan.charge_round()
    with pytest.raises(PrivacyError, match="all 4 rounds"):
        plan.charge_round()


def test_the_state_survives_the_process_exactly(plan: PrivacyPlan, tmp_path: Path) -> None:
    plan.charge_round().save(tmp_path / "privacy.json")
    again = PrivacyPlan.load(tmp_path / "privacy.json")
    assert again == plan.charge_round()
    assert (tmp_path / "privacy.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("damage", ["", "{", "{}", '{"version": 1, "plan": {"epsilon": 6}}'])
def test_a_damaged_state_is_never_taken_for_nothing_spent(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "privacy.json"
    path.write_text(damage)
    with pytest.raises(Exception, match=r"privacy\.json"):
        PrivacyPlan.load(path)


def test_another_promise_is_not_the_same(plan: PrivacyPlan) -> None:
    assert plan.same_promise(plan.charge_round())
    looser = PrivacyPlan(**{**json.loads(json.dumps(plan.__dict__)), "noise_multiplier": 0.1})
    assert not plan.same_promise(looser)

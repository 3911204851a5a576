"""A server that asks for more than was agreed: each request is refused, or it is charged.

Through the real ClientApp, with a hospital's own policy and ledger on the disk.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from client_app.app import app
from common.config import KEYS
from common.files import consilium_home
from common.messages import Job, Refusal, Report
from common.model import ModelSpec, build, get_weights
from common.privacy.ledger import Ledger, LedgerError, data_sets
from common.privacy.limits import PrivacyLimits
from common.simulation import LEDGER
from deploy.inprocess import InProcessGrid, run_in_process
from tests.server_app.running import lines, the_run
from tests.server_app.test_private_federation import PRIVATE

WIDTH = 0.03125
SPEC = ModelSpec(width=WIDTH)
AGREED: dict[str, Any] = PRIVATE | {"rounds": 2, "epsilon": 3.0, "local-epochs": 1}
POLICY = """
version = 1
[aggregation]
secagg = "optional"
[privacy]
total-epsilon = 5.0
total-delta = 1e-3
run-epsilon = 4.0
"""
LIMITS = PrivacyLimits(total_epsilon=5.0, total_delta=1e-3, run_epsilon=4.0)


@pytest.fixture(autouse=True)
def policy() -> Path:
    path = consilium_home() / "policy.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(POLICY)
    return path


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    return get_weights(build(SPEC, seed=0))


def ask(
    weights: dict[str, np.ndarray], run: str = "run-1", number: int = 1, kind: str = "train",
    **config: Any,
) -> Report | str:  # fmt: skip
    """What a server gets that sends this run config: a report, or the code of a refusal."""
    changed = {key.replace("_", "-"): value for key, value in config.items()}
    run_config = {key.name: key.default for key in KEYS} | AGREED | changed
    grid = InProcessGrid(app, 2, run_config)
    content = Job(run, number, SPEC.digest(), weights).to_record()
    answer = app(Message(content, 1000, kind), grid.contexts[0]).content
    refusal = Refusal.in_record(answer)
    return refusal.code if refusal else Report.from_record(answer, run=run, round=number)


def spent() -> float:
    with Ledger(consilium_home() / "simulation" / "hospital-00" / LEDGER) as ledger:
        return max(ledger.total(d.fingerprint, LIMITS).epsilon for d in data_sets(ledger.chain))


def other(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value + np.float32(0.01) for name, value in weights.items()}


def test_rounds_beyond_the_plan_are_refused(weights: dict[str, np.ndarray]) -> None:
    for number in (1, 2):
        assert isinstance(ask(weights, number=number), Report)
    before = spent()
    assert {ask(weights, number=n) for n in (3, 4, 1000)} == {"privacy-budget"}
    # Nor does calling a round by an old number help, with another model.
    assert ask(other(weights), number=1) == "privacy-budget"
    assert spent() == before <= 3.0


def test_a_run_config_with_a_thousand_rounds_more_is_refused(
    weights: dict[str, np.ndarray],
) -> None:
    assert isinstance(ask(weights), Report)
    assert ask(weights, number=2, rounds=1002) == "config-changed"


def test_another_run_is_charged_and_refused_once_the_total_is_reached(
    weights: dict[str, np.ndarray],
) -> None:
    assert isinstance(ask(weights, "run-1"), Report)
    first = spent()
    answers = [ask(weights, f"run-{i}", epsilon=2.0) for i in range(2, 7)]
    taken = [a for a in answers if isinstance(a, Report)]
    refused = [a for a in answers if not isinstance(a, Report)]
    assert len(taken) < len(answers)
    assert set(refused) == {"privacy-budget"}
    assert first < spent() <= 5.0


def test_a_smaller_noise_multiplier_is_refused(
    weights: dict[str, np.ndarray], policy: Path
) -> None:
    """The server cannot name a noise multiplier; a larger ε is how it would get a smaller one."""
    assert ask(weights, epsilon=900.0) == "privacy-policy"
    assert isinstance(ask(weights, epsilon=3.0), Report)
    assert ask(weights, number=2, epsilon=4.0) == "config-changed"  # in mid-run
    policy.write_text(POLICY + "min-noise-multiplier = 50.0\n")
    assert ask(weights, "run-2", epsilon=0.5) == "privacy-policy"


def test_a_bigger_clipping_norm_brings_as_much_more_noise(
    weights: dict[str, np.ndarray],
) -> None:
    assert isinstance(ask(weights), Report)
    assert ask(weights, number=2, clipping_norm=7000.0) == "config-changed"  # in mid-run
    # As a run of its own it costs the same: the noise is in units of the clipping norm.
    updates = []
    for i, norm in enumerate((1.0, 1000.0)):
        report = ask(weights, f"norm-{i}", epsilon=0.8, clipping_norm=norm, optimizer="sgd",
                     learning_rate=1e-6, rounds=1)  # fmt: skip
        assert isinstance(report, Report)
        updates.append(math.sqrt(sum(float((u**2).sum()) for u in report.update.values())))
    assert updates[1] > 300 * updates[0]


def test_a_larger_delta_is_refused(weights: dict[str, np.ndarray]) -> None:
    assert ask(weights, delta=0.009) == "privacy-policy"


def test_training_without_privacy_is_refused_by_a_silent_policy(
    weights: dict[str, np.ndarray], policy: Path
) -> None:
    assert ask(weights, privacy="none", secagg=False) == "privacy-policy"
    assert ask(weights, kind="evaluate", privacy="none") == "privacy-policy"
    policy.write_text(POLICY + "allow-non-private = true\n")
    assert isinstance(ask(weights, privacy="none"), Report)
    assert spent() == math.inf
    # From now on no finite total holds for these images.
    assert ask(weights, "run-2") == "privacy-budget"


def test_images_are_no_substitute_for_patients(
    weights: dict[str, np.ndarray], policy: Path
) -> None:
    policy.write_text(POLICY + 'unit = "patient"\n')
    assert ask(weights) == "privacy-policy"


def test_a_limit_that_the_hospital_tightens_in_mid_run_holds_at_once(
    weights: dict[str, np.ndarray], policy: Path
) -> None:
    assert isinstance(ask(weights), Report)
    policy.write_text(POLICY.replace("total-epsilon = 5.0", "total-epsilon = 2.0"))
    assert ask(weights, number=2) == "privacy-budget"


def test_validation_alone_is_charged_too_and_ends(weights: dict[str, np.ndarray]) -> None:
    """A server that asks for one figure after another, never for training."""
    models = [weights]
    for _ in range(5):
        models.append(other(models[-1]))
    reports = [ask(model, kind="evaluate", number=0) for model in models]
    counts = [r.metrics["val-examples"] for r in reports if isinstance(r, Report)]
    assert len(counts) == 6
    assert all(n > 0 for n in counts[:3])  # rounds + 1
    assert counts[3:] == [0.0] * 3
    assert spent() <= 3.0


@pytest.mark.parametrize(("metrics", "told"), [("withheld", False), ("exact", False)])
def test_figures_are_withheld_where_the_policy_says_so_or_no_sum_hides_them(
    weights: dict[str, np.ndarray], policy: Path, metrics: str, told: bool
) -> None:
    policy.write_text(POLICY + f'metrics = "{metrics}"\n')
    report = ask(weights)
    assert isinstance(report, Report)
    assert (report.metrics["val-examples"] > 0) is told


def test_a_ledger_that_was_deleted_stops_training(weights: dict[str, np.ndarray]) -> None:
    assert isinstance(ask(weights), Report)
    path = consilium_home() / "simulation" / "hospital-00" / LEDGER
    path.rename(path.with_suffix(".bak"))
    assert ask(weights, number=2) == "ledger"
    with pytest.raises(LedgerError, match="is gone"):
        spent()


def test_the_run_goes_on_without_the_hospital_that_refuses(tmp_path: Path) -> None:
    """One hospital's budget is used up; the others have a quorum."""
    (consilium_home() / "policy.toml").unlink()
    strict = tmp_path / "strict.toml"
    strict.write_text(POLICY.replace("run-epsilon = 4.0", "run-epsilon = 0.5"))
    run_in_process(
        {**AGREED, "rounds": 1, "quorum": 0.6},
        num_hospitals=3,
        node_configs={1: {"policy": str(strict)}},
    )
    record = lines(the_run())[1]
    assert record["status"] == "ok"
    assert record["contributed"] == ["hospital-00", "hospital-02"]
    assert record["dropped"][0]["reason"].startswith("refused: privacy-policy")

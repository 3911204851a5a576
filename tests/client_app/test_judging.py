"""A hospital that is asked to judge a candidate: what it counts, tells, keeps, and allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from client_app import egress, tuning
from client_app.app import app
from client_app.cohorts import Cohorts
from client_app.hospital import Hospital
from common.aggregation import GAINED, LOST
from common.errors import ProtocolError
from common.evaluation import evaluate
from common.files import consilium_home
from common.messages import Comparison, Offer
from common.model import Weights, build, get_weights
from common.vectors import base_id
from deploy.inprocess import InProcessGrid
from tests.client_app.judging import (
    ALLOWED,
    RUN,
    SPEC,
    VALUES,
    alone,
    asked,
    code,
    cohort,
    delivered,
    grid,
    judge,
    moved,
    weights,
)

__all__ = ["grid", "weights"]  # fixtures


def test_the_sums_are_those_of_the_hospitals_own_counts(
    grid: InProcessGrid, weights: Weights
) -> None:
    candidate = get_weights(build(SPEC, seed=1))
    question = asked(weights, candidate)
    found = judge(grid, cohort(), question)
    counts = [tuning.compare(question, Hospital.from_context(c)) for c in grid.contexts.values()]
    assert found.failure is None
    assert found.values[GAINED][0] == sum(gained for gained, _ in counts) > 0
    assert found.values[LOST][0] == sum(lost for _, lost in counts) > 0
    assert found.contributed == sorted(cohort())


def test_the_counts_are_those_of_two_evaluations(grid: InProcessGrid, weights: Weights) -> None:
    """gained − lost is the difference of the numbers that are right."""
    from client_app.data import data_of

    question = asked(weights, get_weights(build(SPEC, seed=2)))
    hospital = Hospital.from_context(grid.contexts[3])
    gained, lost = tuning.compare(question, hospital)
    val = data_of(hospital).val
    right = [
        evaluate(build(SPEC), w, val.images, val.labels).correct
        for w in (question.current, question.candidate)
    ]
    assert gained - lost == right[1] - right[0]
    assert 0 <= gained <= right[1] and 0 <= lost <= right[0]
    assert tuning.compare(asked(weights, weights), hospital) == (0, 0)


def test_every_field_of_a_comparison_is_in_the_egress_log(
    grid: InProcessGrid, weights: Weights
) -> None:
    judge(grid, cohort(), asked(weights, moved(weights, 0.01)))
    home = consilium_home() / "simulation" / "hospital-00"
    lines = [x for x in egress.read(home / egress.FILE) if x["message"] != "offer"]
    assert [x["message"] for x in lines] == [
        "judge", "share", "masked", "masked", "masked", "consistency", "unmask"
    ]  # fmt: skip
    inside = {x["field"]: x["protection"] for x in lines if x["message"] == "masked"}
    assert set(inside) == {"masked", GAINED, LOST}
    for name in (GAINED, LOST):
        assert "only the sum over 4 or more hospitals is opened" in inside[name]
        assert "exact, no differential privacy" in inside[name]
    assert {(x["run"], x["round"]) for x in lines} == {(RUN, "1")}


@pytest.mark.parametrize("evaluate", ["", "evaluate = false\n"])
def test_a_policy_that_does_not_say_yes_says_no(weights: Weights, evaluate: str) -> None:
    consilium_home().mkdir(parents=True, exist_ok=True)
    (consilium_home() / "policy.toml").write_text(ALLOWED + evaluate)
    assert code(alone(asked(weights, moved(weights, 0.01)))) == "vectors-policy"


def test_without_the_roster_that_the_policy_asks_for_nothing_is_judged(weights: Weights) -> None:
    """Otherwise the server could be every other hospital of the sum itself."""
    consilium_home().mkdir(parents=True, exist_ok=True)
    strict = ALLOWED.replace("require-roster = false\n", "") + "evaluate = true\n"
    (consilium_home() / "policy.toml").write_text(strict)
    assert code(alone(asked(weights, moved(weights, 0.01)))) == "secagg-roster"


def test_a_policy_that_says_yes_is_enough(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    consilium_home().mkdir(parents=True, exist_ok=True)
    (consilium_home() / "policy.toml").write_text(ALLOWED + "evaluate = true\n")
    grid = delivered(InProcessGrid(app, 6, VALUES), weights, monkeypatch)
    assert judge(grid, cohort(), asked(weights, moved(weights, 0.01))).failure is None


@pytest.mark.parametrize(
    "config",
    [{"judged_by": "public"}, {"judged_by": "none"}, {"judged_by": "public", "mode": "fedavg"}],
)
def test_in_a_run_whose_hospitals_do_not_judge_none_does(
    weights: Weights, config: dict[str, Any]
) -> None:
    assert code(alone(asked(weights, moved(weights, 0.01)), **config)) == "config"


def test_a_base_must_have_the_id_that_it_is_named_by(weights: Weights) -> None:
    question = asked(weights, moved(weights, 0.01))
    object.__setattr__(question, "current", moved(weights, 0.5))
    with pytest.raises(ProtocolError, match="not those of the base"):
        Comparison.from_record(question.to_record())


@pytest.mark.parametrize("broken", ["shape", "nan", "missing", "dtype"])
def test_models_that_do_not_compare_are_refused(weights: Weights, broken: str) -> None:
    candidate = dict(weights)
    name = next(iter(weights))
    candidate[name] = {
        "shape": weights[name][..., :0], "nan": weights[name] * np.float32("nan"),
        "missing": weights[name], "dtype": weights[name].astype(np.float64),
    }[broken]  # fmt: skip
    if broken == "missing":
        del candidate[name]
    with pytest.raises(ProtocolError):
        Comparison.from_record(asked(weights, candidate).to_record())


def test_what_is_kept_of_a_comparison_is_names_and_hashes_for_the_owner_only(
    grid: InProcessGrid, weights: Weights
) -> None:
    question = asked(weights, moved(weights, 0.01))
    judge(grid, cohort(), question)
    hospital = Hospital.from_context(grid.contexts[0])
    path: Path = Cohorts(hospital, RUN, question.base)._path
    assert path.stat().st_mode & 0o077 == 0
    assert path.parent.stat().st_mode & 0o077 == 0
    text = path.read_text()
    assert question.models.hex() in text and "hospital-05" in text
    assert GAINED not in text and LOST not in text


def test_with_judging_hospitals_a_vector_tells_no_figures_of_its_own(
    weights: Weights,
) -> None:
    """They would be the hospital's own counts, in the clear, of the very base that is judged."""
    from common.messages import Delivery
    from common.vectors import SignedVector

    told = {}
    for judged_by in ("hospitals", "public"):
        run = f"run-{judged_by}"
        offered = Offer(run=run, version=0, base=base_id(SPEC.digest(), weights),
                        model_digest=SPEC.digest(), weights=weights)  # fmt: skip
        context = InProcessGrid(app, 6, VALUES | {"judged-by": judged_by}).contexts[0]
        answer = app(Message(offered.to_record(), 1000, "query.offer"), context).content
        vector = SignedVector.from_bytes(Delivery.from_record(answer, run=run).vector).vector
        told[judged_by] = set(vector.metrics)
    assert told["hospitals"] == set()
    assert "val-correct" in told["public"]


def test_asking_to_judge_imports_no_torch_before_there_is_something_to_compute() -> None:
    import subprocess
    import sys

    said = subprocess.run(
        [sys.executable, "-c", "import sys, client_app.judging; print('torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.strip() == "False"

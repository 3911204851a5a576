"""A head on a prior, by FedAvg without privacy: the head alone moves, and it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from common.aggregation import TRAIN, layout_for, params_for
from common.config import BY_NAME, RunConfig
from common.config.recipes import written_out
from common.prior import kept as prior_kept
from common.prior.features import PriorFeatures
from deploy.inprocess import run_in_process
from server_app.run_store import runs_directory
from tests.server_app.running import the_run

pytestmark = pytest.mark.usefixtures("small_prior")

RUN: dict[str, Any] = {
    "dataset": "synthetic", "synthetic-size": 260, "rounds": 4, "model": "prior-head",
    "allow-random-base": True, "privacy": "none", "partition-min-size": 5, "optimizer": "adam",
    "learning-rate": 0.3, "batch-size": 16, "num-shares": 4, "min-cohort": 4,
    "reconstruction-threshold": 3, "test-every": 4,
}  # fmt: skip
PEOPLE = 4


@pytest.mark.parametrize(
    ("secagg", "deep"),
    [(True, {}), (False, {}), (True, {"hidden-units": 32, "learning-rate": 0.003})],
)
def test_only_the_head_moves_and_it_learns(
    secagg: bool, deep: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_kept", "_mapped", "_rows"):
        monkeypatch.setattr(prior_kept, name, type(getattr(prior_kept, name))())
    seen: list[int] = []
    forward = PriorFeatures.forward

    def counted(self: PriorFeatures, pictures: Any) -> Any:
        if len(torch.unique(pictures, dim=0)) > 1:  # else the shape of passes is measured
            seen.append(int(pictures.flatten(1).any(1).sum()))  # empty ones fill a pass up
        return forward(self, pictures)

    monkeypatch.setattr(PriorFeatures, "forward", counted)
    run_in_process({**RUN, **deep, "secagg": secagg}, num_hospitals=PEOPLE)
    models = [load_file(the_run() / f"round-{i:04d}.safetensors") for i in (0, 1, 4)]
    moved = {n for n in models[0] if not np.array_equal(models[0][n], models[-1][n])}
    assert moved == {"head.weight"} | ({"hidden.weight", "hidden.bias"} if deep else set())
    records = [json.loads(x) for x in (the_run() / "metrics.jsonl").read_text().splitlines()]
    before, after = records[0]["test"], records[-1]["test"]
    # Random features, not whitened: how it orders pictures is all that is learnt in four rounds.
    assert before["macro_auc"] < 0.6 and after["macro_auc"] > 0.8
    # Training, validation and test of five models: features were computed once for each picture.
    assert 0 < sum(seen) <= RUN["synthetic-size"]


LINEAR = {"hidden-units": 0, "learning-rate": 0.3, "update-range": 16.0}


@pytest.mark.parametrize(("changed", "moves"), [({}, 0.01), (LINEAR, 1.0)])
def test_secure_aggregation_costs_a_head_its_rounding_and_no_more(
    changed: dict[str, Any], moves: float
) -> None:
    """The strong recipe, and a linear head, which moves by more than the default range.

    After one round: later ones train from what was rounded, and no bound is known of that.
    """
    models: list[dict[str, np.ndarray]] = []
    own = {"rounds", "optimizer", "learning-rate", "batch-size", "privacy", "model"}
    values = {k: v for k, v in RUN.items() if k not in own} | {"recipe": "strong", "rounds": 1}
    values = written_out(values | changed, {name: key.default for name, key in BY_NAME.items()})
    values["batch-size"] = 2  # few pictures, and as many steps as a hospital of 1,200 takes
    before: set[Path] = set()
    for secagg in (True, False):
        run_in_process({**values, "secagg": secagg}, num_hospitals=PEOPLE)
        (run,) = set(runs_directory().iterdir()) - before
        before.add(run)
        models.append(load_file(run / "round-0001.safetensors"))
    secured, plain = models
    assert np.abs(plain["head.weight"]).max() > moves, "or this test says nothing"
    config = RunConfig.parse(values)
    plans = layout_for(TRAIN, 1, config).plan(params_for(config, PEOPLE))
    (scale,) = (plan.scale for plan in plans if plan.segment.name == "update")
    hospitals = json.loads((run / "partition.json").read_text())["hospitals"]
    rounding = PEOPLE / scale / sum(h["train"] for h in hospitals)  # each by less than a step
    assert rounding < 1e-3
    for name, weights in plain.items():
        np.testing.assert_allclose(secured[name], weights, rtol=1e-6, atol=rounding)

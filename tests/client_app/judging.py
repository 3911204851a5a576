"""Hospitals that are asked to judge: what an honest or lying server sends, what they answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from client_app import tuning
from client_app.app import app
from common.aggregation import JUDGE, layout_for, params_for, terms_for
from common.config import KEYS, RunConfig
from common.messages import Comparison, Offer, Refusal
from common.model import ModelSpec, Weights, build, get_weights
from common.secagg import RoundBinding
from common.vectors import base_id
from deploy.inprocess import InProcessGrid
from server_app.secure_round import Question, SecureSum, secure_sum

SPEC = ModelSpec(width=0.03125)
RUN = "run-1"
VALUES: dict[str, Any] = {key.name: key.default for key in KEYS} | {
    "mode": "vectors", "dataset": "synthetic", "synthetic-size": 240, "secagg": False,
    "privacy": "none", "partition": "iid", "partition-min-size": 5, "batch-size": 512,
    "model-width": 0.03125, "allow-random-base": True, "judged-by": "hospitals",
}  # fmt: skip
CONFIG = RunConfig.parse(VALUES)
ALLOWED = (
    'version = 1\n[aggregation]\nsecagg = "optional"\nrequire-roster = false\n'
    '[privacy]\nallow-non-private = true\n[vectors]\nsend = "any"\n'
)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return get_weights(build(SPEC, seed=0))


@pytest.fixture
def grid(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> InProcessGrid:
    """Six hospitals that have delivered a vector for ``weights``."""
    return delivered(InProcessGrid(app, 6, VALUES), weights, monkeypatch)


def delivered(
    grid: InProcessGrid, weights: Weights, monkeypatch: pytest.MonkeyPatch, run: str = RUN
) -> InProcessGrid:
    """What the vectors hold does not matter here: they are not trained."""

    def untrained(offered: Any, name: str, hospital: Any, context: Any) -> tuning.Tuned:
        zeros = {k: np.full_like(v, 1e-3) for k, v in sorted(offered.weights.items())}
        return tuning.Tuned(zeros, 20, None, None, {})

    with monkeypatch.context() as patch:
        patch.setattr(tuning, "tune", untrained)
        for context in grid.contexts.values():
            offered = Offer(run=run, version=0, base=base_id(SPEC.digest(), weights),
                            model_digest=SPEC.digest(), weights=weights)  # fmt: skip
            answer = app(Message(offered.to_record(), 1000, "query.offer"), context)
            assert Refusal.in_record(answer.content) is None
    return grid


def moved(weights: Weights, by: float) -> Weights:
    return {k: v + np.float32(by) for k, v in weights.items()}


def cohort(*hospitals: int) -> dict[str, int]:
    return {f"hospital-0{i}": 1000 + i for i in hospitals or range(6)}


def asked(
    weights: Weights, candidate: Weights, *, number: int = 1, run: str = RUN,
    binding: dict[str, Any] | None = None, invited: bool = True,
) -> Comparison:  # fmt: skip
    """A comparison; ``binding``: what a lying server puts into its invitation."""
    bare = Comparison(
        run=run, round=number, base=base_id(SPEC.digest(), weights), model_digest=SPEC.digest(),
        current=weights, candidate=candidate,
    )  # fmt: skip
    told: dict[str, Any] = {
        "run": run, "round": number, "purpose": JUDGE, "params": params_for(CONFIG, 6),
        "layout": layout_for(JUDGE, 0, CONFIG), "model_hash": bare.models,
        "terms": terms_for(CONFIG),
    } | (binding or {})  # fmt: skip
    invitation = RoundBinding(**told).to_bytes() if invited else b""
    return Comparison(
        run=run, round=number, base=bare.base, model_digest=bare.model_digest,
        current=weights, candidate=candidate, invitation=invitation,
    )  # fmt: skip


def judge(grid: InProcessGrid, who: dict[str, int], question: Comparison) -> SecureSum:
    return secure_sum(
        grid, who, RoundBinding.from_bytes(question.invitation),
        Question(lambda _: question.to_record(), "query.judge", "judge", 20.0, lambda: 20.0),
    )  # fmt: skip


def reasons(found: SecureSum) -> set[tuple[str, str]]:
    return {(a.stage, a.reason.split(" (")[0]) for a in found.absent}


def alone(question: Comparison, **config: Any) -> RecordDict:
    """What the first hospital of a run, which has delivered nothing, answers."""
    values = VALUES | {key.replace("_", "-"): value for key, value in config.items()}
    context = InProcessGrid(app, 6, values).contexts[0]
    return app(Message(question.to_record(), 1000, "query.judge"), context).content


def code(record: RecordDict) -> str | None:
    refusal = Refusal.in_record(record)
    return None if refusal is None else refusal.code

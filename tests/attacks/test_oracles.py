"""A server that asks so that a refusal, in the clear and of one hospital alone, is an answer.

Before: a crafted model overflowed on one image, and the code of the refusal told whether a hospital
has that image (6 of 6 right); ``max-examples``, lowered step by step, found a hospital's exact
number of images in 14 queries.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client_app import work as hospital_work
from client_app.data import data_of
from client_app.hospital import Hospital
from client_app.opaque import WorkFailed, one_code
from client_app.policy import Compute, ComputeRefusal, HospitalPolicy
from client_app.work import within
from common.aggregation import TRAIN, VALIDATE
from common.config import RunConfig
from common.errors import ConfigError
from common.messages import Job
from common.model import Weights, build, set_weights
from common.privacy.figures import Figures
from common.training import to_tensor
from tests.attacks.federation import SMALL, Federation, flat


def logits_of(federation: Federation, weights: Weights, hospital: int) -> torch.Tensor:
    """(N, classes): what the model says of one hospital's training images."""
    model = build(federation.spec)
    set_weights(model, weights)
    images = data_of(Hospital.from_context(federation.grid.contexts[hospital])).train.images
    with torch.no_grad():
        found: torch.Tensor = model.eval()(images)
    return found


def overflows_on_one_image(federation: Federation) -> Weights:
    """Finite weights whose logits overflow on one image of all the hospitals'.

    All classes read the one unit in which some image stands out most.
    """
    weights = federation.weights()
    for name in ("block3.body.4.weight", "block3.body.4.bias"):  # features are 2^20 as large
        weights[name] = weights[name] * np.float32(2.0**20)
    units = len(weights["head.weight"][0])
    weights["head.bias"] = np.zeros_like(weights["head.bias"])
    probe = weights | {"head.weight": np.zeros_like(weights["head.weight"])}
    seen = []
    for start in range(0, units, 8):  # eight units at a time, through the eight classes
        probe["head.weight"] = np.eye(8, units, start, dtype=np.float32)
        every = [logits_of(federation, probe, i) for i in range(federation.grid.num_hospitals)]
        seen.append(torch.cat(every).double())
    two = torch.cat(seen, 1)[:, :units].abs().topk(2, dim=0).values
    alive = two[1] > 1.0  # at two images or more
    unit = int(torch.where(alive, two[0] / two[1], 0.0).argmax())
    head = np.zeros_like(weights["head.weight"])
    head[:, unit] = 3.4028e38 / float((two[0, unit] * two[1, unit]).sqrt())
    return weights | {"head.weight": head}


@pytest.mark.parametrize("privacy", ["none", "local"])
def test_a_model_that_overflows_is_answered_like_any_other(privacy: str) -> None:
    values = {"privacy": privacy, "epsilon": 4.0, "rounds": 3, "batch-size": 16}
    limits = "allow-non-private = true\ntotal-epsilon = 8.0"
    federation = Federation.of(4, values, privacy=limits)
    weights = federation.weights()
    weights["head.weight"] = np.full_like(weights["head.weight"], 3e38)
    outcome = federation.round(weights)
    assert len(outcome.contributed) == 4
    assert outcome.mean_update is not None
    assert np.isfinite(flat(outcome.mean_update)).all()
    if privacy == "none":  # nothing came of it, anywhere: zeros
        assert not flat(outcome.mean_update).any()


def test_a_model_that_overflows_on_one_image_tells_nobody_whose_it_is() -> None:
    """The hospital that has the image answers as all others do."""
    federation = Federation.of(4, {"batch-size": 8})
    weights = overflows_on_one_image(federation)
    wrong = [int((~logits_of(federation, weights, i).isfinite()).any(1).sum()) for i in range(4)]
    assert sorted(wrong) == [0, 0, 0, 1]
    invitation = federation.invitation(weights, TRAIN)
    job = Job("run-1", 1, federation.spec.digest(), weights, invitation)
    assert [federation.ask(i, TRAIN, job) for i in range(4)] == [None] * 4


@pytest.mark.parametrize("purpose", [TRAIN, VALIDATE])
def test_no_limit_of_a_servers_is_an_answer_about_the_number_of_images(purpose: str) -> None:
    federation = Federation.of(4)
    held = data_of(Hospital.from_context(federation.grid.contexts[0]))
    count = len(held.train if purpose == TRAIN else held.val)
    weights = federation.weights()
    answers = set()
    for number, most in enumerate((1, count - 1, count, count + 1, 16384)):
        federation.tell(0, max_examples=most)
        config = RunConfig.parse(federation.grid.contexts[0].run_config)
        run = f"run-{number}"
        federation.grid.contexts[0].run_id += 1
        invitation = federation.invitation(weights, purpose, run=run, config=config)
        job = Job(run, 1, federation.spec.digest(), weights, invitation)
        answers.add(federation.ask(0, purpose, job))
    assert answers == {None}


def test_whatever_fails_on_private_data_has_one_code(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = Federation.of(4)
    weights = federation.weights()
    invited = federation.invitation(weights, TRAIN)
    job = Job("run-1", 1, federation.spec.digest(), weights, invited)
    found = set()
    for error in (MemoryError(), ValueError("x"), ConfigError("a", "b"), IndexError(3)):

        def fails(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        for name in ("train", "evaluate"):
            with monkeypatch.context() as patch:
                patch.setattr(hospital_work, name, fails)
                found.add(federation.ask(0, TRAIN, job))
    assert found == {"failed"}


def test_the_cause_is_in_the_hospitals_own_log_only() -> None:
    with pytest.raises(WorkFailed) as caught, one_code():
        raise ValueError("image 17 of ward 3")
    assert "ward" not in str(caught.value)
    assert "ward" in str(caught.value.__cause__)


def test_figures_of_more_images_than_a_sum_takes_are_scaled_not_refused() -> None:
    assert within(Figures(100, 90.0, 50.0), 200) == Figures(100, 90.0, 50.0)
    scaled = within(Figures(400, 300.0, 50.0), 200)
    assert (scaled.examples, scaled.correct, scaled.loss_sum) == (200, 150.0, 25.0)


def test_the_sum_of_a_hospital_with_many_images_counts_it_for_max_examples() -> None:
    federation = Federation.of(4, {"max-examples": 10})
    outcome = federation.round(federation.weights())
    assert outcome.sums["examples"] == 40
    assert outcome.sums["val-examples"] <= 40
    assert outcome.mean_update is not None


POLICY = "version = 1\n[aggregation]\nrequire-roster = false\n[compute]\n"


@pytest.mark.parametrize(
    ("limit", "key", "value"),
    [
        ("max-epochs = 3", "local-epochs", 4), ("max-rounds = 5", "rounds", 6),
        ("max-steps = 10", "local-steps", 11), ("max-batch-size = 64", "batch-size", 65),
        ("max-model-width = 0.5", "model-width", 0.75),
        ("max-views = 2", "augmentation-multiplicity", 3),
    ],
)  # fmt: skip
def test_a_policy_bounds_what_a_server_may_make_a_hospital_compute(
    limit: str, key: str, value: Any, tmp_path: Path
) -> None:
    (tmp_path / "policy.toml").write_text(POLICY + limit + "\n")
    compute = HospitalPolicy.load(tmp_path / "policy.toml").compute
    compute.check(RunConfig.parse(SMALL | {"rounds": 5}))
    with pytest.raises(ComputeRefusal, match=key):
        compute.check(RunConfig.parse(SMALL | {"rounds": 5} | {key: value}))


def test_a_model_that_is_too_large_is_refused_before_any_image_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    federation = Federation.of(4)
    policy = Path(federation.nodes[0]["policy"])
    policy.write_text(policy.read_text() + "[compute]\nmax-model-mib = 1\n")
    monkeypatch.setattr(hospital_work, "data_of", lambda *_: pytest.fail("an image was read"))
    weights = {"w": np.zeros(1 << 19, np.float32)}
    job = Job("run-1", 1, federation.spec.digest(), weights)
    assert federation.ask(0, TRAIN, replace(job, invitation=b"x")) == "policy-compute"


def test_simulated_hospitals_have_no_limits_of_their_own() -> None:
    Compute.none().check(RunConfig.parse(SMALL | {"local-epochs": 1000, "model-width": 4.0}))


def test_pictures_are_what_the_models_of_these_tests_see() -> None:
    """The crafted model rests on it: tensors are made by the product's own function."""
    images = np.zeros((1, 2, 2, 3), np.uint8)
    assert float(to_tensor(images).min()) == -1.0


def test_a_hospital_counts_for_no_more_images_than_its_roster_entry_says() -> None:
    federation = Federation.of(4, agreed=7)
    outcome = federation.round(federation.weights())
    assert outcome.sums["examples"] == 28
    assert outcome.sums["val-examples"] <= 28

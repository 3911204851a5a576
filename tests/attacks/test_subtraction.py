"""A server that sums one model over two cohorts and subtracts: one hospital's own update.

Before: with the model under another hash (a weight 0.0 sent as −0.0), or asked again in a later
round, the second sum opened, and the difference was one hospital's update, number of images, loss
and correct answers, exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client_app.agreements import AgreementRefusal, Agreements, smallest_group
from client_app.hospital import Hospital
from common.aggregation import TRAIN
from common.messages import Job
from common.model import Weights, weights_digest
from deploy.inprocess import Fault
from tests.attacks.federation import Federation, codes
from tests.server_app.running import at

FULL_BATCH = {"batch-size": 512, "learning-rate-schedule": "constant"}


def same(weights: Weights) -> Weights:
    return weights


def negative_zero(weights: Weights) -> Weights:
    """One zero as −0.0: the same model, in other bytes."""
    name = next(n for n, a in weights.items() if (a == 0).any())
    array = weights[name].copy()
    array[tuple(np.argwhere(array == 0)[0])] = -0.0
    assert array.tobytes() != weights[name].tobytes()
    return weights | {name: array}


def another_order(weights: Weights) -> Weights:
    return dict(reversed(list(weights.items())))


@pytest.mark.parametrize("disguise", [same, negative_zero, another_order])
@pytest.mark.parametrize("later", ["a later round", "another Flower run"])
def test_a_model_is_not_summed_again_over_one_hospital_less(
    disguise: Callable[[Weights], Weights], later: str
) -> None:
    federation = Federation.of(5, FULL_BATCH)
    weights = federation.weights()
    assert len(federation.round(weights).contributed) == 5
    if later == "another Flower run":
        federation = federation.another_flower_run()
    again = federation.round(disguise(weights), 0, 1, 2, 3, number=2)
    assert again.mean_update is None
    assert again.sums == {}
    assert codes(again) == {"secagg-cohort-changed"}


def test_a_model_may_be_summed_again_over_the_same_hospitals() -> None:
    """A round whose sum was lost, or a second experiment from the same first weights."""
    federation = Federation.of(5, FULL_BATCH)
    weights = federation.weights()
    federation.grid.faults.append(Fault(at("unmask", 0, 1, 2), drop_reply=True, times=3))
    assert federation.round(weights).mean_update is None
    assert len(federation.round(weights, number=2).contributed) == 5
    again = federation.another_flower_run().round(weights, number=3)
    assert len(again.contributed) == 5


def test_a_model_in_other_dtypes_is_refused_before_any_image_is_read() -> None:
    """float64 values beside the same float32 model would be one model under many hashes."""
    federation = Federation.of(4)
    weights = {n: a.astype(np.float64) for n, a in federation.weights().items()}
    invitation = federation.invitation(weights, TRAIN)
    job = Job("run-1", 1, federation.spec.digest(), weights, invitation)
    assert federation.ask(0, TRAIN, job) == "model"


def test_equal_models_have_one_digest_whatever_their_bytes() -> None:
    a = {"x": np.array([0.0, 1.5, np.nan], np.float32), "y": np.arange(3)}
    other_nan = np.array([0x7FC00001], np.uint32).view(np.float32)[0]
    b = {"y": np.arange(3).astype(">i8"), "x": np.array([-0.0, 1.5, other_nan], ">f4")}
    assert weights_digest(a) == weights_digest(b)
    for changed in ([5e-324, 1.5, np.nan], [0.0, 1.5, 0.0]):
        c = {"x": np.array(changed, np.float64), "y": np.arange(3)}
        d = {"x": np.array([0.0, 1.5, np.nan]), "y": np.arange(3)}
        assert weights_digest(c) != weights_digest(d)


def test_a_kept_private_update_is_not_summed_over_one_hospital_less() -> None:
    """Under local noise a repeated request gets the same noisy update, and costs nothing more."""
    federation = Federation.of(
        5, {"privacy": "local", "epsilon": 4.0, "rounds": 2, "batch-size": 16},
        privacy="total-epsilon = 8.0",
    )  # fmt: skip
    weights = federation.weights()
    assert len(federation.round(weights).contributed) == 5
    fewer = federation.another_flower_run().round(weights, 0, 1, 2, 3)
    assert codes(fewer) == {"secagg-cohort-changed"}
    # Another round trains again, with noise of its own: nothing is there to be subtracted.
    following = federation.another_flower_run().round(weights, 0, 1, 2, 3, number=2)
    assert len(following.contributed) == 4
    assert following.sums["val-examples"] == 0.0  # these figures are kept: in one sum only


def test_exact_figures_under_privacy_are_in_one_sum_whatever_the_run_is_called() -> None:
    """A policy with metrics = "exact": they are the same in each run, and no noise covers them."""
    federation = Federation.of(
        5, {"privacy": "local", "epsilon": 2.0, "rounds": 1, "batch-size": 16},
        privacy='total-epsilon = 8.0\nmetrics = "exact"',
    )  # fmt: skip
    weights = federation.weights()
    first = federation.round(weights, train=False)
    assert first.sums["val-examples"] > 0
    again = federation.another_flower_run()
    fewer = again.round(weights, 0, 1, 2, 3, run="run-2", train=False)
    assert fewer.sums["val-examples"] == 0.0


def test_below_the_quorum_nobody_signs_and_the_next_round_may_be_over_others() -> None:
    """An honest server must not use up a model's cohort for a round that it throws away."""
    from dataclasses import replace

    from server_app.secure_round import secure_round

    federation = Federation.of(5, FULL_BATCH)
    weights = federation.weights()
    job = Job("run-1", 1, federation.spec.digest(), weights)
    federation.grid.offline.add(4)
    few = secure_round(
        federation.grid, federation.cohort(), job, federation.config,
        train=True, roster=federation.roster, least=5,
    )  # fmt: skip
    assert few.mean_update is None
    assert "4 of 5" in str(few.failure)
    federation.grid.offline.clear()
    everyone = secure_round(
        federation.grid, federation.cohort(), replace(job, round=2), federation.config,
        train=True, roster=federation.roster, least=5,
    )  # fmt: skip
    assert len(everyone.contributed) == 5


names = st.sets(st.integers(0, 9).map(lambda i: f"h{i}"), min_size=1)


@given(st.lists(names, min_size=1, max_size=4), st.data())
def test_no_combination_of_sums_is_over_fewer_than_the_smallest_group(
    cohorts: list[set[str]], data: st.DataObject
) -> None:
    everyone = sorted(set().union(*cohorts))
    rows = np.array([[name in cohort for name in everyone] for cohort in cohorts], dtype=int)
    factors = data.draw(st.lists(st.integers(-3, 3), min_size=len(cohorts), max_size=len(cohorts)))
    left = np.count_nonzero(np.array(factors) @ rows)
    assert left == 0 or left >= len(smallest_group(cohorts))


def test_groups_that_are_told_apart_are_large_enough_or_nothing_is_signed() -> None:
    federation = Federation.of(4)
    mine = Agreements(Hospital.from_context(federation.grid.contexts[0]))
    twelve = [f"h{i:02d}" for i in range(12)]
    mine.sign("model a", twelve, 4)
    mine.sign("model a", twelve, 4)
    mine.sign("model a", twelve[:8], 4)  # tells eight and four apart
    for cohort in (twelve[:7], [*twelve, "h12"], twelve[:4] + twelve[9:], twelve[:3] + twelve[6:]):
        with pytest.raises(AgreementRefusal) as caught:
            mine.sign("model a", cohort, 4)
        assert caught.value.code == "secagg-cohort-changed"
    mine.sign("model a", twelve[4:], 4)  # thirds: each of four
    mine.sign("model b", twelve[:5], 4)  # another model
    assert mine.has_signed("model b")
    assert not mine.has_signed("model c")


def test_an_agreement_is_on_the_disk_before_it_is_relied_on() -> None:
    federation = Federation.of(4)
    hospital = Hospital.from_context(federation.grid.contexts[0])
    Agreements(hospital).sign("model a", ["a", "b", "c", "d"], 4)
    file = hospital.home / "secagg" / "agreements.sqlite"
    assert file.stat().st_mode & 0o777 == 0o600
    for left_out in itertools.combinations("abcd", 3):
        with pytest.raises(AgreementRefusal):
            Agreements(hospital).sign("model a", [*left_out, "e"], 4)


def test_what_sums_of_sparse_updates_show_is_shown_without_noise_only() -> None:
    """A unit that is alive at one hospital alone: the sum holds that hospital's own numbers there.

    Secure aggregation cannot hide it (arXiv 2508.04285); docs/secure-aggregation.md says so. Noise
    on every coordinate does.
    """
    updates = np.zeros((5, 8))
    updates[2, 3:5] = [0.25, -0.5]
    total = updates.sum(0)
    assert np.array_equal(np.flatnonzero(total), [3, 4])
    assert np.array_equal(total[3:5], updates[2, 3:5])

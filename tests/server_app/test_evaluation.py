"""Central figures, against values by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from common.datasets import ImageSet, make_synthetic
from common.model import ModelSpec, build, get_weights
from server_app.evaluation import Evaluator, figures


def test_with_dihedral_views_figures_do_not_depend_on_how_pictures_lie() -> None:
    spec = ModelSpec(width=0.0625)
    data = make_synthetic(96, seed=0)
    test, weights = data.train, get_weights(build(spec, seed=0))
    turned = dataclasses.replace(test, images=np.rot90(test.images, axes=(1, 2)).copy())

    def loss(images: ImageSet, views: str) -> float:
        evaluator = Evaluator(spec, images, data.class_names, views=views)
        found = evaluator(weights)
        assert found["examples"] == len(images.labels)
        return float(found["loss"])

    assert loss(test, "dihedral") == pytest.approx(loss(turned, "dihedral"), rel=1e-6)
    assert loss(test, "single") != pytest.approx(loss(turned, "single"), rel=1e-6)


def test_figures_of_a_small_case_by_hand() -> None:
    labels = np.array([0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.3, 0.7]])
    f = figures(labels, probabilities, ("a", "b"))
    assert f["accuracy"] == 0.75
    assert f["confusion"] == [[1, 1], [0, 2]]
    assert f["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    # One of four (positive, negative) pairs of class a is in the wrong order... none is: 0.4 > 0.3.
    assert f["macro_auc"] == pytest.approx(1.0)
    assert [c["support"] for c in f["per_class"]] == [2, 2]


def test_a_class_that_does_not_occur_is_left_out_of_the_means() -> None:
    labels = np.array([0, 1])
    f = figures(labels, np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]), ("a", "b", "c"))
    assert f["macro_f1"] == 1.0
    assert f["macro_auc"] == 1.0
    assert f["per_class"][2]["auc"] is None


def test_a_set_of_one_class_has_no_auc() -> None:
    f = figures(np.array([0, 0]), np.array([[0.8, 0.2], [0.9, 0.1]]), ("a", "b"))
    assert f["macro_auc"] is None

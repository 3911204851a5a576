"""A simulated federation: the same division at every hospital and in the server's table."""

from __future__ import annotations

import json

import numpy as np
import pytest

from common.config import RunConfig
from common.datasets import Dataset, make_synthetic
from common.simulation import hospital_splits, partition_table


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return make_synthetic(600)


@pytest.mark.parametrize("scheme", ["iid", "size-skew", "dirichlet"])
def test_every_training_image_is_at_one_hospital_on_one_side(dataset: Dataset, scheme: str) -> None:
    config = RunConfig.parse({"dataset": "synthetic", "partition": scheme})
    splits = hospital_splits(dataset, config, 4)
    images = np.concatenate([part.images for pair in splits for part in pair])
    assert len(images) == len(dataset.train)
    own = sorted(image.tobytes() for image in dataset.train.images)
    assert sorted(image.tobytes() for image in images) == own


@pytest.mark.parametrize(("asked", "kept"), [({}, 0.2), ({"validation-fraction": 0.05}, 0.05)])
def test_each_hospital_keeps_a_fifth_for_validation_or_what_the_run_says(
    dataset: Dataset, asked: dict[str, float], kept: float
) -> None:
    settings = {"dataset": "synthetic", "partition": "iid", "privacy": "none", **asked}
    for train, val in hospital_splits(dataset, RunConfig.parse(settings), 4):
        assert len(val) / (len(train) + len(val)) == pytest.approx(kept, abs=0.03)


def test_under_privacy_an_images_side_depends_on_no_other_image(dataset: Dataset) -> None:
    """The fifth is then met on average only: one image more must move no other."""
    config = RunConfig.parse({"dataset": "synthetic", "partition": "iid", "privacy": "local"})
    splits = hospital_splits(dataset, config, 2)
    shares = [len(val) / (len(train) + len(val)) for train, val in splits]
    assert all(0.1 < share < 0.3 for share in shares)
    assert shares != [pytest.approx(0.2, abs=0.001)] * 2


def test_the_table_counts_what_the_hospitals_hold(dataset: Dataset) -> None:
    config = RunConfig.parse({"dataset": "synthetic", "seed": 3})
    table = partition_table(dataset, config, 3)
    assert json.loads(json.dumps(table)) == table
    splits = hospital_splits(dataset, config, 3)
    for row, (train, val) in zip(table["hospitals"], splits, strict=True):
        assert (row["train"], row["val"]) == (len(train), len(val))
        assert sum(row["labels"]) == len(train) + len(val)
    assert [row["name"] for row in table["hospitals"]] == [f"hospital-{i:02d}" for i in range(3)]


def test_another_seed_divides_otherwise(dataset: Dataset) -> None:
    rows = [
        partition_table(dataset, RunConfig.parse({"dataset": "synthetic", "seed": s}), 4)[
            "hospitals"
        ]
        for s in (0, 0, 1)
    ]
    assert rows[0] == rows[1] != rows[2]

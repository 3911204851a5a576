"""How a simulated federation shares one data set: the same at every hospital and at the server."""

from __future__ import annotations

from typing import Any

from common.config import RunConfig
from common.datasets import Dataset, ImageSet, split_train_val
from common.partition import hospital_name, partition

VALIDATION_FRACTION = 0.2
"""Each hospital keeps 80/20 train/val, as in the paper."""


def hospital_splits(
    dataset: Dataset, config: RunConfig, num_hospitals: int
) -> list[tuple[ImageSet, ImageSet]]:
    """(train, val) of each simulated hospital, by the run's partition keys and seed.

    Every image of the data set's train split is in exactly one of them. Raises PartitionError
    where the minimum size cannot be honoured.
    """
    shares = partition(
        dataset.train.labels,
        num_hospitals,
        config.partition,
        alpha=config.partition_alpha,
        min_size=config.partition_min_size,
        seed=config.seed,
        groups=dataset.train.groups,
    )
    return [
        split_train_val(dataset.train.subset(share), VALIDATION_FRACTION, config.seed + i)
        for i, share in enumerate(shares)
    ]


def partition_table(dataset: Dataset, config: RunConfig, num_hospitals: int) -> dict[str, Any]:
    """Who holds what, JSON-ready; ``labels`` counts each class over train and val together."""
    k = dataset.num_classes
    return {
        "scheme": config.partition,
        "source": dataset.describe(),
        "classes": list(dataset.class_names),
        "hospitals": [
            {
                "name": hospital_name(i),
                "train": len(train),
                "val": len(val),
                "labels": (train.class_counts(k) + val.class_counts(k)).tolist(),
            }
            for i, (train, val) in enumerate(hospital_splits(dataset, config, num_hospitals))
        ],
    }

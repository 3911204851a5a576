"""How a simulated federation shares one data set: the same at every hospital and at the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.datasets import Dataset, ImageSet, load_cached, split_independently, split_train_val
from common.files import consilium_home
from common.partition import hospital_name, partition
from common.privacy.limits import PATIENT

VALIDATION_FRACTION = 0.2
"""Of a real hospital's images, held out to validate by (the paper's); ``validation-fraction`` is
that of simulated ones. Met on average only where an image's side may depend on no other's."""


def load_dataset(config: RunConfig) -> Dataset:
    """The run's data set, kept in this process; DataError for what is wrong with it."""
    return load_cached(
        config.dataset,
        config.data_path,
        image_size=config.image_size,
        crop=config.crop,
        synthetic_size=config.synthetic_size,
    )


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
        groups=dataset.train.linked(),
    )
    splits = []
    for i, share in enumerate(shares):
        images, seed = dataset.train.subset(share), config.seed + i
        if config.privacy == "none":
            splits.append(split_train_val(images, config.validation_fraction, seed))
        else:
            by_patient = config.privacy_unit == PATIENT
            splits.append(
                split_independently(images, config.validation_fraction, seed, by_patient=by_patient)
            )
    return splits


LEDGER = "ledger.sqlite"
"""File name of a hospital's privacy ledger."""


def simulated_hospital(name: str) -> Path:
    """Where a simulated hospital keeps what is its own."""
    return consilium_home() / "simulation" / name


def simulated_spending(run: str) -> dict[str, dict[str, float]]:
    """Hospital → ε spent in ``run`` (``epsilon``, ``prv``, ``pld``), from the hospitals' ledgers.

    Only a simulation can look there: real hospitals tell nobody what they spent beyond the
    promise of the run.
    """
    from common.privacy.ledger import Ledger

    spent = {}
    for home in sorted((consilium_home() / "simulation").glob("*")):
        found = [p for p in (home / "runs" / run / LEDGER, home / LEDGER) if p.exists()]
        if found:
            with Ledger(found[0], create=False) as ledger:
                if ledger.state(run) is not None:
                    e = ledger.spent_by_run(run)
                    spent[home.name] = {"epsilon": e.value, "prv": e.prv, "pld": e.pld}
    return spent


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

"""One hospital: its name, its directory, its images. Found from the node, never from the server.

In simulation Flower gives each node a ``partition-id``: the hospital is that share of the
run's data set. A node of a real hospital has its own configuration (coming).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Context
from torch import Tensor

from common.config import RunConfig
from common.datasets import load_cached
from common.errors import ConfigError
from common.files import consilium_home
from common.model import ModelSpec
from common.partition import hospital_name
from common.simulation import hospital_splits
from common.training import to_tensor


@dataclass(frozen=True, eq=False)
class HospitalData:
    """A hospital's images as the trainer wants them: (N, C, H, W) float32, labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    val_images: Tensor
    val_labels: Tensor
    num_classes: int

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return int(self.train_images.shape[1])


@dataclass(frozen=True, eq=False)
class Hospital:
    """Who this node is, for one run's configuration."""

    name: str
    home: Path
    """Where this hospital keeps what must survive the process."""
    config: RunConfig
    partition_id: int
    num_partitions: int

    @classmethod
    def from_context(cls, context: Context) -> Hospital:
        """The hospital of a node; ConfigError if the node or the run config is unusable."""
        node = context.node_config
        if "partition-id" not in node or "num-partitions" not in node:
            raise ConfigError(
                "this node is no simulated hospital (it has no partition-id), and nodes of real "
                "hospitals have not landed yet",
                "use `consilium simulate`, or `flwr run` in simulation mode",
            )
        partition_id = int(node["partition-id"])
        return cls(
            name=hospital_name(partition_id),
            home=consilium_home() / "simulation",
            config=RunConfig.parse(context.run_config),
            partition_id=partition_id,
            num_partitions=int(node["num-partitions"]),
        )

    def data(self) -> HospitalData:
        """The hospital's own images; DataError or PartitionError if they are unusable."""
        return _data(self.config, self.partition_id, self.num_partitions)

    def model_spec(self, data: HospitalData) -> ModelSpec:
        """The model that this hospital would train on its data."""
        return ModelSpec(
            model=self.config.model,
            width=self.config.model_width,
            num_classes=data.num_classes,
            channels=data.channels,
        )

    def run_directory(self, run: str) -> Path:
        """What this hospital keeps of one run: its accountant's state, its last update."""
        return self.home / run / self.name


# A simulation process plays many hospitals in turn: each keeps its tensors.
@lru_cache(maxsize=32)
def _data(config: RunConfig, partition_id: int, num_partitions: int) -> HospitalData:
    dataset = load_cached(config.dataset, config.data_path, image_size=config.image_size)
    train, val = hospital_splits(dataset, config, num_partitions)[partition_id]
    return HospitalData(
        train_images=to_tensor(train.images),
        train_labels=torch.from_numpy(train.labels),
        val_images=to_tensor(val.images),
        val_labels=torch.from_numpy(val.labels),
        num_classes=dataset.num_classes,
    )

"""A hospital's images as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from client_app.hospital import Hospital
from common.config import RunConfig
from common.model import ModelSpec
from common.simulation import hospital_splits, load_dataset
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


def data_of(hospital: Hospital) -> HospitalData:
    """The hospital's own images; DataError or PartitionError if they are unusable."""
    return _data(hospital.config, hospital.partition_id, hospital.num_partitions)


def model_spec(config: RunConfig, data: HospitalData) -> ModelSpec:
    """The model that a hospital would train on its data."""
    return ModelSpec(
        model=config.model,
        width=config.model_width,
        num_classes=data.num_classes,
        channels=data.channels,
    )


# A simulation process plays many hospitals in turn: each keeps its tensors.
@lru_cache(maxsize=32)
def _data(config: RunConfig, partition_id: int, num_partitions: int) -> HospitalData:
    dataset = load_dataset(config)
    train, val = hospital_splits(dataset, config, num_partitions)[partition_id]
    return HospitalData(
        train_images=to_tensor(train.images),
        train_labels=torch.from_numpy(train.labels),
        val_images=to_tensor(val.images),
        val_labels=torch.from_numpy(val.labels),
        num_classes=dataset.num_classes,
    )

"""A hospital's images as tensors, and which privacy units they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from client_app.hospital import Hospital, OwnPictures
from common.config import RunConfig
from common.datasets import ImageSet, load_folder_as_one, split_independently
from common.model import ModelSpec
from common.privacy.ledger import Subjects
from common.privacy.limits import PATIENT
from common.privacy.plan import TRAIN, VAL
from common.simulation import VALIDATION_FRACTION, hospital_splits, load_dataset
from common.training import to_tensor


@dataclass(frozen=True, eq=False)
class Part:
    """One side of a hospital's split: (N, C, H, W) float32 images, (N,) int64 labels."""

    images: Tensor
    labels: Tensor
    source: ImageSet

    def __len__(self) -> int:
        return len(self.labels)

    def units(self, unit: str) -> Tensor:
        """(N,) int64: the number of each image's privacy unit, from 0 without a gap.

        For ``image`` two pictures that are the same picture are one unit. For ``patient``
        DataError where it is not known whose an image is.
        """
        return self._patients if unit == PATIENT else self._pictures

    # Once for a hospital's pictures, and not in each round.
    @cached_property
    def _patients(self) -> Tensor:
        if not len(self):  # nobody is on this side of the split
            return torch.zeros(0, dtype=torch.int64)
        return torch.from_numpy(self.source.units().astype(np.int64))

    @cached_property
    def _pictures(self) -> Tensor:
        numbers = np.unique(self.source.digests, axis=0, return_inverse=True)[1].reshape(-1)
        return torch.from_numpy(numbers.astype(np.int64))

    def count_units(self, unit: str) -> int:
        """How many privacy units there are."""
        return int(self.units(unit).max()) + 1 if len(self) else 0

    def shared_units(self, unit: str) -> Tensor | None:
        """:meth:`units`, or None where each image is one of its own: the trainer is quicker so."""
        return self.units(unit) if self.count_units(unit) < len(self) else None


@dataclass(frozen=True, eq=False)
class HospitalData:
    """A hospital's images, divided into training and validation."""

    train: Part
    val: Part
    num_classes: int

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return int(self.train.images.shape[1])

    def subjects(self) -> Mapping[str, Subjects]:
        """Which images, and whose, as the privacy ledger asks."""
        return {
            name: Subjects(part.source.digests, part.source.patients)
            for name, part in ((TRAIN, self.train), (VAL, self.val))
        }


def data_of(hospital: Hospital) -> HospitalData:
    """The hospital's own images; DataError or PartitionError if they are unusable."""
    if hospital.own is not None:
        c = hospital.config
        by_patient = c.privacy_unit == PATIENT
        return _own(hospital.own, c.image_size, c.channels, len(c.class_names), by_patient)
    return _data(hospital.config, hospital.partition_id, hospital.num_partitions)


def model_spec(config: RunConfig, data: HospitalData) -> ModelSpec:
    """The model that a hospital would train on its data."""
    return ModelSpec.of(config, num_classes=data.num_classes, channels=data.channels)


# A simulation process plays many hospitals in turn: each keeps its tensors.
@lru_cache(maxsize=32)
def _data(config: RunConfig, partition_id: int, num_partitions: int) -> HospitalData:
    dataset = load_dataset(config)
    train, val = hospital_splits(dataset, config, num_partitions)[partition_id]
    return HospitalData(_part(train), _part(val), dataset.num_classes)


def _own(
    own: OwnPictures, image_size: int, channels: int, num_classes: int, by_patient: bool
) -> HospitalData:
    """A real hospital's pictures under the federation's class numbers.

    Which side a picture is on is the hospital's to fix: no server's seed has a say.
    """
    images, _, _ = load_folder_as_one(
        own.folder,
        own.names,
        image_size=image_size,
        channels=channels,
        crop=own.crop,
        manifest=own.manifest or "",
    )
    labelled = replace(images, labels=np.array(own.numbers, dtype=np.int64)[images.labels])
    train, val = split_independently(labelled, VALIDATION_FRACTION, by_patient=by_patient)
    return HospitalData(_part(train), _part(val), num_classes)


def _part(images: ImageSet) -> Part:
    return Part(to_tensor(images.images), torch.from_numpy(images.labels), images)

"""A whole federation in one folder on one machine: for trying out, and for docker compose.

``DIR/demo.json`` says what was asked for, ``DIR/coordinator`` is the coordinator's folder, and
``DIR/hospital-00`` and so on are the hospitals', joined, each with its pictures in ``data``. Each
step goes through the same functions as between real hospitals. All private keys lie on one machine
here, so it protects nobody: never use it with anybody's real data.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from client_app.hospital_file import HospitalFolder
from common.datasets import Dataset, ImageSet, load_npz, make_synthetic
from common.errors import ConfigError
from common.files import read_json, write_json
from common.partition import hospital_name, partition
from deploy.provision import federation, hospital, members
from deploy.provision.federation import FederationFolder
from deploy.provision.files import claim
from deploy.provision.keys import coordinator_fingerprint
from deploy.provision.kit import Kit

DAYS = 365
_FEWEST = 4
"""Pictures that each hospital has at least: any fewer cannot be split into train and val."""


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What the demonstration is made of."""

    hospitals: int
    name: str
    address: str
    hosts: Sequence[str]
    data: Path | None
    """A MedMNIST-form file; None: built-in synthetic cells."""
    images: int
    """Synthetic images in all, of which three quarters are the hospitals'."""
    image_size: int
    """Of synthetic images."""


def make(root: Path, demo: Demo, now: datetime) -> list[Path]:
    """Make everything, or complete it after a crash; the hospitals' folders.

    DataError or PartitionError for a data set that cannot be used; ConfigError for a folder that
    holds something else, or a demonstration with other arguments.
    """
    dataset = (
        load_npz(demo.data)
        if demo.data is not None
        else make_synthetic(demo.images, image_size=demo.image_size)
    )
    size, width, channels = dataset.image_shape
    if size != width:
        raise ConfigError(f"the images of {demo.data} are no squares", "cut or pad them to squares")
    settings = federation.make_settings(
        name=demo.name,
        address=demo.address,
        hosts=demo.hosts,
        classes=dataset.class_names,
        image_size=size,
        channels=channels,
    )
    names = [hospital_name(i) for i in range(demo.hospitals)]
    train = dataset.train
    shares = partition(
        train.labels, demo.hospitals, "size-skew", min_size=_FEWEST, groups=train.linked()
    )
    marker = root / "demo.json"
    claim(root, marker)
    asked = {"version": 1, "hospitals": demo.hospitals, "data-sha256": dataset.sha256}
    if not marker.exists():
        write_json(marker, asked)
    elif read_json(marker) != asked:
        raise ConfigError(
            f"{root} is a demonstration with other hospitals or data", "name another folder"
        )
    coordinator = FederationFolder(root / "coordinator")
    federation.init(coordinator, settings, now, days=DAYS)
    for name, share in zip(names, shares, strict=True):
        folder = HospitalFolder(root / name)
        request = hospital.init(folder, name, now)
        _write_pictures(folder.root / "data", train.subset(share), dataset)
        members.admit(coordinator, request, now, days=DAYS)
    for name in names:
        # After the last admission, so that everybody's roster has everybody.
        folder = HospitalFolder(root / name)
        joined = hospital.join(
            folder, Kit.read(coordinator.kits / name), coordinator.public_key(), now
        )
        # One person makes all of it, so nobody is a stranger to anybody.
        hospital.accept(folder, {one.name: one.identity for one in joined.waiting}, now)
    return [root / name for name in names]


def fingerprint(root: Path) -> str:
    """Of the demonstration's coordinator."""
    return coordinator_fingerprint(FederationFolder(root / "coordinator").public_key())


def _write_pictures(folder: Path, images: ImageSet, dataset: Dataset) -> None:
    """One PNG a picture under its class, and under its patient where patients are known.

    The folder gets its name when it is complete: one that is there is whole.
    """
    from PIL import Image

    if folder.exists():
        return
    making = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(making, ignore_errors=True)
    for number, (pixels, label) in enumerate(zip(images.images, images.labels, strict=True)):
        place = making / dataset.class_names[label]
        if images.has_patients:
            place /= str(images.groups[number])
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        grey = pixels.shape[2] == 1
        picture = Image.fromarray(pixels[..., 0] if grey else pixels)
        picture.save(place / f"{number:05d}.png")
    os.rename(making, folder)

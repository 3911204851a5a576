"""One hospital: its name, its directory, its policy. Found from the node, never from the server.

In simulation Flower gives each node a ``partition-id``: the hospital is that share of the
run's data set. The node config of a real hospital names its folder (``hospital``), which holds
pictures, keys, policy and what the coordinator signed (:mod:`client_app.hospital_file`).

No torch here: the short stages of secure aggregation must not pay for importing it.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Context

from client_app.hospital_file import HospitalFile, HospitalFolder
from client_app.policy import HospitalPolicy
from common.config import RunConfig
from common.errors import ConfigError
from common.files import consilium_home
from common.partition import hospital_name
from common.privacy.limits import PrivacyLimits
from common.simulation import LEDGER, simulated_hospital


@dataclass(frozen=True)
class OwnPictures:
    """Where a real hospital's pictures lie, and what its names for the classes mean."""

    folder: Path
    manifest: Path | None
    crop: int
    names: tuple[str, ...]
    """Its own class names …"""
    numbers: tuple[int, ...]
    """… and which of the federation's classes each of them is."""


@dataclass(frozen=True, eq=False)
class Hospital:
    """Who this node is, for one run's configuration."""

    name: str
    home: Path
    """Where this hospital keeps what must survive the process."""
    config: RunConfig
    partition_id: int
    """Which share of a simulated data set; of a real hospital a number that its name gives."""
    num_partitions: int
    flower_run: int = 0
    """Flower's id of the run: the SuperLink's, not the ServerApp's, to choose."""
    policy: HospitalPolicy = field(default_factory=HospitalPolicy.for_simulation)
    own: OwnPictures | None = None
    """The pictures of a real hospital; None: a share of the run's data set."""

    @classmethod
    def from_context(cls, context: Context) -> Hospital:
        """The hospital of a node; ConfigError if the node or the run config is unusable."""
        node = context.node_config
        if "hospital" in node:
            return cls._real(HospitalFolder(Path(str(node["hospital"]))), context)
        if "partition-id" not in node or "num-partitions" not in node:
            raise ConfigError(
                "this node's config names neither a hospital's folder nor a partition-id",
                "set its node config's `hospital` to the folder that `consilium hospital init` "
                "made; in simulation Flower gives the partition-id",
            )
        partition_id = int(node["partition-id"])
        return cls(
            name=hospital_name(partition_id),
            home=home_of(context),
            config=RunConfig.parse(context.run_config),
            partition_id=partition_id,
            num_partitions=int(node["num-partitions"]),
            flower_run=context.run_id,
            policy=_policy(node.get("policy")),
        )

    @classmethod
    def _real(cls, folder: HospitalFolder, context: Context) -> Hospital:
        file, config = HospitalFile.load(folder.file), RunConfig.parse(context.run_config)
        agreed = folder.load_federation().description
        asked = (config.class_names, config.image_size, config.channels)
        if config.dataset != "hospitals" or asked != (
            agreed.classes,
            agreed.image_size,
            agreed.channels,
        ):
            raise ConfigError(
                f"the run is on dataset '{config.dataset}', {len(asked[0])} classes, "
                f"{asked[1]} pixels, {asked[2]} channel(s): not what this hospital joined",
                "ask the coordinator for dataset=hospitals with the federation's classes, "
                "image-size and channels",
            )
        names, numbers = file.own_classes(agreed.classes)
        return cls(
            name=file.name,
            home=folder.root,
            config=config,
            partition_id=int.from_bytes(hashlib.sha256(file.name.encode()).digest()[:4], "big"),
            num_partitions=1,
            flower_run=context.run_id,
            policy=HospitalPolicy.load(folder.policy),
            own=OwnPictures(file.folder, file.manifest, file.crop, names, numbers),
        )

    def run_directory(self, run: str) -> Path:
        """What this hospital keeps of one run: the last update, what was validated."""
        return self.home / "runs" / run

    def ledger(self, run: str) -> Path:
        """The privacy ledger: one for all runs.

        In a simulation without a policy there is nothing to add up: each run has a ledger for
        itself, and stays as fast as the first. Not so under a policy without a total: it may get
        one, which then counts what was done before.
        """
        alone = self.policy.privacy == PrivacyLimits.none()
        return (self.run_directory(run) if alone else self.home) / LEDGER

    def made_directory(self, run: str) -> Path:
        """:meth:`run_directory`, there and nobody else's to read, for what must be kept of a run.

        To be called where something is written that the run has paid for, and not before: whoever
        asks under ever new names would leave a folder for each otherwise. Folders in which nothing
        was kept (an earlier version made them for every request) are removed by the way.
        """
        directory = self.run_directory(run)
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # its own mode, too
            for other in directory.parent.iterdir():
                _remove_if_nothing_is_kept(other)
            directory.mkdir(exist_ok=True, mode=0o700)
        return directory

    @contextmanager
    def alone_in(self, run: str) -> Iterator[Path]:
        """The run's directory, with no other process of this hospital in it meanwhile.

        It need not be there yet (:meth:`made_directory`). A node may work on two messages at a
        time: asked for the same round twice, it must train once. The operating system frees the
        lock of a process that dies. There are :data:`_LOCKS` of them, whatever runs are called;
        two runs that share one wait for each other.
        """
        folder = self.home / "locks"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / f"{hashlib.sha256(run.encode()).digest()[0] % _LOCKS:02d}"
        with path.open("w") as file:
            path.chmod(0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            yield self.run_directory(run)


_LOCKS = 64


def _remove_if_nothing_is_kept(directory: Path) -> None:
    with suppress(OSError):  # another process was faster, or it is no folder
        # Not an empty one: another process may be about to write into it.
        if [entry.name for entry in directory.iterdir()] == ["lock"]:
            (directory / "lock").unlink()
            directory.rmdir()


def home_of(context: Context) -> Path:
    """The hospital's own directory; for a node that is no hospital, consilium's home."""
    if "hospital" in context.node_config:
        return Path(str(context.node_config["hospital"]))
    if "partition-id" not in context.node_config:
        return consilium_home()
    return simulated_hospital(hospital_name(int(context.node_config["partition-id"])))


def _policy(path: object) -> HospitalPolicy:
    """The node's policy file; where it names none, ``policy.toml`` in consilium's home.

    A simulation without either has no limits of its own.
    """
    if path is not None:
        return HospitalPolicy.load(Path(str(path)))
    default = consilium_home() / "policy.toml"
    return HospitalPolicy.load(default) if default.exists() else HospitalPolicy.for_simulation()

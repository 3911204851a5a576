"""What a run is about: classes, images, a central test set if there is one, who takes part.

In simulation the coordinator reads the data set that the hospitals share; its test split is the
central test set, and who holds what is drawn up here. In a federation of real machines
(``dataset="hospitals"``) the coordinator sees no picture of theirs: it knows the classes and the
form of the images, who is on the roster, and has a test set only if it brings one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.datasets import ImageSet, load_npz
from common.errors import ConfigError
from common.simulation import load_dataset, partition_table


@dataclass(frozen=True, eq=False)
class Setting:
    """What is known of a run before any hospital is asked."""

    class_names: tuple[str, ...]
    channels: int
    source: str
    sha256: str
    hospitals: int
    """How many are waited for."""
    members: tuple[str, ...] = ()
    """Names that are missed if they never come: the roster's."""
    test: ImageSet | None = None
    table: Mapping[str, Any] = field(default_factory=dict)
    """Who holds what; empty where nobody but the hospitals knows."""

    @classmethod
    def of(cls, config: RunConfig, connected: int, roster: Mapping[str, bytes] | None) -> Setting:
        """The setting of ``config``; ``connected``: hospitals that are there now."""
        if config.dataset == "hospitals":
            return cls._real(config, connected, tuple(sorted(roster or ())))
        dataset = load_dataset(config)
        return cls(
            class_names=dataset.class_names,
            channels=dataset.channels,
            source=dataset.source,
            sha256=dataset.sha256,
            hospitals=connected,
            test=dataset.test,
            table=partition_table(dataset, config, connected),
        )

    @classmethod
    def _real(cls, config: RunConfig, connected: int, members: tuple[str, ...]) -> Setting:
        names = config.class_names
        test, source, digest = None, "the hospitals' own pictures", ""
        if config.test_data:
            own = load_npz(Path(config.test_data), class_names=names)
            if own.image_shape != (config.image_size, config.image_size, config.channels):
                raise ConfigError(
                    f"the images of test-data are {own.image_shape}, those of the run "
                    f"{(config.image_size, config.image_size, config.channels)}",
                    "set image-size and channels to what the federation agreed on",
                )
            test, digest = own.test, own.sha256
            source += f"; tested on {own.source}"
        hospitals = config.hospitals or len(members) or connected
        return cls(names, config.channels, source, digest, hospitals, members, test)

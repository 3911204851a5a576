"""How many images each hospital may claim: what was agreed at admission."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.roster import images_agreed


def agreed_images(config: RunConfig, table: Mapping[str, Any]) -> dict[str, int]:
    """Most training images by hospital; empty where nothing is agreed.

    Of a federation the signed roster's; of a simulation what its partition ``table`` gives out.
    """
    if config.roster:
        return images_agreed(Path(config.roster), config.coordinator_key)
    return {row["name"]: int(row["train"]) for row in table.get("hospitals", ())}

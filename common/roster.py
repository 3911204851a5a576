"""Reading a roster file: who belongs to the federation today."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping
from pathlib import Path

from common.errors import ConfigError
from common.secagg import Roster


def load_roster(path: Path, coordinator_key: str) -> Mapping[str, bytes]:
    """Identity keys of the hospitals valid today (UTC); refuses a roster not signed by the key."""
    try:
        data = path.read_bytes()
        key = base64.b64decode(coordinator_key, validate=True)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"the roster {path} or the coordinator's key cannot be read ({type(e).__name__})",
            "get both anew from the coordinator",
        ) from None
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return Roster.load(data, key).identities(today)


def images_agreed(path: Path, coordinator_key: str) -> dict[str, int]:
    """Most training images by hospital, where the roster has a number; refuses as above."""
    load_roster(path, coordinator_key)
    roster = Roster.load(path.read_bytes(), base64.b64decode(coordinator_key, validate=True))
    # A roster of an earlier version has no such entry.
    found = {entry.name: getattr(entry, "max_images", None) for entry in roster.entries}
    return {name: int(most) for name, most in found.items() if most is not None}

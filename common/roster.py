"""Reading a roster file: who belongs to the federation today, and how old the file is."""

from __future__ import annotations

import base64
import datetime
from collections.abc import Mapping
from pathlib import Path

from common.errors import ConfigError
from common.secagg import Refusal, Roster


def load_roster(path: Path, coordinator_key: str) -> Mapping[str, bytes]:
    """Identity keys of the hospitals valid today (UTC); refuses a roster not signed by the key."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return read_roster(path, coordinator_key).identities(today)


def read_roster(path: Path, coordinator_key: str) -> Roster:
    """The whole roster; refuses one that is not signed by the key (base64)."""
    try:
        data = path.read_bytes()
        key = base64.b64decode(coordinator_key, validate=True)
    except (OSError, ValueError) as e:
        raise ConfigError(
            f"the roster {path} or the coordinator's key cannot be read ({type(e).__name__})",
            "get both anew from the coordinator",
        ) from None
    return Roster.load(data, key)


def check_age(roster: Roster, most_days: float, now: datetime.datetime) -> None:
    """Refuse (``secagg-roster-age``) a roster signed more than ``most_days`` before ``now``.

    With ``most_days`` = 0 any age will do. Otherwise one that does not say when it was signed is
    refused too: a server that withholds newer rosters keeps who was revoked in.
    """
    if not most_days:
        return
    if not roster.issued:
        how = "does not say when it was signed"
    else:
        signed = datetime.datetime.strptime(roster.issued, "%Y-%m-%dT%H:%M:%SZ")
        age = now - signed.replace(tzinfo=datetime.UTC)
        if age <= datetime.timedelta(days=most_days):
            return
        how = f"was signed on {roster.issued}, {age.days} days ago"
    raise Refusal(
        "secagg-roster-age",
        f"The roster {how}, and this hospital's policy takes none older than {most_days:g} days.",
        "Ask the coordinator for a new one (consilium federation refresh --reissue): the node "
        "fetches it by itself; or raise roster-max-age-days in the policy.",
    )


def images_agreed(path: Path, coordinator_key: str) -> dict[str, int]:
    """Most training images by hospital, where the roster has a number; Refusal as above."""
    entries = read_roster(path, coordinator_key).entries
    return {e.name: e.max_images for e in entries if e.max_images is not None}

"""How the learning rate falls while training goes on."""

from __future__ import annotations

import math

SCHEDULES = ("constant", "cosine", "late-cosine")


def learning_rate_factor(schedule: str, done: float) -> float:
    """What the learning rate is multiplied by once the share ``done`` (0 … 1) is over.

    ``constant``: 1; ``cosine``: half a cosine from 1 to 0; ``late-cosine``: 1 for the first 60 %,
    then half a cosine. ValueError for another name.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"there is no schedule '{schedule}'; use one of {', '.join(SCHEDULES)}")
    if schedule == "constant":
        return 1.0
    held = 0.6 if schedule == "late-cosine" else 0.0
    falling = min(max((done - held) / (1.0 - held), 0.0), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * falling))

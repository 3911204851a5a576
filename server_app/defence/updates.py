"""Where single updates are visible (secagg=false): each hospital's weight and norm by itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

UPDATE_FACTOR = 3.0
"""An update may be longer than the median of its round by this: honest ones under label skew are
twice as long (benchmarks/README.md)."""
_FEWEST = 4
"""Updates from which their median, and the largest share, say what is usual."""


@dataclass(frozen=True)
class Sifted:
    """The weights that a round's updates get, and why some get less or none."""

    weights: Mapping[str, float]
    set_aside: Mapping[str, str]
    """Hospital → why its update is not in the mean."""
    lowered: Mapping[str, str]
    """Hospital → why it weighs less than it claimed."""


def sift(
    claimed: Mapping[str, float],
    norms: Mapping[str, float],
    *,
    agreed: Mapping[str, int],
    most: int,
    share: float,
    room: float = 0.0,
) -> Sifted:
    """Bound what each of a round's updates adds.

    ``claimed``: images by hospital; ``norms``: L2 norms of the updates; ``agreed``, ``most``: as in
    :func:`server_app.defence.sums.weight_bound`; ``room``: for noise on the claims; ``share``:
    largest share of the weight that one hospital of four or more may have (never less than an
    equal one).
    """
    set_aside: dict[str, str] = {}
    if len(norms) >= _FEWEST:
        usual = median(norms.values())
        set_aside = {
            name: f"its update has norm {norm:.3g}, the round's median is {usual:.3g}"
            for name, norm in norms.items()
            if not norm <= UPDATE_FACTOR * usual
        }
    kept = {name: float(claimed[name]) for name in sorted(claimed) if name not in set_aside}
    lowered: dict[str, str] = {}
    for name, images in kept.items():
        allowed = agreed.get(name, most) + (room if agreed else 0.0)
        if images > allowed:
            kept[name] = float(allowed)
            lowered[name] = f"it claims {images:.0f} images where {allowed:.0f} were agreed on"
    # Among so few there is no usual share: with two hospitals one always has half or more.
    weights = capped(kept, share) if len(kept) >= _FEWEST else kept
    return Sifted(weights, set_aside, lowered)


def capped(weights: Mapping[str, float], share: float) -> dict[str, float]:
    """``weights`` of which none is above ``share`` of their sum; an equal share is always allowed.

    Of those that are above, each gets exactly ``share``; what the others have stays as it is.
    """
    found, capped_names = dict(weights), set[str]()
    share = max(share, 1 / max(len(found), 1))
    while True:
        total = sum(found.values())
        over = {n for n, w in found.items() if w > share * total * (1 + 1e-9)} | capped_names
        if over == capped_names:
            return found
        if len(over) * share >= 1 - 1e-9:
            return dict.fromkeys(found, min(found.values()))
        rest = math.fsum(w for n, w in found.items() if n not in over)
        level = share * rest / (1 - len(over) * share)
        found |= dict.fromkeys(over, level)
        capped_names = over

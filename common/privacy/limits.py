"""What a hospital allows its images to be used for: limits that no server can raise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from common.errors import PrivacyError

LEAST_CLIPPING_NORM = 1e-6
"""Smallest C of a run config. With it a coordinate that matters beside the noise (2^−24·C/√d, for
d ≤ 2^40: 6e-20), and its square, is an ordinary float32 number, above 1.2e-38. So norms could not
vanish even in float32, for anyone who computes with these figures. At the other end, C ≤ 1e6, the
square of a sum of 2^20 units of that norm is 1e24, below 3e38."""

IMAGE, PATIENT = UNITS = ("image", "patient")
NOISED, WITHHELD, EXACT = METRICS = ("noised", "withheld", "exact")


class NotAllowed(PrivacyError):
    """What was asked is beyond the hospital's privacy policy, whatever was spent before."""

    code = "privacy-policy"


class BudgetExhausted(PrivacyError):
    """What was asked would exceed what is left of the hospital's privacy budget."""

    code = "privacy-budget"


@dataclass(frozen=True, kw_only=True)
class PrivacyLimits:
    """A data-protection officer's limits. Defaults are those of a policy file that is silent."""

    total_epsilon: float = 8.0
    """ε that any image (or patient) may ever cost, over all runs; infinite: no limit."""
    total_delta: float = 2e-4
    """δ at which :attr:`total_epsilon` holds; no run may promise less than this, either."""
    run_epsilon: float = 8.0
    """ε of one run."""
    min_noise_multiplier: float = 0.4
    """Smallest σ of a training step: against accidents, since ε alone says little about one."""
    min_clipping_norm: float = LEAST_CLIPPING_NORM
    """Smallest C of a run: against programs that take norms in float32, whatever ours do."""
    allow_non_private: bool = False
    """Whether training with privacy=none is allowed at all."""
    shared_noise: bool = False
    """Whether noise may be shared among hospitals (privacy=distributed): then ε holds for what
    secure aggregation opens, and not for what this hospital sends."""
    unit: str = IMAGE
    """What ε is promised for: ``image``, or ``patient`` (all images of one)."""
    metrics: str = NOISED
    """Validation figures: ``noised`` (within ε), ``withheld``, or ``exact`` (outside ε, and
    only inside secure aggregation)."""
    hold_days: float = 7.0
    """Days after its last round for which an unfinished run keeps the rest of its budget."""

    def __post_init__(self) -> None:
        ok = (
            self.total_epsilon > 0
            and 0 < self.total_delta < 1
            and self.run_epsilon > 0
            and self.min_noise_multiplier >= 0
            and math.isfinite(self.min_noise_multiplier)
            and self.min_clipping_norm >= 0
            and math.isfinite(self.min_clipping_norm)
            and self.unit in UNITS
            and self.metrics in METRICS
            and self.hold_days >= 0
        )
        if not ok:
            raise PrivacyError(
                f"impossible privacy limits: {self}",
                "use ε > 0, 0 < δ < 1, a noise multiplier, a clipping norm and days ≥ 0, unit "
                "image or patient, metrics noised, withheld or exact",
            )

    @classmethod
    def none(cls) -> PrivacyLimits:
        """No limit at all: for simulated hospitals, which hold nobody's data."""
        return cls(
            total_epsilon=math.inf,
            total_delta=0.5,
            run_epsilon=math.inf,
            min_noise_multiplier=0.0,
            min_clipping_norm=0.0,
            allow_non_private=True,
            shared_noise=True,
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, infinite numbers as text."""
        return {k: "inf" if v == math.inf else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PrivacyLimits:
        """:meth:`as_dict` undone."""
        numbers: dict[str, Any] = {k: math.inf if v == "inf" else v for k, v in values.items()}
        return cls(**numbers)

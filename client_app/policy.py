"""A hospital's own limits, from its own TOML file. No run config reaches them.

```toml
version = 1

[aggregation]
secagg = "required"         # or "optional": then a server may ask for the update in the clear
min-cohort = 4              # fewest hospitals whose sum may be revealed
min-threshold = 4           # smallest reconstruction threshold
require-roster = true       # refuse rounds whose hospitals are not on a signed roster

[privacy]
total-epsilon = 8.0         # what any image may ever cost, over all runs (inf: no limit)
total-delta = 2e-4          # the δ at which that holds
run-epsilon = 8.0           # of one run
min-noise-multiplier = 0.4  # smallest noise of a training step, in clipping norms
min-clipping-norm = 1e-6    # smallest clipping norm of a run
allow-non-private = false   # whether privacy=none is allowed at all
unit = "image"              # or "patient": what ε is promised for
metrics = "noised"          # validation figures; or "withheld", or "exact" (outside ε)
hold-days = 7               # for which an unfinished run keeps the rest of its budget

[vectors]
send = "never"              # single task vectors, which the server sees one by one: "never",
                            # "private" (with differential privacy) or "any"
retrain = true              # train again when the server no longer takes a vector's base
evaluate = false            # judge candidates on validation images: two exact counts, told only
                            # in a sum over min-cohort hospitals or more
```

An entry that is left out has the value above. One that is unknown is an error, not ignored: a
limit that is misspelt must not silently not hold.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from common.errors import ConfigError, ConsiliumError
from common.federation_file import Table
from common.privacy.limits import PrivacyLimits
from common.secagg import SecAggPolicy

MAX_BOUND = 1e9
"""Largest range of a real segment: a sum of losses over max-examples images must fit."""


class PolicyRefusal(ConsiliumError):
    """A server asked for less than this hospital's policy allows."""

    code = "policy"


_SILENT = SecAggPolicy()


class Aggregation(Table):
    """The table ``[aggregation]``."""

    secagg: Literal["required", "optional"] = "required"
    min_cohort: int = _SILENT.min_cohort
    min_threshold: int = _SILENT.min_threshold
    require_roster: bool = True


class Privacy(Table):
    """The table ``[privacy]``."""

    total_epsilon: float = Field(PrivacyLimits.total_epsilon, gt=0)
    total_delta: float = Field(PrivacyLimits.total_delta, gt=0, lt=0.01)
    run_epsilon: float = Field(PrivacyLimits.run_epsilon, gt=0)
    min_noise_multiplier: float = Field(
        PrivacyLimits.min_noise_multiplier, ge=0, allow_inf_nan=False
    )
    min_clipping_norm: float = Field(PrivacyLimits.min_clipping_norm, ge=0, allow_inf_nan=False)
    allow_non_private: bool = PrivacyLimits.allow_non_private
    shared_noise: bool = PrivacyLimits.shared_noise
    unit: Literal["image", "patient"] = "image"
    metrics: Literal["noised", "withheld", "exact"] = "noised"
    hold_days: float = Field(PrivacyLimits.hold_days, ge=0, le=3650)


class Vectors(Table):
    """The table ``[vectors]``: it alone decides on task vectors, whatever ``secagg`` says."""

    send: Literal["never", "private", "any"] = "never"
    retrain: bool = True
    evaluate: bool = False

    def check_evaluate(self) -> None:
        """VectorsRefusal if this hospital judges no candidates."""
        if not self.evaluate:
            raise VectorsRefusal(
                "the server asked this hospital to judge a candidate on its validation images",
                "only the hospital can allow it, in its policy: [vectors] evaluate = true",
            )

    def check_send(self, *, private: bool) -> None:
        """VectorsRefusal if such a vector must not leave this hospital."""
        if self.send == "never" or (self.send == "private" and not private):
            kind = "a single vector" if self.send == "never" else "a vector without privacy"
            raise VectorsRefusal(
                f"the server asked for {kind}, which it would see by itself",
                "only the hospital can allow it, in its policy: [vectors] send",
            )


class VectorsRefusal(PolicyRefusal):
    """The hospital's policy does not let this task vector leave, be trained, or be judged."""

    code = "vectors-policy"


class _Document(Table):
    version: Literal[1]
    aggregation: Aggregation = Aggregation()
    privacy: Privacy = Privacy()
    vectors: Vectors = Vectors()


@dataclass(frozen=True)
class HospitalPolicy:
    """What a hospital takes part in. Defaults are those of a policy file that is silent."""

    secagg_required: bool = True
    secagg: SecAggPolicy = field(
        default_factory=lambda: SecAggPolicy(require_roster=True, max_bound=MAX_BOUND)
    )
    privacy: PrivacyLimits = field(default_factory=PrivacyLimits)
    vectors: Vectors = field(default_factory=Vectors)

    @classmethod
    def for_simulation(cls) -> HospitalPolicy:
        """No limit beyond the protocol's floor: simulated hospitals hold nobody's data."""
        floor = SecAggPolicy(
            min_cohort=3, min_threshold=3, min_shares=3, min_ring_bits=16, max_bound=MAX_BOUND
        )
        return cls(False, floor, PrivacyLimits.none(), Vectors(send="any", evaluate=True))

    @classmethod
    def load(cls, path: Path) -> HospitalPolicy:
        """Read a policy file; ConfigError names the file and the entry that is wrong."""
        try:
            document = tomllib.loads(path.read_text())
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"the policy {path} cannot be read: {e}",
                "restore it; nothing is trained without it",
            ) from None
        checked = _Document.read(document, f"the policy {path}")
        aggregation = checked.aggregation
        try:
            limits = SecAggPolicy(
                min_cohort=aggregation.min_cohort,
                min_threshold=aggregation.min_threshold,
                min_shares=min(aggregation.min_threshold, _SILENT.min_shares),
                require_roster=aggregation.require_roster,
                max_bound=MAX_BOUND,
            )
        except ConfigError as error:
            raise ConfigError(f"the policy {path} is wrong: {error.what}", error.remedy) from None
        privacy = PrivacyLimits(**checked.privacy.model_dump())
        return cls(aggregation.secagg == "required", limits, privacy, checked.vectors)

    def check_plain(self, config_says_secagg: bool) -> None:
        """Refuse a request that would bypass aggregation: by policy, or against the run config."""
        if self.secagg_required:
            raise PolicyRefusal(
                "the server asked for this hospital's update in the clear",
                "ask the coordinator for secagg=true; this hospital's policy requires it",
            )
        if config_says_secagg:
            raise PolicyRefusal(
                "the run config says secagg=true, and the server asked for the update in the clear",
                "treat the server as hostile until this is explained",
            )

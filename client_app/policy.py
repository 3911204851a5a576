"""A hospital's own limits, from its own TOML file. No run config reaches them.

```toml
version = 1

[aggregation]
secagg = "required"         # or "optional": then a server may ask for the update in the clear
min-cohort = 4              # fewest hospitals whose sum may be revealed
min-threshold = 4           # smallest reconstruction threshold
require-roster = true       # refuse rounds whose hospitals are not on a signed roster
accept-members = "ask"      # hospitals that join later: "ask", only those in a sum that this
                            # hospital's people have accepted (consilium hospital members); or
                            # "auto", whoever the coordinator admits, beside min-trusted accepted
min-trusted = 0             # fewest accepted hospitals, this one included, in a sum that it is in
                            # (0: as min-cohort; 1 with "auto": the coordinator's word alone)
roster-max-age-days = 0     # refuse rounds under a roster that was signed longer ago (0: any age)

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

[compute]                   # what a server may make this hospital compute
max-runs-a-day = 50         # new runs within 24 hours
max-rounds = 10000          # of a run
max-epochs = 100            # passes over the images in one request (local-epochs)
max-steps = 100000          # batches in one request (local-steps)
max-batch-size = 16384      # images a step
max-views = 32              # of each image in a step (augmentation-multiplicity)
max-model-width = 2.0       # of a network; 1.0 is the paper's DPResNet
max-hidden-units = 2048     # of a head on a prior
max-model-mib = 512         # size of the models in one request, in MiB

[egress]
rotate-mb = 16              # a larger egress.tsv is compressed and put beside; MB
max-mb = 1024               # all files of the log together: beyond it nothing leaves
listed-a-day = 200          # answers without anything of the data (refusals …) that are listed,
                            # of each kind; further ones are counted (egress-counts.json)
```

An entry that is left out has the value above. One that is unknown is an error, not ignored: a
limit that is misspelt must not silently not hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import Field

from common.config import RunConfig
from common.errors import ConfigError, ConsiliumError
from common.federation_file import Table
from common.parsing import parse_toml
from common.privacy.limits import PrivacyLimits
from common.secagg import SecAggPolicy
from common.secagg.params import MAX_COHORT

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
    accept_members: Literal["ask", "auto"] = "ask"
    min_trusted: int = Field(0, ge=0, le=MAX_COHORT)
    roster_max_age_days: float = Field(0.0, ge=0, le=3650)


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


class ComputeRefusal(PolicyRefusal):
    """A server asked this hospital to compute more than its policy allows."""

    code = "policy-compute"


class Compute(Table):
    """The table ``[compute]``: what a server may make this hospital compute."""

    max_runs_a_day: int = Field(50, ge=1)
    max_rounds: int = Field(10_000, ge=1)
    max_epochs: int = Field(100, ge=1)
    max_steps: int = Field(100_000, ge=1)
    max_batch_size: int = Field(16_384, ge=1)
    max_views: int = Field(32, ge=0)
    max_model_width: float = Field(2.0, gt=0)
    max_hidden_units: int = Field(2048, ge=0)
    max_model_mib: int = Field(512, ge=1)

    @classmethod
    def none(cls) -> Compute:
        """No limit beyond the run config's own ranges."""
        return cls.model_validate(
            {str(field.alias): 1 << 62 for field in cls.model_fields.values()}
        )

    def check(self, config: RunConfig) -> None:
        """ComputeRefusal, from the run config alone, if a request of the run would be too much."""
        for key, asked, most in (
            ("rounds", config.rounds, self.max_rounds),
            ("local-epochs", config.local_epochs, self.max_epochs),
            ("local-steps", config.local_steps, self.max_steps),
            ("batch-size", config.batch_size, self.max_batch_size),
            ("augmentation-multiplicity", config.augmentation_multiplicity, self.max_views),
            ("model-width", config.model_width, self.max_model_width),
            ("hidden-units", config.hidden_units, self.max_hidden_units),
        ):
            if asked > most:
                raise ComputeRefusal(
                    f"the run has {key}={asked:g}; this hospital computes no more than {most:g}",
                    f"ask the coordinator for a smaller {key}; the hospital may raise its limit in "
                    "its policy, table [compute]",
                )

    def check_bytes(self, size: int) -> None:
        """ComputeRefusal for models of more than ``size`` bytes in one request."""
        if size > self.max_model_mib << 20:
            raise ComputeRefusal(
                f"the request holds models of {size >> 20} MiB; this hospital takes no more than "
                f"{self.max_model_mib}",
                "train a smaller model, or ask the hospital to raise [compute] max-model-mib",
            )


class Egress(Table):
    """The table ``[egress]``: how large the log of what left may become (client_app/egress.py)."""

    rotate_mb: int = Field(16, ge=1, le=1024)
    max_mb: int = Field(1024, ge=1, le=1_000_000)
    listed_a_day: int = Field(200, ge=1, le=1_000_000)


class VectorsRefusal(PolicyRefusal):
    """The hospital's policy does not let this task vector leave, be trained, or be judged."""

    code = "vectors-policy"


class _Document(Table):
    version: Literal[1]
    aggregation: Aggregation = Aggregation()
    privacy: Privacy = Privacy()
    vectors: Vectors = Vectors()
    compute: Compute = Compute()
    egress: Egress = Egress()


@dataclass(frozen=True)
class HospitalPolicy:
    """What a hospital takes part in. Defaults are those of a policy file that is silent."""

    secagg_required: bool = True
    secagg: SecAggPolicy = field(
        default_factory=lambda: SecAggPolicy(
            require_roster=True,
            max_bound=MAX_BOUND,
            accept_members="ask",
            min_trusted=_SILENT.min_cohort,
        )
    )
    privacy: PrivacyLimits = field(default_factory=PrivacyLimits)
    vectors: Vectors = field(default_factory=Vectors)
    compute: Compute = field(default_factory=Compute)
    egress: Egress = field(default_factory=Egress)
    roster_max_age_days: float = 0.0
    """Days since a roster was signed after which it is refused in rounds; 0: never."""

    @classmethod
    def for_simulation(cls) -> HospitalPolicy:
        """No limit beyond the protocol's floor: simulated hospitals hold nobody's data."""
        floor = SecAggPolicy(
            min_cohort=3, min_threshold=3, min_shares=3, min_ring_bits=16, max_bound=MAX_BOUND
        )
        return cls(
            secagg_required=False,
            secagg=floor,
            privacy=PrivacyLimits.none(),
            vectors=Vectors(send="any", evaluate=True),
            compute=Compute.none(),
        )

    @classmethod
    def load(cls, path: Path) -> HospitalPolicy:
        """Read a policy file; ConfigError names the file and the entry that is wrong."""
        try:
            document = parse_toml(path.read_bytes())
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
                accept_members=aggregation.accept_members,
                min_trusted=aggregation.min_trusted or aggregation.min_cohort,
            )
        except ConfigError as error:
            raise ConfigError(f"the policy {path} is wrong: {error.what}", error.remedy) from None
        privacy = PrivacyLimits(**checked.privacy.model_dump())
        return cls(
            secagg_required=aggregation.secagg == "required",
            secagg=limits,
            privacy=privacy,
            vectors=checked.vectors,
            compute=checked.compute,
            egress=checked.egress,
            roster_max_age_days=aggregation.roster_max_age_days,
        )

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

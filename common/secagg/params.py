"""The public parameters of a round, and the limits that a hospital sets on them.

:class:`SecAggParams` is what the server proposes. :meth:`SecAggParams.validate` holds the
floor that nobody can lower; :class:`SecAggPolicy` is a hospital's own, stricter, limit.
Threshold floor ``3 t > 2 n``: Bonawitz et al. (CCS 2017), section 6.2, active adversary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Literal

from common.errors import ConfigError
from common.secagg import wire
from common.secagg.errors import Refusal

if TYPE_CHECKING:
    from common.secagg.layout import VectorLayout

THRESHOLD_FLOOR = 3
"""Below three, one colluding neighbour would be enough to open a hospital."""
MAX_SHARES = 101
MAX_COHORT = 4096


@dataclass(frozen=True, kw_only=True)
class SecAggParams:
    """What all parties of a round must agree on.

    num_shares: size of a neighbourhood, the hospital itself included; its secrets are
        split in so many shares (in a smaller cohort: as many as the cohort has).
    reconstruction_threshold: shares that reconstruct a secret, ``t``.
    min_cohort: fewest hospitals whose sum may be revealed.
    max_cohort: most hospitals in a round; the fixed-point scale leaves room for so many.
    ring_bits: sums are taken modulo 2**ring_bits; 16, 24, ... 64.
    min_precision_bits: a real segment whose range gets fewer bits than this is refused.
    """

    num_shares: int = 5
    reconstruction_threshold: int = 4
    min_cohort: int = 4
    max_cohort: int = 50
    ring_bits: int = 32
    min_precision_bits: int = 16

    def validate(self) -> None:
        """Raise :class:`ConfigError` unless the floor holds and the numbers fit together."""
        shares, threshold = self.num_shares, self.reconstruction_threshold
        if any(type(value) is not int for value in astuple(self)):
            raise ConfigError(
                "A secure-aggregation parameter is not an integer.", "Give whole numbers."
            )
        if not THRESHOLD_FLOOR <= threshold <= shares <= MAX_SHARES:
            raise ConfigError(
                f"Reconstruction threshold {threshold} with {shares} shares: it must be at least "
                f"{THRESHOLD_FLOOR}, at most the shares, and those at most {MAX_SHARES}.",
                "Use 4 of 5, as the published experiments do.",
            )
        if 3 * threshold <= 2 * shares:
            raise ConfigError(
                f"Reconstruction threshold {threshold} is not above two thirds of {shares} shares; "
                "an active server could split the hospitals.",
                f"Raise the threshold to {2 * shares // 3 + 1}, or use fewer shares.",
            )
        if not threshold <= self.min_cohort <= self.max_cohort <= MAX_COHORT:
            raise ConfigError(
                f"Smallest cohort {self.min_cohort}, largest {self.max_cohort}, threshold "
                f"{threshold}: they must rise in the order threshold, smallest, largest, and "
                f"end at {MAX_COHORT}.",
                "Raise min_cohort to the threshold, and max_cohort to the hospitals expected.",
            )
        if shares % 2 == 0 and shares < self.max_cohort:
            raise ConfigError(
                f"{shares} shares give each hospital an odd number of neighbours, which has no "
                f"regular ring for a cohort of {self.max_cohort}.",
                f"Use {shares + 1} shares, or lower max_cohort to {shares}.",
            )
        if self.ring_bits not in range(16, 65, 8):
            raise ConfigError(
                f"ring_bits is {self.ring_bits}.", "Use 16, 24, 32, 40, 48, 56 or 64."
            )
        if not 8 <= self.min_precision_bits <= 48:
            raise ConfigError(
                f"min_precision_bits is {self.min_precision_bits}.", "Use a value from 8 to 48."
            )

    def to_wire(self) -> list[int]:
        """The parameters as a list of integers, in the order of the fields."""
        return list(astuple(self))

    @classmethod
    def from_wire(cls, value: object) -> SecAggParams:
        """Read what :meth:`to_wire` wrote; not validated yet. Raises :class:`Refusal`."""
        fields: Sequence[int] = [wire.as_int(entry) for entry in wire.as_record(value, 6)]
        shares, threshold, smallest, largest, bits, precision = fields
        return cls(
            num_shares=shares,
            reconstruction_threshold=threshold,
            min_cohort=smallest,
            max_cohort=largest,
            ring_bits=bits,
            min_precision_bits=precision,
        )


def check_cohort(params: SecAggParams, size: int) -> None:
    """Raise :class:`Refusal` (``secagg-cohort``) unless ``size`` hospitals may form a cohort."""
    if not params.min_cohort <= size <= params.max_cohort:
        raise Refusal(
            "secagg-cohort",
            f"A cohort of {size} hospitals; this round allows {params.min_cohort} to "
            f"{params.max_cohort}.",
            "Wait until more hospitals have finished training, or raise max_cohort.",
        )


@dataclass(frozen=True, kw_only=True)
class SecAggPolicy:
    """A hospital's own limits. They can only be stricter than the floor of the protocol.

    min_cohort, min_threshold, min_shares: the least that the hospital takes part with.
    min_ring_bits: the coarsest fixed point that it accepts.
    max_length: most values in the vector. max_weight, max_bound: largest weight and range;
        a larger one would let one hospital's contribution stand out in the sum.
    require_roster: refuse a round whose identities are not on a signed roster.
    accept_members, min_trusted: who of the roster may be in a cohort: see
        :mod:`common.secagg.trust`. Where there is no roster they say nothing: nobody's identity
        is known then.
    """

    min_cohort: int = 4
    min_threshold: int = 4
    min_shares: int = 4
    min_ring_bits: int = 24
    max_length: int = 100_000_000
    max_weight: int = 1_000_000
    max_bound: float = 1e6
    require_roster: bool = False
    accept_members: Literal["ask", "auto"] = "auto"
    min_trusted: int = 0

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` if a limit lies below the protocol's own floor."""
        if self.accept_members not in ("ask", "auto"):
            raise ConfigError(
                f"The hospital's policy says accept_members = {self.accept_members!r}.",
                "Say 'ask' or 'auto'.",
            )
        if min(self.min_cohort, self.min_threshold, self.min_shares) < THRESHOLD_FLOOR:
            raise ConfigError(
                f"The hospital's policy allows a cohort, a threshold or shares below "
                f"{THRESHOLD_FLOOR}, the floor of the protocol.",
                f"A policy can only be stricter: use {THRESHOLD_FLOOR} or more.",
            )

    def check(self, params: SecAggParams, layout: VectorLayout, cohort: int | None = None) -> None:
        """Refuse (``secagg-parameters``, ``secagg-policy``, ``secagg-cohort``) what is too weak.

        ``cohort``: number of its members, once it is known. Checks the protocol's floor
        and that the layout cannot overflow as well, so that a caller needs nothing else.
        """
        try:
            params.validate()
            layout.plan(params)
        except ConfigError as error:
            raise Refusal("secagg-parameters", error.what, error.remedy) from None
        pairs = (
            ("smallest cohort", params.min_cohort, self.min_cohort),
            ("reconstruction threshold", params.reconstruction_threshold, self.min_threshold),
            ("number of shares", params.num_shares, self.min_shares),
            ("ring", params.ring_bits, self.min_ring_bits),
        )
        for what, given, least in pairs:
            if given < least:
                raise _against_policy(f"{what} {given}, below its own minimum {least}")
        if layout.length > self.max_length:
            raise _against_policy(f"{layout.length} values, above its own {self.max_length}")
        if layout.max_weight > self.max_weight:
            raise _against_policy(f"weight {layout.max_weight}, above its own {self.max_weight}")
        for segment in layout.segments:
            # Integer bounds are counts: the number of samples limits them already.
            if segment.kind == "real" and segment.bound > self.max_bound:
                raise _against_policy(
                    f"range {segment.bound:g} of {segment.name!r}, above its own {self.max_bound:g}"
                )
        if cohort is not None:
            check_cohort(params, cohort)


def _against_policy(what: str) -> Refusal:
    return Refusal(
        "secagg-policy",
        f"The server asks this hospital to take part with {what}.",
        "Ask the coordinator for a stricter run, or change this hospital's policy on purpose.",
    )

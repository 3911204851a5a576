"""A hospital's promise for one run: how much noise, for how many steps, so that ε holds in the end.

Everything that leaves a hospital in a run with privacy is in the plan:

* the numbers of its training and validation images, with two-sided geometric noise of
  :data:`COUNT_EPSILON`, drawn once for a data set. What follows uses these numbers and never the
  true ones: the sampling rate, the number of steps, FedAvg's weight, whether the run is refused;
* every training step on the training images: a Poisson-subsampled Gaussian;
* every model's figures on the validation images: one Gaussian sum a round.

An image is in training or in validation, never in both, so each side has the whole ε. The noise
is calibrated once, for every step of every round.

Where a round is one step of the server's (``server_step``), the rate is the run's and the same at
all hospitals, and a round that is asked again is drawn, and charged, again: two sums over other
hospitals would else differ by one hospital's vector. The plan has :data:`SPARE_ROUNDS` for that.
With a ``min_cohort`` above 1 the noise is that of a sum over at least so many hospitals, and stays
enough where ``colluders`` of their shares are known (:mod:`common.privacy.distributed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from common.config import LEAST_EPSILON, RunConfig
from common.errors import PrivacyError
from common.privacy.accounting import Event, calibrate
from common.privacy.distributed import NoiseShares
from common.privacy.limits import IMAGE, NOISED, UNITS, NotAllowed, PrivacyLimits

COUNT_EPSILON = 0.1
"""Pure ε of the noise on a number of images: its standard deviation is 14."""

SPARE_ROUNDS = 3
"""Rounds of one step that may be asked once more: after a server's death, or a lost exchange."""

MEAN, SECOND_MOMENT = STATISTICS = ("feature-mean", "feature-second-moment")
"""What a run that whitens features releases of them before its first step, one a round."""

_STATISTICS_NOISE = {MEAN: 30.0, SECOND_MOMENT: 2.25}
_LOCAL_STATISTICS_NOISE = {MEAN: 30.0, SECOND_MOMENT: 6.0}
"""Their noise, in multiples of that of a single release that would cost the whole ε. Where noise is
shared, a fifth of what a plan may spend (in 1/σ²) goes to the second moment; with local noise,
which a matrix bears less of, a thirty-sixth. Chosen on validation images (benchmarks/README.md)."""

TRAIN, VAL = PARTS = ("train", "val")


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a run asks for: a hospital checks it against its limits before anything else."""

    epsilon: float
    delta: float
    clipping_norm: float
    unit: str
    rounds: int
    local_epochs: int
    batch_size: int
    sampling_rate: float = 0.0
    """q where it is the run's (``server_step``); 0: it follows from batch size and images."""
    min_cohort: int = 1
    """Hospitals whose noise is in any sum that is opened; 1: each adds enough by itself."""
    colluders: int = 0
    """Of them, how many shares of the noise may be known to who looks."""
    whitening: bool = False
    """Whether the first rounds release the features' mean and second moment."""

    def __post_init__(self) -> None:
        if not (
            0 <= self.sampling_rate <= 1
            and 0 <= self.colluders < self.min_cohort
            and (self.sampling_rate > 0 or (self.min_cohort == 1 and not self.whitening))
            and self.rounds > len(self.statistics)
            and self.epsilon > 0
            and 0 < self.delta < 1
            and self.clipping_norm > 0
            and self.unit in UNITS
            and min(self.rounds, self.local_epochs, self.batch_size) >= 1
        ):
            raise PrivacyError(f"impossible promise: {self}", "check the run's configuration")

    @classmethod
    def of(cls, config: RunConfig) -> Promise:
        """What a run config asks for."""
        shared = config.privacy == "distributed"
        return cls(
            epsilon=config.epsilon,
            delta=config.delta,
            clipping_norm=config.clipping_norm,
            unit=config.privacy_unit,
            rounds=config.rounds,
            local_epochs=config.local_epochs,
            batch_size=config.batch_size,
            sampling_rate=config.sampling_rate,
            min_cohort=config.min_cohort if shared else 1,
            colluders=config.tolerated_colluders if shared else 0,
            whitening=config.whitening,
        )

    @property
    def server_step(self) -> bool:
        """Whether each round is one step over all hospitals' images."""
        return self.sampling_rate > 0

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is released once, in the first rounds, in this order."""
        return STATISTICS if self.whitening else ()

    def statistic_of(self, round: int) -> str | None:
        """What ``round`` (1 …) releases; None: a gradient."""
        return self.statistics[round - 1] if 1 <= round <= len(self.statistics) else None

    @property
    def steps(self) -> int:
        """Server steps that may be charged in all."""
        return self.rounds - len(self.statistics) + SPARE_ROUNDS

    def check(self, limits: PrivacyLimits) -> None:
        """NotAllowed if the run alone asks for more than ``limits`` allow, or for too little."""
        if self.epsilon <= LEAST_EPSILON:
            raise NotAllowed(
                f"the run asks for ε={self.epsilon:g}; the number of images alone costs "
                f"{COUNT_EPSILON:g}",
                f"ask the coordinator for an epsilon above {LEAST_EPSILON:g}",
            )
        if self.epsilon > limits.run_epsilon:
            raise NotAllowed(
                f"the run asks for ε={self.epsilon:g}; this hospital allows "
                f"{limits.run_epsilon:g} a run",
                "ask the coordinator for a smaller epsilon; run-epsilon is the hospital's to raise",
            )
        if self.delta > limits.total_delta:
            raise NotAllowed(
                f"the run asks for δ={self.delta:g}; this hospital allows {limits.total_delta:g}",
                "ask the coordinator for a smaller delta; total-delta is the hospital's to raise",
            )
        if self.clipping_norm < limits.min_clipping_norm:
            raise NotAllowed(
                f"the run clips to a norm of {self.clipping_norm:g}; this hospital allows no less "
                f"than {limits.min_clipping_norm:g}",
                "ask the coordinator for a larger clipping-norm; min-clipping-norm is the "
                "hospital's to lower",
            )
        if self.min_cohort > 1 and not limits.shared_noise:
            raise NotAllowed(
                "the run shares its noise among hospitals: what this one sends would have only a "
                "part of it, and its policy does not allow that",
                "ask the coordinator for privacy=local; only the hospital can allow it, in its "
                "policy: [privacy] shared-noise = true",
            )
        if limits.unit != IMAGE and self.unit == IMAGE:
            raise NotAllowed(
                "the run protects single images; this hospital's policy asks for patients",
                "ask the coordinator for privacy-unit=patient",
            )


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A promise with its noise. JSON-ready by ``dataclasses.asdict``."""

    promise: Promise
    train_count: int
    """Training units with noise: public."""
    val_count: int
    """Validation units with noise: public."""
    count_epsilon: float
    """Pure ε of the two numbers; one unit changes only one of them."""
    sampling_rate: float
    """q of the training steps: one over the steps of one pass."""
    steps_per_round: int
    noise_multiplier: float
    """σ of the training steps."""
    validations: int
    """How many models' figures may be released; 0: none is."""
    validation_noise_multiplier: float
    statistics: Mapping[str, float] = field(default_factory=dict)
    """σ of each statistic of the features, in multiples of its largest norm, 1."""

    @classmethod
    def calibrated(
        cls, promise: Promise, limits: PrivacyLimits, *, train_count: int, val_count: int
    ) -> RunPlan:
        """A plan whose every image costs at most (ε, δ) when all of it is done.

        ``train_count``, ``val_count``: numbers of privacy units, with their noise.
        """
        train_count, val_count = max(1, train_count), max(1, val_count)
        passes = max(1, -(-train_count // promise.batch_size))
        server = promise.server_step
        rate = promise.sampling_rate if server else 1.0 / passes
        validations = promise.rounds + 1 if limits.metrics == NOISED else 0
        return cls(
            promise=promise,
            train_count=train_count,
            val_count=val_count,
            count_epsilon=COUNT_EPSILON,
            sampling_rate=rate,
            steps_per_round=1 if server else passes * promise.local_epochs,
            noise_multiplier=step_noise(promise)
            if server
            else _noise(promise, rate, passes * promise.local_epochs * promise.rounds),
            validations=validations,
            validation_noise_multiplier=_noise(promise, 1.0, validations) if validations else 0.0,
            statistics={name: statistic_noise(promise, name) for name in promise.statistics},
        )

    @property
    def chargeable_rounds(self) -> int:
        """Rounds that may be charged in all: more than there are where a lost one is drawn anew."""
        return self.promise.steps if self.promise.server_step else self.promise.rounds

    def check(self, limits: PrivacyLimits) -> None:
        """NotAllowed where the training noise is below the limits' smallest noise multiplier."""
        if self.noise_multiplier < limits.min_noise_multiplier:
            raise NotAllowed(
                f"the run comes to a noise multiplier of {self.noise_multiplier:.3f}; this "
                f"hospital allows no less than {limits.min_noise_multiplier:g}",
                "ask the coordinator for a smaller epsilon or a larger batch-size",
            )

    def training(self, rounds: int) -> Event:
        """The training steps of ``rounds`` rounds."""
        return Event(self.noise_multiplier, self.sampling_rate, rounds * self.steps_per_round)

    def statistic(self, name: str) -> Event | None:
        """The one release of a statistic of the features; None if the plan has none."""
        if name not in self.statistics:
            return None
        return Event(self.statistics[name], 1.0, 1)

    def validation(self, models: int) -> Event | None:
        """The validation figures of ``models`` models; None if none are ever released."""
        if not self.validations:
            return None
        return Event(self.validation_noise_multiplier, 1.0, models)


def step_noise(promise: Promise) -> float:
    """σ of one server step, in clipping norms of the sum: it follows from the run config alone."""
    beside = tuple(Event(statistic_noise(promise, n), 1.0, 1) for n in promise.statistics)
    return _noise(promise, promise.sampling_rate, promise.steps, beside)


def statistic_noise(promise: Promise, name: str) -> float:
    """σ of a statistic of the features, whose largest norm is 1; from the run config alone."""
    noise = _STATISTICS_NOISE if promise.min_cohort > 1 else _LOCAL_STATISTICS_NOISE
    return noise[name] * _noise(promise, 1.0, 1)


def validation_noise(promise: Promise) -> float:
    """σ of a hospital's figures of one model, noised (:mod:`common.privacy.figures`)."""
    return _noise(promise, 1.0, promise.rounds + 1)


def shares_of(
    promise: Promise, noise_multiplier: float, dimension: int, *, clipping_norm: float | None = None
) -> NoiseShares:
    """How a hospital makes its part of a sum's noise over ``dimension`` coordinates.

    ``clipping_norm``: of a sum other than the gradients'.
    """
    return NoiseShares(
        noise_multiplier=noise_multiplier,
        clipping_norm=promise.clipping_norm if clipping_norm is None else clipping_norm,
        dimension=dimension,
        fewest=promise.min_cohort,
        known=promise.colluders,
    )


def _noise(promise: Promise, rate: float, steps: int, beside: tuple[Event, ...] = ()) -> float:
    return calibrate(
        epsilon=promise.epsilon - COUNT_EPSILON, delta=promise.delta, sampling_rate=rate,
        steps=steps, beside=beside,
    )  # fmt: skip

"""Combinations of run-config values that make no sense together, each refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from common.errors import ConfigError

if TYPE_CHECKING:
    from common.config.run import RunConfig


def _needs_path(c: RunConfig) -> None:
    if c.dataset in ("npz", "folder") and not c.data_path:
        raise ConfigError(
            f"dataset '{c.dataset}' needs a path, and 'data-path' is empty",
            f"set data-path to the {'file' if c.dataset == 'npz' else 'folder'}, "
            "or dataset to a MedMNIST name or synthetic",
        )
    if c.data_path and c.dataset not in ("npz", "folder"):
        raise ConfigError(
            f"'data-path' is set, but dataset '{c.dataset}' reads no path",
            "set dataset to npz or folder, or leave data-path empty",
        )


def _own_pictures(c: RunConfig) -> None:
    names = c.class_names
    if c.dataset == "hospitals":
        if len(names) < 2 or len(set(names)) != len(names) or not all(names):
            raise ConfigError(
                f"dataset 'hospitals' needs two classes or more, each once; 'classes' is "
                f"{c.classes!r}",
                "set classes to the federation's names, separated by commas",
            )
        if c.channels == 2:
            raise ConfigError("images have 1 or 3 channels, not 2", "set channels to 1 or 3")
    elif c.classes or c.test_data or c.hospitals:
        raise ConfigError(
            f"'classes', 'test-data' and 'hospitals' mean nothing for dataset '{c.dataset}'",
            "leave them out, or set dataset=hospitals",
        )


def _norm_allows_dp(c: RunConfig) -> None:
    if c.privacy != "none" and c.model == "resnet9":
        raise ConfigError(
            "model 'resnet9' has batch norm, which mixes the images of a batch: per-image "
            f"clipping, and so privacy '{c.privacy}', means nothing for it",
            "set model=dpresnet (group norm), or privacy=none for the comparison",
        )


def _recipe_parts(c: RunConfig) -> None:
    if c.frozen and not c.base:
        raise ConfigError(
            "'frozen' keeps parts of the model as they are, and 'base' is empty: they would stay "
            "random",
            "set base to a trained model, or leave frozen out",
        )
    if c.mode == "vectors" and (c.ema or c.frozen):
        raise ConfigError(
            "'ema' and 'frozen' are for synchronous rounds, and mode is 'vectors'",
            "leave them out, or set mode=fedavg",
        )
    if c.privacy == "none" and c.clipping != "flat":
        raise ConfigError(
            "'clipping' is of private training, and privacy is 'none'",
            "leave it out, or set privacy=local or distributed",
        )
    if c.model == "prior-head" and (
        c.augmentation_multiplicity or c.residual_norm or c.weight_standardisation or c.frozen
    ):
        raise ConfigError(
            "model 'prior-head' trains a head alone: views, norms and frozen parts are of networks",
            "leave augmentation-multiplicity, residual-norm, weight-standardisation and frozen out",
        )
    if c.hidden_units and c.model != "prior-head":
        raise ConfigError(
            f"'hidden-units' is of a head on a prior, and model is '{c.model}'",
            "leave it out, or set model=prior-head",
        )


def _prior(c: RunConfig) -> None:
    if c.whitening and not (c.model == "prior-head" and c.server_step):
        raise ConfigError(
            "'whitening' is for features of a prior in rounds of server steps",
            "set model=prior-head and server-step=true (or privacy=distributed), or leave it out",
        )
    if c.whitening and c.rounds < 3:
        raise ConfigError(
            f"whitening takes the first two rounds, and there are {c.rounds}",
            "set rounds to 3 or more",
        )
    if c.model == "prior-head" and not c.base and not c.allow_random_base:
        raise ConfigError(
            "model 'prior-head' is a head on a prior, and 'base' names none",
            "make one with `consilium prior`, and set base to its file",
        )
    if c.model == "prior-head" and c.mode != "fedavg":
        raise ConfigError(
            f"model 'prior-head' trains in synchronous rounds, and mode is '{c.mode}'",
            "set mode=fedavg, or another model",
        )
    if c.model == "prior-head" and c.privacy != "none" and not c.server_step:
        raise ConfigError(
            "under privacy model 'prior-head' trains in rounds of server steps",
            "set server-step=true, or privacy=distributed",
        )


def _server_step(c: RunConfig) -> None:
    if c.sampling_rate and not c.server_step:
        raise ConfigError(
            "'sampling-rate' is set, and rounds are not server-step: there batch-size gives the "
            "rate",
            "leave sampling-rate out, or set server-step=true",
        )
    if c.weight_decay and not c.server_step:
        raise ConfigError(
            "'weight-decay' is of the server's optimizer, and rounds are not server-step",
            "leave it out, or set server-step=true",
        )
    if not c.server_step:
        return
    what = f"privacy '{c.privacy}'" if c.privacy == "distributed" else "server-step"
    if c.mode != "fedavg":
        raise ConfigError(
            f"{what} is for synchronous rounds, and mode is '{c.mode}'",
            "set mode=fedavg; task vectors take privacy=local",
        )
    if c.privacy == "none":
        raise ConfigError(
            "server-step sums clipped gradients, and privacy is 'none'",
            "set privacy=local or distributed; without privacy leave server-step out",
        )
    if not c.secagg:
        raise ConfigError(
            f"{what} needs secure aggregation, and secagg is false: a single hospital's sum has "
            "only a share of the noise, or is not meant to be seen",
            "set secagg=true",
        )
    if c.privacy == "distributed" and c.tolerated_colluders >= c.min_cohort:
        raise ConfigError(
            f"tolerated-colluders {c.tolerated_colluders} leaves no noise that nobody knows in a "
            f"sum of min-cohort {c.min_cohort} hospitals",
            "set tolerated-colluders below min-cohort",
        )


def _vectors(c: RunConfig) -> None:
    from common.vectors import Rule

    Rule.from_text(c.merge_rule)
    if c.mode != "vectors":
        return
    if c.secagg:
        raise ConfigError(
            "mode 'vectors' sends task vectors one by one, as hospitals make them: there is no sum "
            "for secure aggregation to hide them in, and secagg is true",
            "set secagg=false, so that it is said aloud: the server sees each hospital's vector "
            "(privacy=local bounds what it tells); or use mode=fedavg",
        )
    if not c.base and not c.allow_random_base:
        raise ConfigError(
            "mode 'vectors' needs a pre-trained base: vectors trained from random weights do not "
            "add up (51 % accuracy where the hospitals' models together had 84 %)",
            "set base to a file of `consilium pretrain`, or to the id of a fedavg run; "
            "allow-random-base=true to see it fail",
        )
    if not c.versions and not c.duration:
        raise ConfigError(
            "'versions' and 'duration' are both 0: the run would never end",
            "set one of them",
        )


def _judged(c: RunConfig) -> None:
    if c.judged_by != "hospitals":
        return
    if c.mode != "vectors":
        raise ConfigError(
            f"'judged-by' is hospitals, and mode '{c.mode}' judges no candidates: its hospitals "
            "validate each round's model anyway",
            "leave judged-by out, or set mode=vectors",
        )
    if c.privacy != "none":
        raise ConfigError(
            "judged-by=hospitals tells exact counts of validation images, and privacy is "
            f"'{c.privacy}': ε is for one vector, and has no share left for what is told of each "
            "candidate afterwards",
            "set judged-by=public (images that are nobody's secret) or none; or privacy=none, "
            "where the hospitals' policies allow it",
        )


def _local_steps(c: RunConfig) -> None:
    if c.local_steps and (c.privacy != "none" or c.mode != "fedavg" or c.local_epochs != 1):
        raise ConfigError(
            "'local-steps' is for synchronous rounds without privacy, in the place of "
            "local-epochs: a private round's steps follow from its passes, which the noise is "
            "calibrated for",
            "leave local-steps out, or set privacy=none, mode=fedavg and local-epochs=1",
        )


def _simulated_only(c: RunConfig) -> None:
    if c.simulated_delay and c.dataset == "hospitals":
        raise ConfigError(
            "'simulated-delay' is for simulated hospitals", "leave it out: real ones have their own"
        )


def _threshold(c: RunConfig) -> None:
    if c.reconstruction_threshold > c.num_shares:
        raise ConfigError(
            f"reconstruction-threshold {c.reconstruction_threshold} exceeds num-shares "
            f"{c.num_shares}: no secret could ever be reconstructed",
            f"set reconstruction-threshold to at most {c.num_shares}, or raise num-shares",
        )
    if 3 * c.reconstruction_threshold <= 2 * c.num_shares:
        raise ConfigError(
            f"reconstruction-threshold {c.reconstruction_threshold} is not above 2/3 of "
            f"num-shares {c.num_shares}: a server that lies could open one hospital's update",
            f"set reconstruction-threshold to {2 * c.num_shares // 3 + 1} or more",
        )


def _cohort(c: RunConfig) -> None:
    if c.min_cohort < c.reconstruction_threshold:
        raise ConfigError(
            f"min-cohort {c.min_cohort} is below the reconstruction-threshold "
            f"{c.reconstruction_threshold}: such a cohort could never be unmasked",
            f"set min-cohort to {c.reconstruction_threshold} or more",
        )
    if c.ring_bits % 8 or c.ring_bits < 16:
        raise ConfigError(
            f"ring-bits {c.ring_bits} is no whole number of bytes", "use 16, 24, 32, ... 64"
        )
    if bool(c.roster) != bool(c.coordinator_key):
        raise ConfigError(
            "'roster' and 'coordinator-key' belong together, and only one is set",
            "set both, or neither (hospitals are then not authenticated)",
        )


LEAST_EPSILON = 0.2
"""A run must promise more: the noised number of images alone costs half of it."""


def _epsilon_useful(c: RunConfig) -> None:
    if c.privacy != "none" and c.epsilon <= LEAST_EPSILON:
        raise ConfigError(
            f"epsilon {c.epsilon} leaves nothing to train with: hospitals spend 0.1 to tell how "
            "many images they hold",
            f"set epsilon above {LEAST_EPSILON}",
        )
    if c.privacy != "none" and c.delta >= 0.01:
        raise ConfigError(
            f"delta {c.delta} allows one image in {1 / c.delta:.0f} to be published outright",
            "set delta below 1 / (images of a hospital), for example 1e-4",
        )


RULES: tuple[Callable[[RunConfig], None], ...] = (
    _needs_path, _own_pictures, _norm_allows_dp, _server_step, _recipe_parts, _prior,
    _vectors, _judged, _local_steps, _simulated_only, _threshold, _cohort, _epsilon_useful,
)  # fmt: skip

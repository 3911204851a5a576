"""A run's configuration: every key's value, checked alone and together."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from common.config.key import Value
from common.config.keys import BY_NAME, KEYS
from common.config.recipes import RECIPES
from common.config.rules import RULES
from common.errors import ConfigError
from common.schedule import learning_rate_factor


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run's configuration, checked. One attribute for each key, dashes as underscores."""

    recipe: str
    mode: str
    dataset: str
    data_path: str
    image_size: int
    crop: int
    classes: str
    channels: int
    test_data: str
    hospitals: int
    synthetic_size: int
    partition: str
    partition_alpha: float
    partition_min_size: int
    validation_fraction: float
    rounds: int
    fraction: float
    quorum: float
    connect_timeout: float
    round_timeout: float
    local_epochs: int
    local_steps: int
    batch_size: int
    learning_rate: float
    learning_rate_schedule: str
    optimizer: str
    weight_decay: float
    server_momentum: float
    model: str
    model_width: float
    residual_norm: bool
    weight_standardisation: bool
    hidden_units: int
    frozen: str
    ema: float
    test_views: str
    test_every: int
    privacy: str
    server_step: bool
    sampling_rate: float
    whitening: bool
    tolerated_colluders: int
    privacy_unit: str
    epsilon: float
    delta: float
    clipping_norm: float
    clipping: str
    augmentation_multiplicity: int
    secagg: bool
    num_shares: int
    reconstruction_threshold: int
    min_cohort: int
    ring_bits: int
    update_range: float
    max_examples: int
    defence: bool
    halves: str
    norm_factor: float
    rollback_margin: float
    adopted_by: str
    weight_cap: float
    stage_timeout: float
    base: str
    allow_random_base: bool
    merge_rule: str
    publish_every: int
    publish_quorum: int
    publish_margin: float
    judged_by: str
    max_staleness: int
    versions: int
    duration: float
    vector_timeout: float
    simulated_delay: float
    roster: str
    coordinator_key: str
    threads: int
    precision: str
    device: str
    seed: int
    resume: str

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Check ``values`` (key → value; missing keys take their default) and freeze them.

        Where 0 stands for a choice by privacy mode, the result holds the choice. A recipe's values
        stand wherever ``values`` has none, or a key's default: a server's run config always holds
        every key.

        Raises :class:`~common.errors.ConfigError` for the first key that is unknown, of the
        wrong type or out of range, then for impossible combinations.
        """
        unknown = sorted(set(values) - set(BY_NAME))
        if unknown:
            close = difflib.get_close_matches(unknown[0], BY_NAME, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ConfigError(
                f"unknown run-config key '{unknown[0]}'",
                f"{hint}`consilium config` lists every key",
            )
        values = _with_recipe(values)
        checked: dict[str, Any] = {
            key.attribute: key.check(values.get(key.name, key.default)) for key in KEYS
        }
        # Chosen on validation data (benchmarks/README.md): averaged models must stay close, which
        # wants many small steps; noise wants few large ones.
        private = checked["privacy"] != "none"
        checked["batch_size"] = checked["batch_size"] or (32 if private else 8)
        checked["learning_rate"] = checked["learning_rate"] or (1e-3 if private else 3e-4)
        checked["server_step"] = checked["server_step"] or checked["privacy"] == "distributed"
        if checked["server_step"]:
            checked["sampling_rate"] = checked["sampling_rate"] or 0.2
        checked["ring_bits"] = checked["ring_bits"] or (48 if checked["server_step"] else 32)
        if checked["device"] == "auto" and checked["model"] == "prior-head":
            checked["device"] = "cpu"  # a step on it takes less time than the way to a GPU
        config = cls(**checked)
        for rule in RULES:
            rule(config)
        return config

    def learning_rate_of(self, round: int) -> float:
        """The learning rate of ``round`` (1 … rounds)."""
        done = (round - 1) / self.rounds
        return self.learning_rate * learning_rate_factor(self.learning_rate_schedule, done)

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """The prefixes in ``frozen``."""
        return tuple(part.strip() for part in self.frozen.split(",")) if self.frozen else ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in ``classes``."""
        return tuple(name.strip() for name in self.classes.split(",")) if self.classes else ()

    def as_dict(self) -> dict[str, Value]:
        """Key → value with the run-config names (dashes), in the table's order."""
        return {key.name: getattr(self, key.attribute) for key in KEYS}


def _with_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    name = BY_NAME["recipe"].check(values.get("recipe", ""))
    chosen = RECIPES[str(name)] if name else {}
    at_default = {k for k, v in values.items() if v == BY_NAME[k].default}
    return {k: v for k, v in values.items() if k not in chosen or k not in at_default} | {
        k: v for k, v in chosen.items() if k not in values or k in at_default
    }


assert {k.attribute for k in KEYS} == {f.name for f in fields(RunConfig)}

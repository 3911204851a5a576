"""Every run-config key, once: type, default, allowed range, meaning.

The table :data:`KEYS` is the only definition. ``[tool.flwr.app.config]`` in
``pyproject.toml``, the README's table and ``consilium config`` are generated from it, and a
test keeps them true. :meth:`RunConfig.parse` is called by the ServerApp before any hospital
is asked, and by each hospital on what a server sends it: an unknown key, a wrong type, a
value out of range or an impossible combination is a :class:`~common.errors.ConfigError`
with what is wrong and what to do.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from common.errors import ConfigError

Value = bool | int | float | str

MEDMNIST_2D = (
    "bloodmnist", "breastmnist", "dermamnist", "octmnist", "organamnist", "organcmnist",
    "organsmnist", "pathmnist", "pneumoniamnist", "retinamnist", "tissuemnist",
)  # fmt: skip
"""Single-label 2D MedMNIST sets (chestmnist is multi-label, which the classifier is not)."""

DATASETS = (*MEDMNIST_2D, "npz", "folder", "synthetic", "hospitals")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One run-config key: its type is its default's type."""

    name: str
    default: Value
    meaning: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    """Whether ``low`` itself is excluded."""
    high_open: bool = False

    @property
    def attribute(self) -> str:
        """The key's name as a Python attribute of :class:`RunConfig`."""
        return self.name.replace("-", "_")

    @property
    def kind(self) -> str:
        """``bool``, ``int``, ``float`` or ``str``."""
        return type(self.default).__name__

    @property
    def allowed(self) -> str:
        """The allowed values, for people."""
        if self.choices:
            return ", ".join(self.choices) if len(self.choices) < 8 else "see meaning"
        if self.kind == "bool":
            return "true, false"
        if self.kind == "str":
            return "text"
        left = ">" if self.low_open else "≥"
        right = "<" if self.high_open else "≤"
        parts = []
        if self.low > -math.inf:
            parts.append(f"{left} {self.low:g}")
        if self.high < math.inf:
            parts.append(f"{right} {self.high:g}")
        return ", ".join(parts) or "any"

    def check(self, value: Any) -> Value:
        """Return ``value`` in this key's type; ConfigError if it is not of it or out of range.

        An int is accepted where a float is asked for (TOML writes ``6`` for ``6.0``); nothing
        else is converted, so that ``"true"`` never passes for ``true``.
        """
        if self.kind == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(self.default):
            raise ConfigError(
                f"run-config key '{self.name}' is {value!r} ({type(value).__name__}), "
                f"but must be of type {self.kind}",
                f"set {self.name} to a {self.kind}, for example {self.name}={self.as_toml()}",
            )
        if self.choices and value not in self.choices:
            close = difflib.get_close_matches(str(value), self.choices, n=1)
            hint = f"did you mean '{close[0]}'? " if close else ""
            raise ConfigError(
                f"run-config key '{self.name}' is {value!r}, which is not one of its values",
                f"{hint}use one of: {', '.join(self.choices)}",
            )
        if isinstance(value, int | float) and not isinstance(value, bool):
            below = value <= self.low if self.low_open else value < self.low
            above = value >= self.high if self.high_open else value > self.high
            if below or above or math.isnan(value):
                raise ConfigError(
                    f"run-config key '{self.name}' is {value}, out of its range",
                    f"set {self.name} to a value that is {self.allowed}",
                )
        return value

    def as_toml(self, value: Value | None = None) -> str:
        """``value`` (default: the key's default) as TOML, as ``--run-config`` wants it."""
        shown = self.default if value is None else value
        if isinstance(shown, bool):
            return str(shown).lower()
        return f'"{shown}"' if isinstance(shown, str) else repr(shown)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A run's configuration, checked. One attribute for each key, dashes as underscores."""

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
    rounds: int
    fraction: float
    quorum: float
    connect_timeout: float
    round_timeout: float
    local_epochs: int
    batch_size: int
    learning_rate: float
    learning_rate_schedule: str
    optimizer: str
    server_momentum: float
    model: str
    model_width: float
    privacy: str
    privacy_unit: str
    epsilon: float
    delta: float
    clipping_norm: float
    secagg: bool
    num_shares: int
    reconstruction_threshold: int
    min_cohort: int
    ring_bits: int
    update_range: float
    max_examples: int
    stage_timeout: float
    base: str
    allow_random_base: bool
    merge_rule: str
    publish_every: int
    publish_quorum: int
    publish_margin: float
    max_staleness: int
    versions: int
    duration: float
    vector_timeout: float
    simulated_delay: float
    roster: str
    coordinator_key: str
    threads: int
    seed: int
    resume: str

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Check ``values`` (key → value; missing keys take their default) and freeze them.

        Where 0 stands for a choice by privacy mode, the result holds the choice.

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
        checked: dict[str, Any] = {
            key.attribute: key.check(values.get(key.name, key.default)) for key in KEYS
        }
        # Chosen on validation data (benchmarks/README.md): averaged models must stay close, which
        # wants many small steps; noise wants few large ones.
        private = checked["privacy"] != "none"
        checked["batch_size"] = checked["batch_size"] or (32 if private else 8)
        checked["learning_rate"] = checked["learning_rate"] or (1e-3 if private else 3e-4)
        config = cls(**checked)
        for rule in RULES:
            rule(config)
        return config

    def learning_rate_of(self, round: int) -> float:
        """The learning rate of ``round`` (1 … rounds)."""
        if self.learning_rate_schedule == "constant":
            return self.learning_rate
        held = 0.6 if self.learning_rate_schedule == "late-cosine" else 0.0
        done = min(max(((round - 1) / self.rounds - held) / (1.0 - held), 0.0), 1.0)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in ``classes``."""
        return tuple(name.strip() for name in self.classes.split(",")) if self.classes else ()

    def as_dict(self) -> dict[str, Value]:
        """Key → value with the run-config names (dashes), in the table's order."""
        return {key.name: getattr(self, key.attribute) for key in KEYS}


KEYS: tuple[Key, ...] = (
    Key(name="mode", default="fedavg", choices=("fedavg", "vectors"),
        meaning="fedavg: synchronous rounds; vectors: task vectors, whenever a hospital has one"),
    Key(name="dataset", default="bloodmnist", choices=DATASETS,
        meaning="a 2D MedMNIST set by name, npz (a file in MedMNIST's form), folder (one folder "
        "a class), synthetic (built in, no real image); hospitals: each node's own pictures (real "
        "machines)"),
    Key(name="data-path", default="",
        meaning="the file or folder for dataset npz or folder"),
    Key(name="image-size", default=28, low=16, high=512,
        meaning="side in pixels: folder and synthetic pictures are brought to it, an npz file must "
        "have it, MedMNIST comes in 28, 64, 128 and 224"),
    Key(name="crop", default=0, low=0, high=10_000,
        meaning="folder: side in pixels of the centre that is cut out before resizing (0: the "
        "whole square; raw PBC pictures: 200)"),
    Key(name="classes", default="",
        meaning="hospitals: names of the classes, separated by commas, as the federation agreed"),
    Key(name="channels", default=3, low=1, high=3,
        meaning="hospitals: 3 for colour, 1 for grey"),
    Key(name="test-data", default="",
        meaning="hospitals: the coordinator's own npz file, whose test split measures the models; "
        "empty: none does"),
    Key(name="hospitals", default=0, low=0, high=4096,
        meaning="hospitals: how many to wait for; 0: all on the roster"),
    Key(name="synthetic-size", default=6000, low=200, high=1_000_000,
        meaning="synthetic: number of images, train, val and test together"),
    Key(name="partition", default="size-skew", choices=("iid", "size-skew", "dirichlet"),
        meaning="how simulated hospitals share one data set: iid; size-skew (the paper's: slices, "
        "up to half moved between pairs); dirichlet (label skew)"),
    Key(name="partition-alpha", default=0.5, low=0.0, low_open=True, high=1000.0,
        meaning="Dirichlet concentration; smaller is more skewed"),
    Key(name="partition-min-size", default=20, low=2, high=1_000_000,
        meaning="fewest images a simulated hospital may hold; less is refused"),
    Key(name="rounds", default=36, low=1, high=100_000,
        meaning="synchronous rounds (the paper: 50)"),
    Key(name="fraction", default=1.0, low=0.0, low_open=True, high=1.0,
        meaning="share of the hospitals asked in each round"),
    Key(name="quorum", default=0.8, low=0.0, low_open=True, high=1.0,
        meaning="share of the hospitals asked that must contribute, else the round fails"),
    Key(name="connect-timeout", default=600.0, low=0.0, low_open=True, high=604_800.0,
        meaning="seconds that hospitals have to connect before the first round"),
    Key(name="round-timeout", default=3600.0, low=0.0, low_open=True, high=604_800.0,
        meaning="seconds that hospitals have to train in a round"),
    Key(name="local-epochs", default=1, low=1, high=1000,
        meaning="passes over a hospital's training images in each round, or for each task vector "
        "(the paper: 3)"),
    Key(name="batch-size", default=0, low=0, high=65_536,
        meaning="images a step; under DP the expected size of a Poisson batch; 0: 8, under DP 32"),
    Key(name="learning-rate", default=0.0, low=0.0, high=10.0,
        meaning="of the hospital's optimizer; 0: 0.0003, under DP 0.001 (the paper's)"),
    Key(name="learning-rate-schedule", default="late-cosine",
        choices=("constant", "cosine", "late-cosine"),
        meaning="over the rounds: constant; cosine (half a cosine from learning-rate to 0); "
        "late-cosine (constant for 60 % of the rounds, then cosine)"),
    Key(name="optimizer", default="adam", choices=("adam", "sgd"),
        meaning="the hospital's optimizer; fresh each round (sgd: momentum 0.9)"),
    Key(name="server-momentum", default=0.0, low=0.0, high=1.0, high_open=True,
        meaning="share of the last round's step that is taken again (FedAvgM); free of privacy"),
    Key(name="model", default="dpresnet", choices=("dpresnet", "resnet9"),
        meaning="dpresnet: group norm, the paper's; resnet9: batch norm and max pooling, for "
        "comparison, refused under DP"),
    Key(name="model-width", default=0.25, low=0.03125, high=4.0,
        meaning="multiplies every layer's channels; 1.0 is the paper's DPResNet (4,802,120 "
        "parameters), 0.25 suits a laptop"),
    Key(name="privacy", default="local", choices=("none", "local", "distributed"),
        meaning="none; local: each hospital's own noise suffices; distributed: noise shared "
        "among hospitals (coming)"),
    Key(name="privacy-unit", default="image", choices=("image", "patient"),
        meaning="what ε is promised for: one image, or all images of a patient (then data must "
        "say whose each image is)"),
    Key(name="epsilon", default=6.0, low=0.0, low_open=True, high=1000.0,
        meaning="ε of the whole training, all rounds composed, at each hospital, per privacy "
        "unit; validation figures and image counts included; with mode=vectors of ONE vector: the "
        "hospital's ledger adds them up"),
    Key(name="delta", default=1.9e-4, low=0.0, low_open=True, high=1.0, high_open=True,
        meaning="δ of the whole training; should be below 1 / images of a hospital"),
    Key(name="clipping-norm", default=7.0, low=0.0, low_open=True, high=1e6,
        meaning="largest L2 norm of the gradient of one privacy unit"),
    Key(name="secagg", default=True,
        meaning="secure aggregation: the server sees only sums over the hospitals; mode=vectors "
        "needs false, said aloud"),
    Key(name="num-shares", default=5, low=3, high=101,
        meaning="holders of each hospital's secret shares, itself included; odd, or no fewer "
        "than the hospitals asked"),
    Key(name="reconstruction-threshold", default=4, low=3, high=101,
        meaning="shares that reconstruct a secret; more than 2/3 of num-shares"),
    Key(name="min-cohort", default=4, low=3, high=4096,
        meaning="fewest hospitals whose sum may be revealed; at least the threshold"),
    Key(name="ring-bits", default=32, low=16, high=64,
        meaning="sums are taken modulo 2^ring-bits: 16, 24, 32, ... 64"),
    Key(name="update-range", default=1.0, low=0.0, low_open=True, high=1e6,
        meaning="largest change of one weight in a round; beyond it is clipped, and the "
        "hospital's log says how often"),
    Key(name="max-examples", default=16_384, low=1, high=1_000_000,
        meaning="most images a hospital may hold under secure aggregation"),
    Key(name="stage-timeout", default=60.0, low=0.0, low_open=True, high=86_400.0,
        meaning="seconds for each stage of secure aggregation after training"),
    Key(name="base", default="",
        meaning="vectors: the first base: path of a .safetensors file (consilium pretrain makes "
        "one), or a run's id; empty: random weights, see allow-random-base"),
    Key(name="allow-random-base", default=False,
        meaning="vectors: merge vectors of random weights too; measured to fail (15 % accuracy)"),
    Key(name="merge-rule", default="mean",
        meaning="vectors: NAME or NAME key=value …: mean, sum lambda=…, norm-equalised, ties "
        "keep=…, dare drop=…; each takes scale=…"),
    Key(name="publish-every", default=0, low=0, high=4096,
        meaning="vectors: a new base after so many vectors for the current one; 0: half of the "
        "hospitals"),
    Key(name="publish-quorum", default=3, low=1, high=4096,
        meaning="vectors: fewest hospitals whose vectors make a new base"),
    Key(name="publish-margin", default=1.0, low=0.0, high=100.0,
        meaning="vectors: a new base may validate worse than the current one by so many standard "
        "errors, on public images (the data set's val split; real hospitals: test-data's); "
        "without public images nothing is checked"),
    Key(name="max-staleness", default=8, low=0, high=100_000,
        meaning="vectors: a vector for a base that is older by more bases than this is refused"),
    Key(name="versions", default=3, low=0, high=100_000,
        meaning="vectors: end after so many new bases; 0: go on until duration"),
    Key(name="duration", default=0.0, low=0.0, high=31_536_000.0,
        meaning="vectors: end after so many seconds; 0: go on until versions"),
    Key(name="vector-timeout", default=86_400.0, low=0.0, low_open=True, high=604_800.0,
        meaning="vectors: seconds after which a hospital that has not answered is asked again"),
    Key(name="simulated-delay", default=0.0, low=0.0, high=86_400.0,
        meaning="simulation: hospital i of n waits i/n times so many seconds before it trains, so "
        "that some are slower"),
    Key(name="roster", default="",
        meaning="coordinator: path of the signed roster; empty: hospitals are not authenticated"),
    Key(name="coordinator-key", default="",
        meaning="coordinator: its public key (base64), under which the roster is signed"),
    Key(name="threads", default=1, low=1, high=256,
        meaning="CPU threads of one simulated hospital's training"),
    Key(name="seed", default=0, low=0, high=2**31 - 1,
        meaning="of partition, initial weights and non-private batches; never of DP noise"),
    Key(name="resume", default="",
        meaning="id of a run to go on with from its last complete round"),
)  # fmt: skip

BY_NAME: dict[str, Key] = {key.name: key for key in KEYS}

assert {k.attribute for k in KEYS} == {f.name for f in fields(RunConfig)}


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


def _not_yet(c: RunConfig) -> None:
    if c.privacy == "distributed":
        raise ConfigError("privacy 'distributed' has not landed yet", "set privacy=local or none")


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
            "add up (15 % accuracy where the hospitals' models together have 80 %)",
            "set base to a file of `consilium pretrain`, or to the id of a fedavg run; "
            "allow-random-base=true to see it fail",
        )
    if not c.versions and not c.duration:
        raise ConfigError(
            "'versions' and 'duration' are both 0: the run would never end",
            "set one of them",
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
    if c.ring_bits % 8:
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
    _needs_path, _own_pictures, _norm_allows_dp, _not_yet, _vectors, _simulated_only, _threshold,
    _cohort, _epsilon_useful,
)  # fmt: skip


def toml_table() -> str:
    """The body of ``[tool.flwr.app.config]`` in pyproject.toml."""
    return "\n".join(f"{key.name} = {key.as_toml()}" for key in KEYS) + "\n"


def markdown_table() -> str:
    """The README's table of keys."""
    rows = [
        f"| `{k.name}` | {k.kind} | `{k.as_toml()}` | {k.allowed} | {k.meaning} |" for k in KEYS
    ]
    return "\n".join(
        ["| key | type | default | allowed | meaning |", "|---|---|---|---|---|", *rows]
    )

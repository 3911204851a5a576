"""The configuration: one table, and nothing impossible gets past it."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import BY_NAME, KEYS, RunConfig, markdown_table, toml_table
from common.config.recipes import RECIPES
from common.errors import ConfigError
from tests.conftest import ROOT

RELIED_ON = [
    "mode", "dataset", "data-path", "partition", "partition-alpha", "rounds", "local-epochs",
    "batch-size", "learning-rate", "model", "model-width", "privacy", "epsilon", "delta",
    "clipping-norm", "secagg", "num-shares", "reconstruction-threshold", "seed", "resume",
]  # fmt: skip


def test_defaults_are_a_valid_configuration() -> None:
    chosen = {"batch-size": 32, "learning-rate": 1e-3, "ring-bits": 32}
    assert RunConfig.parse({}).as_dict() == {key.name: key.default for key in KEYS} | chosen
    plain = RunConfig.parse({"privacy": "none"})
    assert (plain.batch_size, plain.learning_rate) == (8, 3e-4)


def test_names_that_later_work_relies_on_exist() -> None:
    assert set(RELIED_ON) <= set(BY_NAME)


def test_pyproject_holds_the_same_table() -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert document["tool"]["flwr"]["app"]["config"] == tomllib.loads(toml_table())


def test_readme_holds_the_same_table() -> None:
    assert markdown_table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"round": 5}, ["unknown", "round", "did you mean 'rounds'"]),
        ({"rounds": "5"}, ["rounds", "type int"]),
        ({"local-steps": 5}, ["local-steps", "privacy=none"]),  # privacy is local at its default
        ({"local-steps": 5, "privacy": "none", "local-epochs": 2}, ["local-steps", "local-epochs"]),
        ({"device": "gpu"}, ["device", "cuda"]),
        ({"rounds": True}, ["rounds", "type int"]),
        ({"rounds": 2.0}, ["rounds", "type int"]),
        ({"rounds": 0}, ["rounds", "range"]),
        ({"epsilon": float("nan")}, ["epsilon", "range"]),
        ({"epsilon": 0.0}, ["epsilon", "> 0"]),
        ({"secagg": "true"}, ["secagg", "bool"]),
        ({"dataset": "bloodmnst"}, ["dataset", "did you mean 'bloodmnist'"]),
        ({"dataset": "chestmnist"}, ["dataset"]),
        ({"dataset": "npz"}, ["data-path", "empty"]),
        ({"dataset": "synthetic", "data-path": "x.npz"}, ["data-path", "reads no path"]),
        ({"model": "resnet9"}, ["batch norm", "privacy=none"]),
        ({"reconstruction-threshold": 6}, ["exceeds num-shares"]),
        ({"reconstruction-threshold": 3}, ["2/3", "4 or more"]),
        ({"delta": 0.5}, ["delta", "published"]),
        ({"mode": "vectors"}, ["secagg=false", "sees each hospital's vector"]),
        ({"mode": "vectors", "secagg": False}, ["pre-trained base", "consilium pretrain"]),
        (
            {"mode": "vectors", "secagg": False, "base": "b.safetensors", "versions": 0},
            ["never end"],
        ),
        ({"merge-rule": "median"}, ["median", "ties"]),
        ({"simulated-delay": 1.0, "dataset": "hospitals", "classes": "a,b"}, ["simulated"]),
        ({"privacy": "distributed", "tolerated-colluders": 4}, ["min-cohort"]),
        ({"model": "prior-head", "privacy": "distributed"}, ["base", "consilium prior"]),
        ({"model": "prior-head", "base": "p.safetensors"}, ["under privacy", "server-step=true"]),
        (
            {
                "model": "prior-head",
                "base": "p.safetensors",
                "privacy": "none",
                "mode": "vectors",
                "secagg": False,
            },
            ["synchronous rounds", "mode=fedavg"],
        ),
        ({"whitening": True}, ["whitening", "prior-head"]),
        ({"hidden-units": 8}, ["hidden-units", "prior-head"]),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(values: dict[str, object], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(values)
    assert caught.value.what
    assert caught.value.remedy
    for name in names:
        assert name in str(caught.value)


def test_an_integer_is_taken_where_a_float_is_asked_for() -> None:
    assert RunConfig.parse({"epsilon": 3}).epsilon == 3.0


def test_the_learning_rate_falls_along_a_half_cosine() -> None:
    config = RunConfig.parse(
        {"rounds": 10, "learning-rate": 0.1, "learning-rate-schedule": "cosine"}
    )
    rates = [config.learning_rate_of(r) for r in range(1, 11)]
    assert rates[0] == 0.1
    assert rates == sorted(rates, reverse=True)
    assert rates[5] == pytest.approx(0.05)
    assert 0 < rates[-1] < 0.01
    constant = RunConfig.parse({"learning-rate-schedule": "constant", "learning-rate": 0.1})
    assert constant.learning_rate_of(7) == 0.1
    late = RunConfig.parse({"rounds": 10, "learning-rate": 0.1})
    rates = [late.learning_rate_of(r) for r in range(1, 11)]
    assert rates[:7] == [0.1] * 7
    assert rates[7] > rates[8] > rates[9] > 0


def test_resnet9_is_allowed_without_privacy() -> None:
    assert RunConfig.parse({"model": "resnet9", "privacy": "none"}).model == "resnet9"


@given(
    st.dictionaries(
        st.sampled_from(sorted(BY_NAME)) | st.text(),
        st.integers() | st.text() | st.floats() | st.booleans(),
    )
)
def test_anything_at_all_is_either_valid_or_a_config_error(values: dict[str, object]) -> None:
    try:
        config = RunConfig.parse(values)
    except ConfigError:
        return
    assert RunConfig.parse(config.as_dict()) == config


def test_a_recipes_values_stand_where_a_key_is_at_its_default() -> None:
    everything = {key.name: key.default for key in KEYS}  # as a server's run config always has
    config = RunConfig.parse({**everything, "recipe": "paper", "rounds": 7})
    assert (config.rounds, config.local_epochs, config.model_width) == (7, 3, 1.0)
    assert RunConfig.parse({"recipe": "paper"}).rounds == 50


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_valid_configuration(name: str) -> None:
    assert RunConfig.parse({"recipe": name, "base": "given"}).recipe == name

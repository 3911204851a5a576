"""``consilium prior``: its file is what a run's base can be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from common.config import RunConfig
from common.errors import ConfigError, ModelError
from common.model import ModelSpec, build, get_weights
from deploy.cli import cli
from server_app.first_base import first_base


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `consilium prior` made, of few pictures."""
    out = tmp_path_factory.mktemp("prior") / "prior.safetensors"
    told = CliRunner().invoke(
        cli, ["prior", "--out", str(out), "--pictures", "256", "--steps", "2"]
    )
    assert told.exit_code == 0, told.output
    assert "use it: recipe=prior-local" in told.output
    return out


def test_a_prior_that_the_command_made_is_the_base_of_a_run(prior: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy.safetensors"
    out.write_bytes(prior.read_bytes())
    config = RunConfig.parse({"recipe": "prior-local", "base": str(out)})
    spec = ModelSpec.of(config, num_classes=5, channels=3)
    base = first_base(config, spec)
    assert base.weights["head.weight"].shape == (5, spec_dimension(base.weights) + 1)
    assert not base.weights["head.weight"].any()
    assert np.array_equal(base.weights["matrix"], np.eye(spec_dimension(base.weights)))
    out.write_bytes(out.read_bytes()[:-1000])
    with pytest.raises(ModelError):
        first_base(config, spec)


def spec_dimension(weights: dict[str, np.ndarray]) -> int:
    return len(weights["mean"])


def test_a_head_fitted_to_public_pictures_is_a_base_that_knows_something(
    prior: Path, tmp_path: Path
) -> None:
    out = tmp_path / "public.safetensors"
    values = {"model": "prior-head", "dataset": "synthetic", "synthetic-size": "800"}
    told = CliRunner().invoke(
        cli,
        ["pretrain", "--out", str(out), "--set", f"base={prior}"]
        + [part for key, value in values.items() for part in ("--set", f"{key}={value}")],
    )
    assert told.exit_code == 0, told.output
    assert "mean, whitening and head fitted" in told.output
    config = RunConfig.parse({"recipe": "public-local", "base": str(out)})
    base = first_base(config, ModelSpec.of(config, num_classes=8, channels=3))
    assert base.pretrained and base.weights["head.weight"].any()
    assert not np.array_equal(base.weights["matrix"], np.eye(spec_dimension(base.weights)))
    share = float(told.output.split("%")[0].split(",")[-1])
    assert share > 30  # of eight classes, one in eight is a guess


def test_no_hidden_layer_is_fitted_to_public_pictures(prior: Path, tmp_path: Path) -> None:
    values = ("model=prior-head", f"base={prior}", "dataset=synthetic", "hidden-units=8")
    out = tmp_path / "public.safetensors"
    told = CliRunner().invoke(
        cli, ["pretrain", "--out", str(out), *(p for v in values for p in ("--set", v))]
    )
    assert isinstance(told.exception, ConfigError) and "hidden-units" in str(told.exception)
    assert not out.exists()


def test_a_published_model_in_half_precision_is_a_base_in_full(tmp_path: Path) -> None:
    config = RunConfig.parse({"base": str(tmp_path / "m.safetensors"), "model-width": 0.03125})
    spec = ModelSpec.of(config, num_classes=4, channels=3)
    halves = {n: a.astype(np.float16) for n, a in get_weights(build(spec, seed=3)).items()}
    save_file(halves, tmp_path / "m.safetensors")
    base = first_base(config, spec)
    assert {a.dtype for a in base.weights.values()} == {np.dtype(np.float32)}
    assert all(np.array_equal(base.weights[n], a.astype(np.float32)) for n, a in halves.items())

"""Bases and vectors by hand: pre-training, a harmful hospital excluded, publishing, taking back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from client_app import tuning
from common.errors import ConfigError, RoundError
from common.vectors import Base, VectorError
from deploy.cli import cli
from deploy.inprocess import run_in_process
from tests.server_app.vectors.running import the_run

SYNTHETIC = ["dataset=synthetic", "synthetic-size=1500", "model-width=0.03125"]
CONFIG: dict[str, Any] = {
    "mode": "vectors", "dataset": "synthetic", "synthetic-size": 1500, "partition": "iid",
    "batch-size": 16, "model-width": 0.03125, "privacy": "none", "secagg": False, "versions": 1,
    "learning-rate": 0.003, "local-epochs": 3,
}  # fmt: skip


def consilium(*arguments: str) -> str:
    """What the command prints; its error is raised."""
    result = CliRunner().invoke(cli, list(arguments))
    if result.exception is not None:
        raise result.exception
    return str(result.output)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    sets = [part for value in [*SYNTHETIC, "learning-rate=0.004"] for part in ("--set", value)]
    said = consilium("pretrain", "--out", str(path), "--epochs", "60", *sets)
    assert "held out" in said and f"base={path}" in said
    return path


def listed(*options: str) -> dict[str, Any]:
    return dict(
        json.loads(consilium("vectors", "list", the_run().name, "--format", "json", *options))
    )


def test_a_base_is_trained_on_public_images_and_says_what_it_is(pretrained: Path) -> None:
    base = Base.load(pretrained)
    assert base.pretrained and base.version == 0
    told = json.loads(pretrained.with_suffix(".json").read_text())
    assert told["base"] == base.id
    assert told["model"]["width"] == 0.03125
    assert "public images" in told["made-from"]


def test_pretraining_without_public_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no public images"):
        consilium("pretrain", "--out", str(tmp_path / "b.safetensors"),
                  "--set", "dataset=hospitals", "--set", "classes=a,b")  # fmt: skip


def test_a_vector_with_its_sign_turned_is_shown_excluded_and_the_run_goes_on(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tune = tuning.tune

    def turned(offer: Any, name: str, hospital: Any, context: Any) -> Any:
        made = tune(offer, name, hospital, context)
        if hospital.partition_id == 2:
            for key in made.values:
                made.values[key] = made.values[key] * np.float32(-4.8)
        return made

    monkeypatch.setattr(tuning, "tune", turned)
    # Three τ and −4.8 τ: the mean goes back by nearly half a τ, whatever the processor rounds.
    settings = {**CONFIG, "base": str(pretrained), "publish-every": 4, "publish-quorum": 3}
    settings["local-epochs"] = 6  # a τ that is felt beyond the margin
    with pytest.raises(RoundError, match="validation accuracy"):
        run_in_process(settings, num_hospitals=4)
    told = listed("--influence")
    worst = told["influence"]["rows"][0]
    assert worst["hospital"] == "hospital-02" and worst["harmful"]
    assert "harms" in consilium("vectors", "list", the_run().name, "--influence")
    (bad,) = [v["serial"] for v in told["vectors"] if v["hospital"] == "hospital-02"]
    assert "base is 0" in consilium("vectors", "exclude", the_run().name, bad, "--reason", "turned")
    said = consilium(
        "vectors", "merge", the_run().name, "--choose-scale", "--out", str(tmp_path / "m")
    )
    assert "3 vectors of 3 hospitals wait" in said and "chosen:" in said
    assert load_file(tmp_path / "m")
    run_in_process({**settings, "resume": the_run().name}, num_hospitals=4)
    states = {v["hospital"]: (v["state"], v["published_in"]) for v in listed()["vectors"]}
    assert states["hospital-02"] == ("excluded", None)
    assert states["hospital-00"] == ("accepted", 1)
    first = listed()["bases"][1]["id"]
    consilium("vectors", "include", the_run().name, bad)
    assert listed()["bases"][1]["id"] != first
    consilium("vectors", "exclude", the_run().name, bad)
    assert listed()["bases"][1]["id"] == first
    assert "mended: none" in consilium("vectors", "rebuild", the_run().name)
    assert "base is 0" in consilium("vectors", "take-back", the_run().name, "1")
    assert "base is 2" in consilium("vectors", "publish", the_run().name)
    assert listed()["bases"][1]["id"] == first  # the same vectors make the same model
    with pytest.raises(VectorError, match="quorum"):
        consilium("vectors", "publish", the_run().name)


def test_a_run_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no run of vectors"):
        consilium("vectors", "list", "20260101-000000-00000000")

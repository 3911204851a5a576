"""The `consilium` command: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.config import KEYS, RunConfig
from common.errors import ConfigError, ModelError
from common.model import ModelSpec, build, get_weights
from deploy.cli import parse_assignments
from deploy.evaluate import evaluate_file, spec_of

CONSILIUM = str(Path(sys.executable).parent / "consilium")


def consilium(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([CONSILIUM, *arguments], capture_output=True, text=True, check=False)


def test_a_default_that_is_asked_for_beside_a_recipe_is_not_the_recipes() -> None:
    for told, width in (("0.25", 0.25), ("0.5", 0.5)):  # 0.25 is the key's default, 1.0 the paper's
        values = parse_assignments(["recipe=paper", f"model-width={told}", "rounds=9"])
        every = {key.name: key.default for key in KEYS} | values  # as a server's run config is
        config = RunConfig.parse(every)
        assert (config.model_width, config.rounds, config.local_epochs) == (width, 9, 3)
    assert RunConfig.parse(parse_assignments(["recipe=paper"])).recipe == "paper"


def test_config_prints_every_key() -> None:
    answer = consilium("config", "--format", "json")
    assert [row["key"] for row in json.loads(answer.stdout)] == [key.name for key in KEYS]
    table = consilium("config").stdout
    assert "reconstruction-threshold" in table.replace("\n", "")


def test_assignments_are_typed() -> None:
    typed = parse_assignments(["rounds=5", "epsilon=3", "secagg=true", "dataset=npz", 'resume="a"'])
    assert typed == {"rounds": 5, "epsilon": 3.0, "secagg": True, "dataset": "npz", "resume": "a"}


@pytest.mark.parametrize("bad", ["rounds", "rounds=five", "secagg=yes", "round=5", "dataset=mnst"])
def test_assignments_that_make_no_sense_are_refused(bad: str) -> None:
    with pytest.raises(ConfigError):
        parse_assignments([bad])


def test_errors_have_two_parts_and_no_traceback() -> None:
    answer = consilium("simulate", "--set", "rouds=3")
    assert answer.returncode == 1
    assert "unknown run-config key 'rouds'" in answer.stderr
    assert "did you mean 'rounds'" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """An untrained model and a small npz with the right shapes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 24), ("val", 16), ("test", 16)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 8).reshape(-1, 1).astype(np.uint8)
    np.savez(tmp_path / "data.npz", **arrays)
    save_file(get_weights(build(ModelSpec(width=0.125), seed=0)), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors", tmp_path / "data.npz"


def test_evaluate_prints_figures_as_json(files: tuple[Path, Path]) -> None:
    answer = consilium("evaluate", "--model", str(files[0]), "--data", str(files[1]))
    figures = json.loads(answer.stdout)
    assert figures["examples"] == 16
    assert 0 <= figures["accuracy"] <= 1
    assert len(figures["per_class"]) == 8
    assert set(figures) >= {"macro_f1", "macro_auc", "confusion", "data_sha256"}


@pytest.mark.parametrize("model", ["dpresnet", "resnet9"])
@pytest.mark.parametrize("width", [0.03125, 0.25, 1.0])
def test_the_specification_is_found_from_the_weights(model: str, width: float) -> None:
    spec = ModelSpec(model=model, width=width, num_classes=5, channels=1)
    found = spec_of(get_weights(build(spec)))
    assert get_weights(build(found)).keys() == get_weights(build(spec)).keys()
    assert (found.model, found.num_classes, found.channels) == (model, 5, 1)


@pytest.mark.parametrize("hidden_units", [0, 7])
def test_a_head_on_a_prior_is_found_from_the_weights(hidden_units: int) -> None:
    spec = ModelSpec(model="prior-head", width=0.25, num_classes=5, hidden_units=hidden_units)
    assert spec_of(get_weights(build(spec))) == spec


RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.mark.parametrize("kept", sorted(RESULTS.glob("*.safetensors")), ids=lambda p: p.stem)
def test_every_model_that_is_kept_with_the_results_can_be_evaluated(
    kept: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.npz"
    numbers = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = numbers.integers(0, 256, (16, 28, 28, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(16) % 8)[:, None]
    np.savez(data, **arrays)  # type: ignore[arg-type]
    assert 0 <= evaluate_file(kept, data)["accuracy"] <= 1


def test_evaluate_refuses_what_is_no_model_or_does_not_fit(files: tuple[Path, Path]) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        evaluate_file(files[1], files[1])
    grey = files[0].parent / "grey.safetensors"
    save_file(get_weights(build(ModelSpec(width=0.125, channels=1))), grey)
    with pytest.raises(ModelError, match="1-channel"):
        evaluate_file(grey, files[1])
    with pytest.raises(ConfigError, match="no split"):
        evaluate_file(*files, split="validation")

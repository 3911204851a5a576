"""A run's directory is complete at every moment, and a run is resumed only as itself."""

from __future__ import annotations

import json

import numpy as np
import pytest

from common.config import RunConfig
from common.errors import ConfigError, ProtocolError
from server_app.run_store import RunStore, runs_directory

CONFIG = RunConfig.parse({"privacy": "none", "learning-rate-schedule": "constant"}).as_dict()


def weights(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full(3, value, np.float32)}


def record(number: int, accuracy: float | None = None) -> dict[str, object]:
    validation = None if accuracy is None else {"accuracy": accuracy}
    return {"round": number, "status": "ok", "validation": validation}


def test_a_resumed_run_has_its_rounds_and_models() -> None:
    store = RunStore.create(CONFIG)
    for number in range(3):
        store.save_round(record(number), weights(number))
    again = RunStore.resume(store.run, {**CONFIG, "rounds": 20})
    assert again.last_round() == 2
    np.testing.assert_array_equal(again.load_model(2)["w"], weights(2)["w"])


def test_the_model_is_there_before_the_line_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore.create(CONFIG)
    store.save_round(record(0), weights(0))

    def killed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_write_records", killed)
    with pytest.raises(KeyboardInterrupt):
        store.save_round(record(1), weights(1))
    assert RunStore.resume(store.run, CONFIG).last_round() == 0


def test_the_best_model_is_chosen_by_validation_never_by_test() -> None:
    store = RunStore.create(CONFIG)
    for number, accuracy in enumerate([0.99, 0.5, 0.8, 0.7]):
        store.save_round(record(number, accuracy) | {"test": {"accuracy": number}}, weights(number))
    assert store.best_round() == 2
    store.finish({"status": "completed"})
    assert (store.directory / "best.safetensors").read_bytes() == store.model_path(2).read_bytes()
    assert (store.directory / "model.safetensors").read_bytes() == store.model_path(3).read_bytes()


def test_validation_arrives_a_round_later() -> None:
    store = RunStore.create(CONFIG)
    store.save_round(record(0), weights(0))
    store.set_validation(0, {"accuracy": 0.3})
    line = json.loads((store.directory / "metrics.jsonl").read_text())
    assert line["validation"] == {"accuracy": 0.3}


@pytest.mark.parametrize(
    ("key", "value"), [("learning-rate", 0.5), ("privacy", "local"), ("seed", 1)]
)
def test_a_run_is_not_resumed_as_another(key: str, value: object) -> None:
    store = RunStore.create(CONFIG)
    with pytest.raises(ConfigError, match=key):
        RunStore.resume(store.run, {**CONFIG, key: value})


@pytest.mark.parametrize("laid_out", [{"privacy": "local"}, {"learning-rate-schedule": "cosine"}])
def test_what_was_laid_out_for_a_number_of_rounds_keeps_it(laid_out: dict[str, str]) -> None:
    """Noise is calibrated for all rounds: more would cost more than was promised."""
    store = RunStore.create({**CONFIG, **laid_out})
    with pytest.raises(ConfigError, match="rounds"):
        RunStore.resume(store.run, {**CONFIG, **laid_out, "rounds": 20})


def test_a_run_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="no-such-run"):
        RunStore.resume("no-such-run", CONFIG)
    with pytest.raises(ProtocolError):
        RunStore.resume("../../etc", CONFIG)


def test_no_run_overwrites_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSILIUM_RUN", "mine")
    RunStore.create(CONFIG)
    with pytest.raises(ConfigError, match="exists already"):
        RunStore.create(CONFIG)
    assert (runs_directory() / "mine" / "config.json").exists()

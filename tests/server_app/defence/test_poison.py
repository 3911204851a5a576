"""Whole runs with a hospital that lies inside the protocol: it masks whatever vector it likes.

Without a defence one of ten, from the first round on, made the model worth nothing, and nothing
noticed (each entry −1; or wrong labels under a claimed number of images).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from benchmarks.poison.liar import LIES, Lie, LyingApp
from common.config import RunConfig
from common.errors import RoundError
from common.model import ModelSpec
from common.simulation import load_dataset
from deploy.inprocess import run_in_process
from server_app.evaluation import Evaluator
from server_app.run_store import RunStore
from tests.server_app.running import lines, newest, the_run

RUN: dict[str, Any] = {
    "dataset": "synthetic", "synthetic-size": 400, "partition": "iid", "rounds": 5,
    "batch-size": 8, "learning-rate": 3e-3, "model-width": 0.03125, "privacy": "none",
    "partition-min-size": 5, "test-every": 5, "round-timeout": 300.0, "stage-timeout": 120.0,
}  # fmt: skip
TEN = 10
LIAR = 3
NAME = f"hospital-{LIAR:02d}"


def run(lies: Mapping[int, Lie], hospitals: int = TEN, **changed: Any) -> dict[str, Any]:
    """A whole run's summary."""
    values = RUN | {k.replace("_", "-"): v for k, v in changed.items()}
    run_in_process(values, num_hospitals=hospitals, client_app=LyingApp(lies))
    return json.loads((newest() / "summary.json").read_text())


def accuracy(directory: Path) -> float:
    """Of a run's last model on 900 other images: those of the run are too few to compare by."""
    config = RunConfig.parse(RUN | {"synthetic-size": 6000})
    dataset = load_dataset(config)
    spec = ModelSpec.of(config, num_classes=dataset.num_classes, channels=dataset.channels)
    measure = Evaluator(spec, dataset.test, dataset.class_names)
    return float(measure(load_file(directory / "model.safetensors"))["accuracy"])


def events(directory: Path) -> list[dict[str, Any]]:
    return [line["defence"] for line in lines(directory) if "defence" in line]


def test_a_liar_at_the_limit_of_the_range_is_named_and_costs_nothing_that_lasts() -> None:
    honest = run({})
    assert honest["defence"] == {"named": {}, "suspected": []}
    assert events(newest()) == []
    reached = accuracy(newest())
    poisoned = run({LIAR: LIES["range limit, claimed count"]})
    assert list(poisoned["defence"]["named"]) == [NAME]
    assert NAME not in lines(newest())[-1]["expected"]
    assert accuracy(newest()) >= reached - 0.03
    page = (newest() / "report.html").read_text()
    assert f"{NAME} harmed the model." in page
    assert "set aside" in page
    alone = run({LIAR: LIES["range limit, claimed count"]}, defence=False)
    assert alone["defence"] is None
    assert accuracy(newest()) <= reached - 0.03


def test_claims_that_nobody_agreed_to_name_the_liar_whatever_its_update() -> None:
    summary = run({LIAR: LIES["wrong labels, claimed count"]})
    assert list(summary["defence"]["named"]) == [NAME]
    first = events(the_run())[0]["set_aside"]
    assert "were agreed on" in first[0]["why"]
    assert NAME in first[0]["members"]


def test_a_server_that_is_killed_goes_on_with_what_it_knew(monkeypatch: pytest.MonkeyPatch) -> None:
    save = RunStore.save_round

    def dies(self: RunStore, record: Any, weights: Any, memory: Any = None) -> None:
        save(self, record, weights, memory)
        if record["round"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunStore, "save_round", dies)
        with pytest.raises(KeyboardInterrupt):
            run({LIAR: LIES["range limit"]})
    summary = run({LIAR: LIES["range limit"]}, resume=the_run().name)
    assert list(summary["defence"]["named"]) == [NAME]
    halves = [line["halves"] for line in lines(the_run()) if "halves" in line]
    assert len({json.dumps(h) for h in halves}) == len(halves)  # split otherwise each time


def test_where_halves_cannot_be_the_run_stops_and_the_model_is_unharmed() -> None:
    with pytest.raises(RoundError, match="set aside"):
        run({LIAR: LIES["wrong labels, claimed count"]}, hospitals=5)
    first, last = (load_file(the_run() / f"round-000{i}.safetensors") for i in (0, 3))
    assert all((first[name] == last[name]).all() for name in first)


@pytest.mark.parametrize("lie", ["range limit", "wrong labels, claimed count"])
def test_where_updates_are_seen_one_by_one_a_liar_weighs_what_was_agreed_or_nothing(
    lie: str,
) -> None:
    summary = run({LIAR: LIES[lie]}, hospitals=5, secagg=False, rounds=4)
    told = events(the_run())
    if lie == "range limit":
        assert list(summary["defence"]["named"]) == [NAME]
        assert told[0]["set_aside"][0]["members"] == [NAME]
        assert NAME not in lines(the_run())[-1]["expected"]
    else:
        assert all(list(one["lowered"]) == [NAME] for one in told)


@pytest.mark.slow  # two whole private runs: 35 s of a processor
@pytest.mark.parametrize("privacy", ["distributed", "local"])
def test_under_noise_a_liar_is_named_and_honest_noise_is_no_lie(privacy: str) -> None:
    """Server steps, whose sums are mostly noise; its size is known, and is no reason."""
    private = {"privacy": privacy, "server_step": True, "sampling_rate": 0.5, "delta": 1e-3,
               "rounds": 4, "learning_rate": 0.01}  # fmt: skip
    honest = run({}, **private)
    assert honest["defence"]["named"] == {}
    assert events(newest()) == []
    summary = run({LIAR: Lie(constant=-1.0)}, **private)
    assert list(summary["defence"]["named"]) == [NAME]

"""The benchmark of rounds: what it notes is what ran, and its figures are of wall time."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.round import probe
from benchmarks.round.__main__ import counted, table
from benchmarks.round.child import callers_of, top
from benchmarks.round.figures import Span, read_spans, rounds_of, shares, union
from benchmarks.round.model import model_figures, multiply_adds
from common.model import ModelSpec, build

MODULE = "probed_module_of_a_test"


def span(label: str, begin: float, end: float, process: int = 1) -> Span:
    """One call."""
    return Span(label, process, 1, begin, end, (end - begin) / 2)


def test_the_union_counts_what_overlaps_once() -> None:
    assert union([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == pytest.approx(4)
    assert union([]) == 0


def test_a_round_is_from_its_start_to_its_record_and_unfinished_ones_are_none() -> None:
    spans = [
        span("round-starts", 1, 1.1), span("train", 2, 3), span("round-ends", 5, 5.5),
        span("round-starts", 6, 6.1),
    ]  # fmt: skip
    assert rounds_of(spans) == [(1, 5.5)]


def test_shares_are_of_wall_time_and_two_hospitals_at_once_train_once() -> None:
    spans = [
        span("train", 1, 5, process=1), span("train", 2, 6, process=2),
        span("validate", 0, 1), span("test", 8, 9), span("train", 11, 12),
    ]  # fmt: skip
    row = shares(spans, [(0.0, 10.0)])
    assert row["train_s"] == 5 and row["training_hospital_s"] == 8
    assert row["train_cpu_s"] == 4
    assert row["share_not_training"] == pytest.approx(0.5)
    assert row["rest_s"] == pytest.approx(3)
    assert row["slots"] == 2 and row["slots_not_training"] == pytest.approx(0.6)
    assert row["rounds_measured"] == 1


def test_calls_are_noted_as_their_module_is_imported_and_only_the_outermost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{MODULE}.py").write_text(
        "class Box:\n    def inner(self):\n        return 2\n"
        "def outer(box):\n    return box.inner() + 1\n"
    )
    noted = tmp_path / "spans.jsonl"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(probe.SPANS, MODULE, {"outer": "out", "Box.inner": "in"})
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    probe.install(str(noted))
    module = importlib.import_module(MODULE)
    assert module.outer(module.Box()) == 3
    assert module.Box().inner() == 2
    assert [s.label for s in read_spans(noted)] == ["out", "in"]
    assert all(s.end >= s.begin for s in read_spans(noted))
    sys.modules.pop(MODULE)


def test_the_probe_needs_nothing_but_the_standard_library() -> None:
    lines = Path(str(probe.__file__)).read_text().splitlines()
    roots = {
        line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))
    }
    assert roots - {"__future__"} <= set(sys.stdlib_module_names)


def test_what_is_wrapped_exists() -> None:
    for name, functions in probe.SPANS.items():
        module = importlib.import_module(name)
        for function in functions:
            found = module
            for part in function.split("."):
                found = getattr(found, part)
            assert callable(found), f"{name}.{function}"


def test_who_waits_or_trains_is_left_out_of_what_a_round_costs_besides() -> None:
    root = Path(str(probe.__file__)).resolve().parents[2]
    run, train, save = (
        (str(root / "server_app/fedavg.py"), 1, "run"),
        (str(root / "common/training.py"), 2, "train"),
        (str(root / "server_app/run_store.py"), 3, "save_round"),
    )
    sleep = ("~", 0, "<built-in method time.sleep>")
    stats = {
        run: (1, 1, 0.0, 9.0, {}), train: (1, 1, 5.0, 5.0, {run: ()}),
        save: (1, 1, 1.0, 1.5, {run: ()}), sleep: (1, 1, 2.0, 2.0, {run: ()}),
    }  # fmt: skip
    assert callers_of(stats, lambda key: key == train) == {train, run}
    found = top(stats)
    assert [e["function"] for e in found["ours_cumulative"]] == [
        "server_app/run_store.py:save_round"
    ]
    assert not any("sleep" in e["function"] for e in found["own_time"])


def test_multiplications_of_the_paper_model_are_those_of_its_layers() -> None:
    picture = torch.zeros(3, 28, 28)
    conv = [(3, 64, 784), (64, 128, 784), *[(128, 128, 784)] * 2, (128, 256, 196),
            (256, 256, 196), (256, 512, 49), (512, 512, 49)]  # fmt: skip
    expected = sum(9 * a * b * positions for a, b, positions in conv) + 512 * 8
    assert multiply_adds(build(ModelSpec(width=1.0)), picture) == expected
    values = {"dataset": "synthetic", "synthetic-size": 1000, "privacy": "none",
              "model-width": 1.0}  # fmt: skip
    found = model_figures(values, {"train_cpu_s": 60.0})
    assert found["parameters"] == 4_802_120
    assert found["pictures_per_s"] == 10.0
    assert found["training_gflop_per_s"] == pytest.approx(60 * expected / 1e9, abs=0.1)


def test_first_and_profiled_rounds_are_not_measured_unless_there_are_no_others() -> None:
    rounds = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
    assert counted(rounds, skip=1, profiled=True) == rounds[1:2]
    assert counted(rounds[:1], skip=1, profiled=True) == rounds[:1]


def test_a_cell_that_could_not_be_run_says_so_in_the_table() -> None:
    row = {"place": "simulation", "cell": "none-1", "hospitals": 10, "source": "npz", "images": 10}
    lines = table([row | {"error": "took over 3 s"}])
    assert "could not be run" in lines[1] and len(lines[1]) == len(lines[0])
    assert json.dumps(lines)

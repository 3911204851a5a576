"""The paper's table: cells are whole runs, and one that is kept is not run again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from benchmarks import paper_table
from benchmarks.tables import in_markdown
from benchmarks.vectors import __main__ as vectors
from common.config import RunConfig
from common.files import read_json

SMALL = [
    "paper_table", "--hospitals", "4", "--width", "0.03125", "--rounds", "1", "--set",
    "synthetic-size=240", "--set", "local-epochs=1", "--set", "partition-min-size=5", "--set",
    "num-shares=4", "--set", "reconstruction-threshold=3",
]  # fmt: skip


def test_a_cell_is_a_whole_run_and_one_that_is_kept_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", [*SMALL, "--out", str(out), "--cells", "none", "--seeds", "0"])
    paper_table.main()
    (row,) = read_json(out)
    assert (row["privacy"], row["secagg"], row["rounds"], row["epsilon"]) == (
        "none",
        False,
        1,
        None,
    )
    assert 0 <= row["test_accuracy"] <= 1
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [*SMALL, "--out", str(out), "--cells", "none,secagg",
                                      "--seeds", "0"])  # fmt: skip
    paper_table.main()
    again, new = read_json(out)
    assert again == row
    assert new["secagg"] is True
    # Secure aggregation costs rounding, and nothing else.
    assert abs(new["test_accuracy"] - row["test_accuracy"]) < 0.05
    shown = capsys.readouterr().out
    assert shown.count("'cell'") == 1
    # A cell of a recipe that has been changed since is another one.
    monkeypatch.setitem(paper_table.RECIPES["paper"], "clipping-norm", 3.0)
    paper_table.main()
    assert len(read_json(out)) == 4


def test_a_large_model_is_kept_in_half_precision_and_a_small_one_as_it_is() -> None:
    small = {"w": np.ones((10, 10), np.float32), "b": np.full(10, 1e-7, np.float32)}
    assert load(paper_table.packed(small))["w"].dtype == np.float32
    large = small | {"m": np.linspace(0, 1, 1_500_000, dtype=np.float32).reshape(1500, 1000)}
    kept = load(paper_table.packed(large))
    assert (kept["m"].dtype, kept["b"].dtype) == (np.float16, np.float32)
    np.testing.assert_allclose(kept["m"], large["m"], atol=5e-4)
    too_wide = large | {"m": np.full((1500, 1000), 1e6, np.float32)}
    assert load(paper_table.packed(too_wide))["m"].max() == 1e6, "which half precision has not"


def test_a_width_that_is_the_keys_default_is_not_the_recipes() -> None:
    for width, told in ((0.25, 0.25), (0.5, 0.5), (None, 1.0)):
        arguments = argparse.Namespace(
            data=None, width=width, rounds=None, precision=None, set=[], prior=None, public=None
        )
        values = paper_table.values_of(arguments, "secagg", 10, seed=0)
        config = RunConfig.parse(values)
        assert (config.model_width, config.rounds, config.local_epochs) == (told, 50, 3)


def test_the_readmes_table_is_that_of_the_kept_rows() -> None:
    table = in_markdown(paper_table.table_of(read_json(paper_table.RESULTS)))
    assert table in (Path(__file__).parents[2] / "README.md").read_text()


def test_the_vectors_pages_table_is_that_of_the_kept_rows() -> None:
    table = in_markdown(vectors.table_of(read_json(vectors.RESULTS)))
    assert table in (Path(__file__).parents[2] / "docs" / "vectors.md").read_text()


def test_a_cell_that_cannot_be_run_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", [*SMALL, "--out", str(out), "--cells", "local", "--seeds", "0",
                                      "--set", "quorum=1.0", "--set", "epsilon=0.3",
                                      "--set", "min-cohort=5"])  # fmt: skip
    paper_table.main()
    (row,) = read_json(out)
    assert "min-cohort" in row["error"]

"""The benchmark of memory: a training in a process of its own, and rows that say why not."""

from __future__ import annotations

import argparse

from benchmarks.memory import cells, in_a_process, table


def test_a_training_reports_its_own_processs_peak() -> None:
    asked = {"what": "training", "privacy": "none", "width": 0.0625, "batch": 8}
    found = in_a_process(asked, 120.0)
    assert "error" not in found, found
    assert found["base_mb"] > 50 and found["peak_mb"] > 0 and found["seconds_a_batch"] > 0
    assert found["per_sample_mb"] < found["bound_mb"] * 10


def test_what_took_too_long_is_named_and_stays_in_the_table() -> None:
    asked = {"what": "training", "privacy": "local", "width": 0.0625, "batch": 8}
    row = asked | in_a_process(asked, 0.01)
    assert row["error"] == "took over 0.01 s"
    plain = asked | {"privacy": "none", "base_mb": 1.0, "peak_mb": 2.0, "bound_mb": 1.0,
                     "per_sample_mb": 4.0}  # fmt: skip
    private = asked | {"base_mb": 1.0, "peak_mb": 3.0, "bound_mb": 1.0, "per_sample_mb": 4.0}
    lines = table([row, plain, private])
    assert {len(line) for line in lines} == {len(lines[0])}
    assert "took over 0.01 s" in lines[1]
    assert lines[2][-1] == "1.00 ×" and lines[3][-1] == "1.50 ×"


def test_cells_are_every_training_and_every_cohort() -> None:
    asked = cells(argparse.Namespace(widths="0.25,1", batches="64", hospitals="10,50"))
    assert len(asked) == 6
    assert [a["hospitals"] for a in asked if a["what"] == "server"] == [10, 50]

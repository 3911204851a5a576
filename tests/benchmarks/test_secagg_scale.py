"""Secure aggregation at scale, tiny: the sum is right, the server bounded, cells tell why not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import machine
from benchmarks.measure import OverTime
from benchmarks.secagg.case import Case
from benchmarks.secagg.scale import STAGES, expected, measure, peer, phases, run_cell, table
from benchmarks.secagg.seat import sampled, unwire, wire

TINY = Case(parameters=2000, hospitals=6, dropouts=0)


@pytest.mark.parametrize("records", [False, True])
def test_a_round_with_the_server_in_its_own_process_is_exact_and_every_phase_is_booked(
    records: bool,
) -> None:
    row = measure(TINY, records=records)
    assert row["max_error"] < 1e-4
    for side in ("hospitals", "server"):
        assert {f"{side}.{stage}" for stage in STAGES} <= set(row["phases_s"])
    assert ("server.records" in row["phases_s"]) == records
    assert row["bound_mb"] == pytest.approx(2 * 4 * 2000 / 1e6)
    assert row["server_cpu_s"] > 0 < row["hospital_cpu_s"]


def test_what_the_server_holds_does_not_grow_with_the_hospitals() -> None:
    few, many = (
        measure(Case(parameters=1_000_000, hospitals=n, dropouts=0))["server_collecting_mb"]
        for n in (5, 15)
    )
    assert many < few + 10  # ten more vectors would be 40 MB


def test_a_cell_that_took_too_long_or_surely_would_says_so() -> None:
    with pytest.raises(OverTime):
        measure(TINY, limit=0.0)
    assert run_cell(TINY, [], limit=0.0, peers=False)["error"] == "left out: it took over 0 s"
    kept = [{"parameters": 2000, "hospitals": 3, "wall_s": 50.0, "error": None}]
    assert expected(kept, TINY) == 100.0
    row = run_cell(TINY, kept, limit=10.0, peers=False)
    assert row["error"] == "left out: about 100 s, more than 10 s"
    assert row["error"] in table([row])[1] and len(phases([row])) == 1


def test_stock_is_not_tried_where_it_would_hold_more_than_there_is() -> None:
    found = peer(Case(parameters=100_000_000, hospitals=100, dropouts=0), 1.0)
    assert "left out" in found["stock_error"]


def test_messages_come_through_flowers_records_as_they_went(tmp_path: Path) -> None:
    for message in (b"", b"short", bytes(range(256)) * 1000):
        assert unwire(wire(message)) == message


def test_the_coordinates_that_are_compared_include_the_ends() -> None:
    assert sampled(5).tolist() == [0, 1, 2, 3, 4]
    many = sampled(1_000_000)
    assert many[0] == 0 and many[-1] == 999_999 and len(np.unique(many)) == len(many) == 997


def test_the_machines_bounds_are_positive_and_peaks_are_at_least_what_is_held(
    tmp_path: Path,
) -> None:
    assert machine.bandwidth(100_000, repeats=2) > 0.01
    assert machine.flops(128, repeats=2) > 0.01
    assert machine.hashing(1 << 16, repeats=2) > 0.001
    assert machine.durable_write(tmp_path, repeats=2) > 0
    assert not list(tmp_path.iterdir())
    assert machine.peak_rss() >= machine.rss() * 0.9

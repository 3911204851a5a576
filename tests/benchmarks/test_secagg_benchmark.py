"""The benchmark of secure aggregation at a tiny size: it runs, it is exact, it tells the truth."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from rich.console import Console

import benchmarks
from benchmarks.measure import CpuClock, OverTime
from benchmarks.secagg.__main__ import RESULTS
from benchmarks.secagg.case import MAX_WEIGHT, PARAMETERS, RANGE, Case, layer_lengths
from benchmarks.secagg.cells import PROTOCOLS, measure, run_cells
from benchmarks.secagg.figures import Measured, Row
from benchmarks.secagg.masks import measure_masks
from benchmarks.secagg.tables import show
from common.files import read_json
from common.secagg import SecAggParams, update_layout

KEYS = {
    "hospitals", "parameters", "dropouts", "num_shares", "threshold", "repeats", "error",
    "ours_cpu_s", "stock_cpu_s", "ours_hospital_cpu_s", "stock_hospital_cpu_s",
    "ours_hospitals_cpu_s", "stock_hospitals_cpu_s", "ours_server_cpu_s", "stock_server_cpu_s",
    "ours_bytes_up", "stock_bytes_up", "ours_bytes_down", "stock_bytes_down",
    "max_error", "stock_max_error", "ratio_cpu", "ratio_cpu_without_fedavg", "ratio_bytes_up",
    "ours_phases_s", "environment",
}  # fmt: skip


def fixed_point_error(case: Case) -> float:
    """The most that rounding to our fixed point can move the mean, as a fraction of the range."""
    layout = update_layout(case.parameters, bound=RANGE, max_weight=MAX_WEIGHT)
    scale = layout.plan(SecAggParams(max_cohort=case.hospitals))[0].scale
    weights = sum(map(case.weight, case.survivors))
    return len(case.survivors) / scale / weights / RANGE


@pytest.mark.parametrize(("hospitals", "dropouts"), [(5, 0), (5, 1), (7, 1)])
def test_a_cell_compares_both_and_ours_is_exact(hospitals: int, dropouts: int) -> None:
    case = Case(parameters=3000, hospitals=hospitals, dropouts=dropouts)
    row = measure(case)
    assert row["error"] is None
    assert set(row) >= KEYS
    assert row["max_error"] <= fixed_point_error(case)
    # Stock rounds to 2**22 steps over the whole range; a wrong sum would be off by far more.
    assert row["stock_max_error"] < 1e-3
    assert row["ours_bytes_up"] > 4 * case.parameters
    assert row["stock_bytes_up"] > 8 * case.parameters
    assert row["ours_cpu_s"] > 0 < row["stock_cpu_s"]
    phases = {"hospitals.encode", "hospitals.masked", "server.masked", "server.unmask"}
    assert phases <= set(row["ours_phases_s"])
    total = row["ours_hospitals_cpu_s"] + row["ours_server_cpu_s"]
    assert row["ours_cpu_s"] == pytest.approx(total)
    assert row["ours_cpu_s"] == pytest.approx(sum(row["ours_phases_s"].values()))


def test_results_are_kept_cell_by_cell_and_not_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, console = tmp_path / "rows.json", Console(quiet=True)
    cases = [Case(parameters=100, hospitals=5, dropouts=lost) for lost in (0, 1)]

    def run(fresh: bool = False, chosen: list[Case] = cases) -> list[Row]:
        return run_cells(chosen, out, repeat=2, limit=60, fresh=fresh, console=console)

    first = run(chosen=cases[:1])
    assert [row["repeats"] for row in first] == [2]

    def broken(case: Case, clock: CpuClock) -> Measured:
        raise IndexError("list index out of range")

    # Stock cannot run: the row says why, ours still has its figures, and the finished cell stays.
    monkeypatch.setitem(PROTOCOLS, "stock", broken)
    rows = run()
    assert rows[0] == first[0]
    assert rows[1]["error"] == "stock: IndexError: list index out of range"
    assert rows[1]["ours_cpu_s"] > 0
    assert rows[1]["stock_cpu_s"] is rows[1]["ratio_cpu"] is None
    show(rows, None, console)
    monkeypatch.undo()

    # A cell with an error is tried again.
    rows = run()
    assert rows[0] == first[0] and rows[1]["error"] is None
    assert read_json(out) == rows
    show(rows, measure_masks(100, repeat=1), console)
    assert run(fresh=True)[0] != first[0]


def test_a_halt_of_the_stock_protocol_is_its_own_words() -> None:
    # Two of five lost: three shares, and four are needed.
    row = measure(Case(parameters=50, hospitals=5, dropouts=2))
    assert "stock: RuntimeError: stock SecAgg+ halted: Insufficient available nodes" in row["error"]
    assert "ours: RoundError" in row["error"]
    assert row["ours_cpu_s"] is None and row["stock_cpu_s"] is None


def test_a_cell_that_takes_too_long_is_left_out() -> None:
    row = measure(Case(parameters=50, hospitals=5, dropouts=0), limit=0)
    assert row["error"].count("left out: the cell took over 0 s") == 2


def test_the_layers_are_the_models() -> None:
    assert sum(layer_lengths(PARAMETERS)) == PARAMETERS
    assert layer_lengths(PARAMETERS)[:2] == [1728, 64]
    assert layer_lengths(PARAMETERS)[-2:] == [4096, 8]
    assert layer_lengths(1800) == [1728, 64, 8]
    assert sum(layer_lengths(5_000_000)) == 5_000_000


def test_results_are_beside_the_other_benchmarks() -> None:
    assert Path(benchmarks.__path__[0]).resolve() / "results" / "secagg.json" == RESULTS


def test_time_is_charged_to_one_account_at_a_time() -> None:
    def work() -> None:
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass

    clock = CpuClock()
    with clock.on("server", "stage"):
        work()
        with clock.off():
            work()
            with clock.on("hospital", "stage"):
                work()
    assert clock.seconds["server", "stage"] == pytest.approx(0.02, abs=0.015)
    assert clock.seconds["hospital", "stage"] == pytest.approx(0.02, abs=0.015)
    with pytest.raises(OverTime), CpuClock(-1).on("server", "stage"):
        pass

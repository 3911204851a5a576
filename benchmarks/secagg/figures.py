"""What a round of one protocol came to, and the figures drawn from it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.measure import Account
from benchmarks.secagg.case import RANGE, SERVER, Case

Row = dict[str, Any]

FIGURES = (
    "cpu_s", "cpu_without_fedavg_s", "hospitals_cpu_s", "hospital_cpu_s", "server_cpu_s",
    "bytes_up", "bytes_down", "max_error", "phases_s",
)  # fmt: skip


@dataclass
class Measured:
    """One round of one protocol."""

    seconds: Mapping[Account, float]
    up: Mapping[str, int]
    down: Mapping[str, int]
    mean: Sequence[npt.NDArray[np.float64]]


def figures_of(case: Case, measured: Measured, exact: Sequence[npt.NDArray[np.float64]]) -> Row:
    """One run's figures; per hospital: the mean over the survivors, who do all stages."""
    party: defaultdict[str, float] = defaultdict(float)
    phases: defaultdict[str, float] = defaultdict(float)
    for (who, phase), seconds in measured.seconds.items():
        party[who] += seconds
        phases[f"{'server' if who == SERVER else 'hospitals'}.{phase}"] += seconds
    total, server = sum(party.values()), party[SERVER]
    count = len(case.survivors)
    difference = max(
        float(np.max(np.abs(mine - plain)))
        for mine, plain in zip(measured.mean, exact, strict=True)
    )
    return {
        "cpu_s": total,
        "cpu_without_fedavg_s": total - phases.get("server.fedavg", 0.0),
        "hospitals_cpu_s": total - server,
        "hospital_cpu_s": sum(party[name] for name in case.survivors) / count,
        "server_cpu_s": server,
        "bytes_up": round(sum(measured.up[name] for name in case.survivors) / count),
        "bytes_down": round(sum(measured.down[name] for name in case.survivors) / count),
        "max_error": difference / RANGE,
        "phases_s": dict(phases),
    }


def medians(figures: Sequence[Row]) -> Row:
    """Over the runs of a protocol: each figure's median, of the errors the largest."""
    if not figures:
        return dict.fromkeys((*FIGURES, "cpu_s_all"))
    result: Row = {key: statistics.median(f[key] for f in figures) for key in FIGURES[:-1]}
    for key in ("bytes_up", "bytes_down"):
        result[key] = round(result[key])
    result["max_error"] = max(f["max_error"] for f in figures)
    result["phases_s"] = {
        phase: statistics.median(f["phases_s"][phase] for f in figures)
        for phase in figures[0]["phases_s"]
    }
    result["cpu_s_all"] = [f["cpu_s"] for f in figures]
    return result


def ratio(mine: float | None, theirs: float | None) -> float | None:
    """``mine`` by ``theirs``; None where either is missing."""
    return mine / theirs if mine is not None and theirs else None

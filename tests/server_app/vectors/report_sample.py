"""A made-up run of vectors for reports: ``make_sample_run`` writes one that can be looked at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server_app.report import INPUTS
from tests.server_app.test_report import CLASSES, Files, write_files

NAMES = ("Aachen", "Bergen", "Coimbra", "Debrecen", "Esbjerg")


def time(minutes: int) -> str:
    return f"2026-03-01T{8 + minutes // 60:02d}:{minutes % 60:02d}:00Z"


def serial(number: int) -> str:
    return f"{number:032x}"


def influence(accuracy: float, **without: float) -> Files:
    rows: list[Files] = [
        {"hospital": name, "without": value, "influence": accuracy - value,
         "harmful": value - accuracy > 0.02}
        for name, value in without.items()
    ]  # fmt: skip
    rows.sort(key=lambda row: row["influence"])
    return {"accuracy": accuracy, "margin": 0.02, "rows": rows}


def arrival(minutes: int, number: int, hospital: str, **other: Any) -> Files:
    return {
        "time": time(minutes), "event": "arrival", "hospital": hospital, "serial": serial(number),
        "version": 0, "staleness": 0, "norm": 1.25 + number / 100, "bucket": 512,
        "epsilon": 3.4512, "delta": 1e-4,
        "metrics": {"val-correct": 180, "val-examples": 200, "tuned-correct": 186,
                    "tuned-examples": 200},
        "validation": 0.91 + number / 1000, "superseded": False,
    } | other  # fmt: skip


def base(minutes: int, version: int, accuracy: float, **other: Any) -> Files:
    return {
        "time": time(minutes), "event": "base", "version": version, "base": f"{version:064x}",
        "why": "published" if version else "first", "hospitals": list(NAMES[:3]) if version else [],
        "vectors": 3 if version else 0, "validation": accuracy, "influence": None,
        "test": {"accuracy": accuracy - 0.01, "macro_f1": accuracy - 0.02, "macro_auc": 0.99,
                 "loss": 0.3, "per_class": [{"name": name, "support": 100} for name in CLASSES]},
    } | other  # fmt: skip


def make_sample_run(path: Path, *, private: bool = True) -> Files:
    """Write a made-up run in which most of what can happen happens; return what it wrote."""
    spent = {} if private else {"epsilon": None, "delta": None}
    metrics = [
        base(0, 0, 0.912),
        arrival(10, 1, "Aachen", **spent),
        arrival(25, 2, "Bergen", **spent),
        arrival(31, 3, "Coimbra", **spent),
        base(31, 1, 0.925, influence=influence(0.925, Aachen=0.91, Bergen=0.92, Coimbra=0.95)),
        arrival(44, 4, "Debrecen", staleness=1, **spent),
        {"time": time(50), "event": "refused", "hospital": "Esbjerg", "code": "vector-norm",
         "serial": serial(5)},
        {"time": time(55), "event": "refusal", "hospital": "Esbjerg", "code": "vectors-policy",
         "id": "c0ffee"},
        arrival(61, 6, "Aachen", version=1, **spent),
        {"time": time(70), "event": "held", "version": 1, "code": "registry-gate",
         "gate": {"adopt": False, "current": 0.925, "candidate": 0.871, "margin": 0.0123},
         "influence": influence(0.871, Coimbra=0.924)},
        {"time": time(75), "event": "excluded", "hospital": "Coimbra", "serial": serial(3),
         "reason": "its norm 9.1 is above 6.25"},
        {"time": time(80), "event": "withdrawal", "hospital": "Bergen", "serial": serial(2)},
        base(80, 1, 0.921, why="made anew without a vector that Bergen took back", hospitals=[],
             vectors=0),
        arrival(95, 7, "Debrecen", version=1, **spent),
        base(95, 2, 0.933, hospitals=["Aachen", "Debrecen"]),
    ]  # fmt: skip
    both = [3.4512, 3.4512] if private else []
    summary = {
        "run": "x", "mode": "vectors", "status": "completed", "reason": None, "bases": 2,
        "current_version": 2, "best_version": 2, "hospitals": 5, "validation": 0.933,
        "test_accuracy": 0.923, "test_macro_f1": 0.913, "test_macro_auc": 0.99,
        "privacy": "local" if private else "none",
        "privacy_unit": "patient" if private else None,
        "epsilon": 3.4512 if private else None, "delta": 1e-4 if private else None,
        "by_hospital": {
            "Aachen": {"vectors": 2, "published": 2, "states": {"accepted": 2}, "epsilons": both},
            "Bergen": {"vectors": 1, "published": 0, "states": {"withdrawn": 1}, "epsilons": []},
            "Coimbra": {"vectors": 1, "published": 0, "states": {"excluded": 1},
                        "epsilons": both[:1]},
            "Debrecen": {"vectors": 2, "published": 2, "states": {"accepted": 2}, "epsilons": both},
        },
        "influence": influence(0.933, Aachen=0.921, Debrecen=0.96), "ensemble": None,
        "secagg": False, "source": "bloodmnist", "source_sha256": "ab" * 32,
        "versions": {"consilium": "0.1.0", "flwr": "1.41.0"}, "wall_seconds": 5712.4,
    }  # fmt: skip
    config = {"mode": "vectors", "privacy": summary["privacy"], "epsilon": 4.0, "roster": "",
              "base": "/data/base.safetensors", "judged-by": "public",
              "publish-every": 3}  # fmt: skip
    partition = {"scheme": "iid", "classes": list(CLASSES), "hospitals": [
        {"name": name, "train": 900, "val": 100, "labels": [125] * 8} for name in NAMES
    ]}  # fmt: skip
    files: Files = dict(zip(INPUTS, (config, partition, metrics, summary), strict=True))
    write_files(path, files)
    return files


def changed(path: Path, name: str, **values: Any) -> None:
    """Overwrite entries of one of the sample's JSON files."""
    write_files(path, {name: json.loads((path / name).read_text("utf-8")) | values})

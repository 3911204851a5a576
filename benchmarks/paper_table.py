"""The paper's table, honestly: hospitals × privacy × secure aggregation, and our recipes beside it.

    python -m benchmarks.paper_table --data bloodmnist.npz --cells none,secagg,local --width 0.25
    python -m benchmarks.paper_table --data bloodmnist.npz --prior prior.safetensors \
        --cells prior-distributed,prior-local --partitions size-skew,dirichlet --seeds 0,1,2
    python -m benchmarks.paper_table --data bloodmnist.npz --prior prior.safetensors \
        --cells prior-distributed-trusting,strong,strong-plain
    python -m benchmarks.paper_table --markdown

``--prior`` is a file of ``consilium prior``; ``--public`` one of ``consilium pretrain --data FILE
--set model=prior-head --set base=PRIOR``: fitted to the coordinator's public images.

Every cell is a whole run of ServerApp and ClientApps in one process (the in-process grid: the
hospitals' own code paths, ledgers and secure aggregation, no Ray). Cells that are in the results
already are not run again; one that failed says why. ``--width`` and ``--rounds`` make it small.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from benchmarks.tables import show_table, spread
from common.config import RunConfig
from common.config.keys import BY_NAME
from common.config.recipes import RECIPES, written_out
from common.datasets.base import file_digest
from common.devices import device_name, device_of
from common.errors import ConsiliumError
from common.files import atomic_write, read_json, write_json
from deploy.cli import parse_assignments
from deploy.evaluate import MODEL_KEYS, beside

RESULTS = Path(__file__).parent / "results" / "paper_table.json"
REPORTED = {
    ("none", 10): 98.76, ("secagg", 10): 98.11, ("local", 10): 97.78,
    ("none", 20): 97.77, ("secagg", 20): 97.01, ("local", 20): 96.89,
}  # fmt: skip
"""Test accuracy in % that the paper gives (arXiv 2412.00687) of DPResNet after 50 rounds, by cell
and hospitals."""
LARGEST = 5_000_000
"""Bytes of a model that is kept."""
CELLS: dict[str, dict[str, Any]] = {
    "none": {"recipe": "paper", "privacy": "none", "secagg": False},
    "secagg": {"recipe": "paper", "privacy": "none", "secagg": True},
    "local": {"recipe": "paper", "privacy": "local", "secagg": True},
    "strong": {"recipe": "strong", "secagg": True},
    "strong-plain": {"recipe": "strong", "secagg": False},
    "dpresnet-distributed": {"recipe": "dpresnet-distributed"},
    "resnet9-distributed": {"recipe": "resnet9-distributed"},
    "prior-distributed": {"recipe": "prior-distributed"},
    "prior-distributed-trusting": {
        "recipe": "prior-distributed",
        "tolerated-colluders": 0,
    },
    "prior-local": {"recipe": "prior-local"},
    "public-distributed": {"recipe": "public-distributed"},
    "public-local": {"recipe": "public-local"},
}
BASES = {
    "prior-distributed": "prior", "prior-distributed-trusting": "prior", "prior-local": "prior",
    "strong": "prior", "strong-plain": "prior",
    "public-distributed": "public", "public-local": "public",
}  # fmt: skip
"""Of which argument a cell's base is."""
KEY = (
    "cell", "hospitals", "partition", "seed", "model", "width", "rounds", "epsilon_asked",
    "changed", "base", "settings",
)  # fmt: skip
Row = dict[str, Any]


def values_of(arguments: argparse.Namespace, cell: str, hospitals: int, **more: Any) -> Row:
    """The run config of one cell."""
    values: Row = {"dataset": "synthetic", "synthetic-size": 3000}
    if arguments.data:
        values = {"dataset": "npz", "data-path": str(arguments.data.resolve())}
    values |= CELLS[cell] | more
    if cell in BASES:
        base = getattr(arguments, BASES[cell])
        if base is None:
            raise SystemExit(f"cell {cell} needs a base: give --{BASES[cell]} FILE")
        values["base"] = str(base.resolve())
    if arguments.width and cell not in BASES:
        values["model-width"] = arguments.width
    if arguments.precision:
        values["precision"] = arguments.precision
    if arguments.rounds:
        values["rounds"] = arguments.rounds
    if "-distributed" in cell:
        values["min-cohort"] = hospitals  # nobody may be absent: the least noise
    values |= parse_assignments(arguments.set)
    return written_out(values, {name: key.default for name, key in BY_NAME.items()})


def key_of(values: Row, cell: str, hospitals: int, changed: Sequence[str]) -> Row:
    """What tells a cell from all others; ``changed``: values that are not the recipe's."""
    config = RunConfig.parse(values)
    found = (cell, hospitals, config.partition, config.seed, config.model, config.model_width,
             config.rounds, config.epsilon if config.privacy != "none" else None,
             " ".join(sorted(changed)),
             file_digest(Path(config.base))[:16] if config.base else None,
             settings_of(cell))  # fmt: skip
    return dict(zip(KEY, found, strict=True))


def settings_of(cell: str) -> str:
    """Of the cell's own keys and its recipe's: a recipe that is changed makes other rows."""
    told = {**RECIPES[CELLS[cell]["recipe"]], **CELLS[cell]}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def run_cell(values: Row, key: Row, folder: Path | None) -> Row:
    """One run, in a home of its own; its row. A model that is kept goes into ``folder``."""
    from deploy.inprocess import run_in_process

    home = Path(tempfile.mkdtemp(prefix="consilium-"))
    before = os.environ.get("CONSILIUM_HOME")
    os.environ["CONSILIUM_HOME"] = str(home)
    row = dict(key)
    config = RunConfig.parse(values)
    row |= {
        "privacy": config.privacy, "secagg": config.secagg, "recipe": CELLS[key["cell"]]["recipe"],
        "delta": config.delta if config.privacy != "none" else None,
        "precision": config.precision, "device": device_name(device_of(config.device)),
    }  # fmt: skip
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run_in_process(values, num_hospitals=key["hospitals"])
        (summary,) = (read_json(p) for p in home.glob("runs/*/summary.json"))
        spent = summary["epsilon_by_hospital"] or {}
        row |= {
            "epsilon": summary["epsilon"],
            "epsilon_prv": max((e["prv"] for e in spent.values()), default=None),
            "epsilon_pld": max((e["pld"] for e in spent.values()), default=None),
            "epsilon_against": summary.get("epsilon_against"),
            "test_accuracy": summary["test_accuracy"], "test_macro_f1": summary["test_macro_f1"],
            "test_macro_auc": summary["test_macro_auc"], "source": summary["source"],
            "source_sha256": summary["source_sha256"],
        }  # fmt: skip
        if folder is not None:
            keep(home, row, folder)
    except ConsiliumError as error:
        row["error"] = error.what
    finally:
        os.environ.pop("CONSILIUM_HOME")
        if before is not None:
            os.environ["CONSILIUM_HOME"] = before
        shutil.rmtree(home, ignore_errors=True)
    return row | {"wall_s": round(time.monotonic() - started, 1)}


def keep(home: Path, row: Row, folder: Path) -> None:
    """Keep the model of a recipe's first seed, ten hospitals and size skew, if it is small."""
    (model,) = home.glob("runs/*/best.safetensors")
    (run,) = home.glob("runs/*/config.json")
    told = (row["seed"], row["hospitals"], row["partition"], row["changed"])
    if told != (0, 10, "size-skew", "") or row["epsilon_asked"] not in (None, 6.0):
        return
    data = packed(load_file(model))
    if len(data) < LARGEST:
        kept = folder / f"{row['cell']}.safetensors"
        atomic_write(kept, data)
        config = read_json(run)
        write_json(beside(kept), {k: config[k] for k in MODEL_KEYS if k in config})


def packed(weights: Mapping[str, np.ndarray]) -> bytes:
    """A model's file; matrices in half precision where it would be too large otherwise."""
    data: bytes = save(dict(weights))
    if len(data) < LARGEST:
        return data
    halves = {
        name: array.astype(np.float16) if array.ndim > 1 and array.dtype == np.float32 else array
        for name, array in weights.items()
    }
    if not all(np.isfinite(array).all() for array in halves.values()):
        return data
    return bytes(save(halves))


def main() -> None:
    """Run what is missing, keep it cell by cell, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="an npz file in MedMNIST's form; else synthetic")
    parser.add_argument("--prior", type=Path, help="the base of prior-… cells")
    parser.add_argument("--public", type=Path, help="the base of public-… cells")
    parser.add_argument("--cells", default="none,secagg,local")
    parser.add_argument("--hospitals", default="10", help="such as 5,10,20")
    parser.add_argument("--partitions", default="size-skew")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epsilons", default="", help="such as 1,3,6,8; else the recipe's")
    parser.add_argument("--models", default="", help="such as dpresnet,resnet9-gn,resnet18")
    parser.add_argument("--width", type=float, help="of networks; else the recipe's")
    parser.add_argument("--precision", help="float32 or bfloat16; else the recipe's")
    parser.add_argument("--rounds", type=int, help="else the recipe's")
    parser.add_argument("--set", action="append", default=[], help="key=value over the recipe")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--markdown", action="store_true", help="print the kept table, run nothing")
    arguments = parser.parse_args()
    rows: list[Row] = read_json(arguments.out) if arguments.out.exists() else []
    if not arguments.markdown:
        rows = run_missing(arguments, rows)
    show_table(table_of(rows), markdown=arguments.markdown)


def run_missing(arguments: argparse.Namespace, rows: list[Row]) -> list[Row]:
    """Every asked cell that ``rows`` lack, kept as they come."""

    def listed(text: str) -> list[str]:
        return text.split(",") if text else []

    settings: list[Row] = [{}]
    for name, several in (("epsilon", map(float, listed(arguments.epsilons))),
                          ("model", listed(arguments.models))):  # fmt: skip
        settings = [s | {name: v} for v in several for s in settings] or settings
    asked = [
        (cell, int(n), {"partition": partition, "seed": int(seed), **setting})
        for seed in listed(arguments.seeds) for n in listed(arguments.hospitals)
        for partition in listed(arguments.partitions) for cell in listed(arguments.cells)
        for setting in settings
    ]  # fmt: skip
    as_it_is = (arguments.models, arguments.width, arguments.precision, arguments.rounds)
    folder = None if any(as_it_is) else arguments.out.parent
    for cell, hospitals, more in asked:
        values = values_of(arguments, cell, hospitals, **more)
        key = key_of(values, cell, hospitals, arguments.set)
        if any(all(r[k] == v for k, v in key.items()) and "error" not in r for r in rows):
            continue
        row = run_cell(values, key, folder)
        rows = [r for r in rows if any(r[k] != v for k, v in key.items())] + [row]
        write_json(arguments.out, rows)
        print(key, row.get("test_accuracy"), row.get("error", ""), row["wall_s"], flush=True)
    return rows


def table_of(rows: Sequence[Row]) -> list[list[str]]:
    """Mean ± sd over seeds: a head, then a line for each setting."""
    head = ["cell", "hospitals", "partition", "model", "rounds", "ε", "reported %",
            "accuracy %", "macro-F1 %", "AUC %", "n", "minutes"]  # fmt: skip
    lines = [head]
    setting = [k for k in KEY if k != "seed"]
    keys = {tuple(r[k] for k in setting) for r in rows}
    for key in sorted(keys, key=lambda k: (list(CELLS).index(k[0]), k[1:6], k[6] or 0, k[7:])):
        same = [r for r in rows if tuple(r[k] for k in setting) == key]
        good = [r for r in same if "error" not in r]
        cell, hospitals, partition, model, width, rounds, epsilon, changed, *_ = key
        named = f"{cell} ({changed})" if changed else cell
        network = model if model == "prior-head" else f"{model} × {width:g}"
        told = REPORTED.get((cell, hospitals)) if (model, rounds) == ("dpresnet", 50) else None
        lines.append(
            [named, str(hospitals), partition, network, str(rounds),
             "∞" if epsilon is None else f"{epsilon:g}", "–" if told is None else f"{told}",
             figure(good, "test_accuracy"), figure(good, "test_macro_f1"),
             figure(good, "test_macro_auc"), str(len(good)),
             f"{np.mean([r['wall_s'] for r in same]) / 60:.0f}"]
        )  # fmt: skip
    return lines


def figure(rows: Sequence[Row], name: str) -> str:
    """Of the cells that could be run."""
    return spread([r[name] for r in rows]) if rows else "could not be run"


if __name__ == "__main__":
    main()

"""A run's directory: everything that is worth keeping, complete at every moment.

``config.json``, ``partition.json`` (simulation), ``metrics.jsonl`` (a line a round),
``round-NNNN.safetensors``, ``optimizer-NNNN.safetensors`` (of server steps, the last two),
``best.safetensors``, ``model.safetensors`` (the last), and at the end ``summary.json`` and
``report.html``. Every file is replaced atomically, the model before
the metrics line that names it: a kill leaves the last complete round to resume from.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from common.config import BY_NAME, RunConfig, may_change_on_resume
from common.errors import ConfigError, ModelError
from common.files import atomic_write, consilium_home, read_json, write_json
from common.messages import check_run_id
from common.parsing import parse_json
from common.tensors import load_tensors

PACKAGES = ("consilium", "flwr", "torch", "opacus", "dp-accounting", "numpy", "cryptography")


def runs_directory() -> Path:
    """Where all runs are."""
    return consilium_home() / "runs"


def new_run_id() -> str:
    """An id from the time, so that directories sort by it, and four random bytes."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"


class RunStore:
    """One run's directory."""

    def __init__(self, run: str, directory: Path) -> None:
        self.run = run
        self.directory = directory
        self.records: list[dict[str, Any]] = []

    @classmethod
    def create(cls, config: Mapping[str, Any]) -> RunStore:
        """A new run; its id is ``$CONSILIUM_RUN`` where the launcher has set one."""
        run = check_run_id(os.environ.get("CONSILIUM_RUN") or new_run_id())
        directory = runs_directory() / run
        if (directory / "config.json").exists():
            raise ConfigError(
                f"run {run} exists already", f"set resume={run} to go on with it, or use another id"
            )
        store = cls(run, directory)
        write_json(directory / "config.json", dict(config))
        return store

    @classmethod
    def resume(cls, run: str, config: Mapping[str, Any]) -> RunStore:
        """An earlier run, with its complete rounds; ConfigError if it is another run's sequel.

        Only timeouts and the like may change, and the number of rounds where neither noise nor
        learning rates were laid out for it: the rest decides what the model and its ε mean.
        """
        directory = runs_directory() / check_run_id(run)
        before = read_json(directory / "config.json")
        for key, value in config.items():
            default = BY_NAME[key].default  # of a key that came after the run
            fixed = not may_change_on_resume(key, RunConfig.parse(config))
            if fixed and before.get(key, default) != value:
                raise ConfigError(
                    f"run {run} had {key}={before.get(key)!r}, but is resumed with {value!r}",
                    f"set {key} as it was, or start a new run",
                )
        store = cls(run, directory)
        path = directory / "metrics.jsonl"
        if path.exists():
            try:
                store.records = [parse_json(line) for line in path.read_bytes().splitlines()]
            except ValueError as error:
                raise ConfigError(
                    f"{path} cannot be read: {error}",
                    "restore it, or start a new run",
                ) from None
        write_json(directory / "config.json", dict(config))
        return store

    def model_path(self, round: int) -> Path:
        """The model after ``round`` (0: the first weights)."""
        return self.directory / f"round-{round:04d}.safetensors"

    def last_round(self) -> int | None:
        """The last round whose line and model are both there."""
        return int(self.records[-1]["round"]) if self.records else None

    def load_model(self, round: int) -> dict[str, np.ndarray]:
        """The weights after ``round``, in the order in which they were written."""
        return _read(self.model_path(round))

    def save_partition(self, table: Mapping[str, Any]) -> None:
        """Who holds what (simulation)."""
        write_json(self.directory / "partition.json", dict(table))

    def save_round(
        self,
        record: dict[str, Any],
        weights: Mapping[str, np.ndarray],
        memory: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """A round's model and what the server's optimizer remembers, then its line."""
        number = int(record["round"])
        atomic_write(self.model_path(number), _packed(weights))
        if memory:
            atomic_write(self._memory_path(number), _packed(memory))
        self.records.append(record)
        self._write_records()
        self._memory_path(number - 2).unlink(missing_ok=True)

    def replace_last(self, weights: Mapping[str, np.ndarray], defence: Mapping[str, Any]) -> None:
        """Put ``weights`` in the place of the last round's model, and say why in its line.

        Figures of the model that was there do not hold for this one.
        """
        record = self.records[-1]
        atomic_write(self.model_path(int(record["round"])), _packed(weights))
        told = {**record.get("defence", {}), **defence}
        record |= {"defence": told, "validation": None, "test": None, "status": "rolled-back"}
        self._write_records()

    def load_memory(self, round: int) -> dict[str, np.ndarray]:
        """What the server's optimizer remembered after ``round``; empty if nothing."""
        path = self._memory_path(round)
        return _read(path) if path.exists() else {}

    def _memory_path(self, round: int) -> Path:
        return self.directory / f"optimizer-{round:04d}.safetensors"

    def set_validation(self, round: int, validation: Mapping[str, Any] | None) -> None:
        """Fill in the hospitals' validation of ``round``'s model, which comes a round later."""
        for record in self.records:
            if record["round"] == round and validation is not None:
                record["validation"] = dict(validation)
        self._write_records()

    def set_test(self, round: int, figures: Mapping[str, Any]) -> None:
        """Fill in central test figures of ``round``'s model, where they were not due."""
        for record in self.records:
            if record["round"] == round:
                record["test"] = dict(figures)
        self._write_records()

    def _write_records(self) -> None:
        lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.records)
        atomic_write(self.directory / "metrics.jsonl", lines)

    def best_round(self) -> int:
        """The trained round of the best federated validation accuracy (the first of equals).

        Where nothing was validated, the last round. The test set has no say.
        """
        valid = [r for r in self.records if r.get("validation") and r["round"] > 0]
        # Of a moving average hospitals validate the last model only: before, the latest weights.
        if not valid or self._averages:
            return self.last_round() or 0
        return int(max(valid, key=lambda r: r["validation"]["accuracy"])["round"])

    @property
    def _averages(self) -> bool:
        return bool(read_json(self.directory / "config.json").get("ema"))

    def finish(self, summary: dict[str, Any]) -> None:
        """Copy the best and the last model under their names, then write the summary."""
        last = self.last_round()
        if last is not None:
            for name, round_ in (("best", self.best_round()), ("model", last)):
                temporary = self.directory / f".{name}.safetensors"
                shutil.copyfile(self.model_path(round_), temporary)
                os.replace(temporary, self.directory / f"{name}.safetensors")
        write_json(self.directory / "summary.json", summary)


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    return save({k: np.asarray(v, order="C") for k, v in arrays.items()})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages on which a result depends."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return load_tensors(path)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path} cannot be read: {error}", "restore it, or start a new run"
        ) from None

"""Ledgers with small runs in them, and the command as a person calls it."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from common.errors import ConsiliumError
from common.privacy.ledger import Ledger, Subjects
from common.privacy.limits import PrivacyLimits
from common.privacy.plan import Promise, RunPlan
from deploy.cli import cli
from tests.common.privacy.ledger.building import data

LIMITS = PrivacyLimits()
PROMISE = Promise(
    epsilon=3.0,
    delta=1.9e-4,
    clipping_norm=7.0,
    unit="image",
    rounds=2,
    local_epochs=1,
    batch_size=40,
)
RUN, LATER = "20260101-101010-aaaaaaaa", "20260202-101010-bbbbbbbb"
FIRST = data(range(80), range(80, 100))
SECOND = data([*range(70), *range(100, 120)], range(80, 100))
"""90 images of FIRST, and 20 new ones."""


def plan(promise: Promise = PROMISE) -> RunPlan:
    """Two rounds of two steps: what calibration finds for ``PROMISE``, written down."""
    return RunPlan(
        promise=promise,
        train_count=80,
        val_count=20,
        count_epsilon=0.06,
        sampling_rate=0.5,
        steps_per_round=2,
        noise_multiplier=1.505,
        validations=3,
        validation_noise_multiplier=2.075,
    )


def train(
    path: Path,
    run: str = RUN,
    *,
    rounds: int = 2,
    settled: int | None = None,
    parts: Mapping[str, Subjects] = FIRST,
    limits: PrivacyLimits = LIMITS,
    promise: Promise = PROMISE,
) -> None:
    """``rounds`` rounds of a run, the first ``settled`` of them settled (None: all)."""
    with Ledger(path) as ledger:
        ledger.admit(run, promise, parts, limits, lambda: plan(promise))
        for round in range(1, rounds + 1):
            reserved = ledger.reserve_round(run, round, f"{round:064x}")
            if settled is None or round <= settled:
                ledger.settle(reserved)


def train_openly(path: Path, run: str) -> None:
    """A run without privacy."""
    with Ledger(path) as ledger:
        ledger.note_non_private(run, FIRST, PrivacyLimits.none())


def home() -> Path:
    """The test's own $CONSILIUM_HOME."""
    return Path(os.environ["CONSILIUM_HOME"])


def simulated(name: str, run: str | None = None) -> Path:
    """The ledger of a simulated hospital: for all runs, or for ``run`` alone."""
    directory = home() / "simulation" / name
    return (directory / "runs" / run if run else directory) / "ledger.sqlite"


def policy(text: str = "", path: Path | None = None) -> Path:
    """A policy file with ``text`` under [privacy], by default in consilium's home."""
    path = path or home() / "policy.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"version = 1\n[privacy]\n{text}")
    return path


def consilium(*arguments: object, answer: str | None = None) -> Result:
    """The command as it ends: exit code, output, and the exception that `main` prints."""
    return CliRunner().invoke(cli, ["ledger", *map(str, arguments)], input=answer)


def said(*arguments: object, answer: str | None = None) -> str:
    """What the command printed; it succeeded."""
    result = consilium(*arguments, answer=answer)
    assert result.exit_code == 0, result.exception or result.output
    return str(result.output)


def told(*arguments: object) -> dict[str, Any]:
    """The JSON document; Python's own NaN and Infinity are no JSON."""
    return dict(strict(said(*arguments, "--json")))


def strict(text: str) -> Any:
    """``text`` as the JSON that other languages know."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def error(*arguments: object) -> ConsiliumError:
    """The error with which the command ended."""
    result = consilium(*arguments)
    assert result.exit_code == 1
    assert isinstance(result.exception, ConsiliumError), result.exception or result.output
    return result.exception


def spoil(path: Path, statement: str) -> None:
    """A change that the ledger itself would not make."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        for table in ("entries", "members"):
            for verb in ("update", "delete"):
                database.execute(f"DROP TRIGGER no_{verb}_of_{table}")
        database.execute(statement)


def snapshot(directory: Path) -> dict[str, tuple[bytes, int, int]]:
    """Every file below: content, time of the last change, mode."""
    return {
        str(p.relative_to(directory)): (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_mode)
        for p in directory.rglob("*")
        if p.is_file()
    }


def exported_json(folder: Path) -> bytes:
    """The bytes of `consilium ledger export --format json` of the ledger in ``folder``."""
    out = folder / "export.json"
    said("export", out, "--home", folder, "--format", "json")
    return out.read_bytes()

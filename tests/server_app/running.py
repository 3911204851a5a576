"""Small runs in the in-process grid, and what they leave: folders, lines, ledgers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.files import consilium_home
from common.privacy.ledger import Ledger, RunState
from common.simulation import LEDGER
from server_app.run_store import runs_directory

SECURE: dict[str, Any] = {
    "dataset": "synthetic", "synthetic-size": 500, "partition": "iid", "rounds": 2,
    "local-epochs": 1, "batch-size": 16, "model-width": 0.03125, "privacy": "none",
    "partition-min-size": 5, "secagg": True, "stage-timeout": 3.0, "round-timeout": 20.0,
    "quorum": 0.5,
}  # fmt: skip


def at(stage: str, *hospitals: int) -> Any:
    """A fault's place: this stage of a round, at these hospitals."""
    kind = "train" if stage == "train" else f"query.{stage}"
    return lambda message_type, i, _: message_type == kind and i in hospitals


def the_run() -> Path:
    """The folder of the only run."""
    (directory,) = runs_directory().iterdir()
    return directory


def newest() -> Path:
    """The folder of the run that wrote last, where there are several."""
    return max(runs_directory().iterdir(), key=lambda d: d.stat().st_mtime_ns)


def lines(directory: Path) -> list[dict[str, Any]]:
    """What a run noted of each round, the first model (round 0) included."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def states(run: str) -> list[RunState]:
    """The run as each simulated hospital's own ledger has it."""
    found = []
    for path in sorted((consilium_home() / "simulation").glob(f"*/runs/{run}/{LEDGER}")):
        with Ledger(path, create=False) as ledger:
            state = ledger.state(run)
            assert state is not None
            found.append(state)
    return found


HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)> ' &amp; </svg></style>",
    r"$\frac{$ _x {{ 7*7 }} {% raw %}",
    "]]>--><!-- \x00\x1b\ud800\ufffe\n end",
    "病院 مستشفى " + "long " * 40,
]
"""Names that a page must show as text, and nothing else."""

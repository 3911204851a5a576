"""Reading a run's directory: whatever is there, and a notice for whatever cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.parsing import parse_json
from server_app.reporting.values import Json, count, text

INPUTS = ("config.json", "partition.json", "metrics.jsonl", "summary.json")
FEDAVG, VECTORS = "fedavg", "vectors"


@dataclass
class Run:
    """What the run directory holds; missing parts are empty."""

    name: str
    config: Json = field(default_factory=dict)
    partition: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    lines: list[Json] = field(default_factory=list)
    """Of ``metrics.jsonl``: rounds, or events in a run of vectors; none that its mode lacks."""
    hashes: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    @property
    def mode(self) -> str:
        """``fedavg`` or ``vectors``, by the first file that says so, else by the lines."""
        for told in (self.summary.get("mode"), self.config.get("mode")):
            if told in (FEDAVG, VECTORS):
                return str(told)
        events = any("event" in line and round_of(line) is None for line in self.lines)
        return VECTORS if events else FEDAVG


def round_of(line: Json) -> int | None:
    """The round that a line is of; None if it is of none."""
    found = count(line.get("round"))
    return found if found is not None and found < 1e6 else None


def event_of(line: Json) -> str | None:
    """What happened by a line of a run of vectors; None if it doesn't say."""
    found = line.get("event")
    return found if isinstance(found, str) and found else None


def read_run(run_dir: Path) -> Run:
    """Read the run's files; what can't be read becomes a notice in the report."""
    run = Run(name=text(run_dir.resolve().name))
    losses: dict[str, tuple[int, int]] = {}
    for name in INPUTS:
        try:
            content = (run_dir / name).read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            run.notices.append(f"{name} could not be read ({text(error.strerror)}).")
            continue
        run.hashes.append((name, hashlib.sha256(content).hexdigest()))
        by_line = name == "metrics.jsonl"  # one object a line, or one object in all
        parts = [line for line in content.splitlines() if line.strip()] if by_line else [content]
        records = [record for part in parts if (record := _parse(part)) is not None]
        if by_line:
            run.lines = records
        elif records:
            setattr(run, name.removesuffix(".json"), records[0])
        losses[name] = len(parts) - len(records), len(parts)
    usable: Callable[[Json], object] = event_of if run.mode == VECTORS else round_of
    kept = [line for line in run.lines if usable(line) is not None]
    lost, total = losses.get("metrics.jsonl", (0, 0))
    losses["metrics.jsonl"] = lost + len(run.lines) - len(kept), total
    run.lines = kept
    for name, (lost, total) in losses.items():
        if lost:
            run.notices.append(f"{name}: {lost} of {total} records unreadable and left out.")
    return run


def _parse(content: bytes) -> Json | None:
    try:
        value = parse_json(content.decode("utf-8", "replace"))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None

"""Tables of a registry and of an outbox, for people; and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from client_app.outbox import Item
from server_app.registry import Registry


def as_json(registry: Registry) -> dict[str, Any]:
    """Bases and vectors, JSON-ready."""
    log = registry.log()
    points = {p.version: p for p in log.points}
    return {
        "bases": [
            {
                "version": b.version, "id": b.id, "state": b.state, "made": b.made,
                "vectors": len(log.recipes.get(b.version, ())),
                "gate": json.loads(points[b.version].gate) if b.version in points else None,
            }
            for b in log.line
        ],
        "vectors": [
            {
                "serial": e.row.serial, "hospital": e.row.hospital,
                "version": log.version_of(e.row.base), "staleness": e.staleness,
                "norm": e.row.norm, "bucket": e.row.bucket, "epsilon": e.row.epsilon,
                "arrived": e.row.arrived, "state": e.state, "reason": e.row.reason,
                "published_in": e.published_in,
            }
            for e in registry.vectors()
        ],
    }  # fmt: skip


def tables(told: dict[str, Any], influence: dict[str, Any]) -> list[Table]:
    """Bases, vectors and influences."""
    bases = _table("Bases", "version", "id", "state", "made", "vectors", "validation")
    for b in told["bases"]:
        gate = b["gate"] or {}
        bases.add_row(str(b["version"]), b["id"][:16], b["state"], b["made"], str(b["vectors"]),
                      _percent(gate.get("candidate")))  # fmt: skip
    vectors = _table("Vectors", "serial", "hospital", "of base", "norm", "images", "ε", "state",
                     "published in")  # fmt: skip
    for v in told["vectors"]:
        epsilon = "–" if v["epsilon"] is None else f"{v['epsilon']:.2f}"
        state = v["state"] + (f" ({v['reason']})" if v["reason"] else "")
        vectors.add_row(v["serial"], v["hospital"], _or(v["version"]), f"{v['norm']:.3g}",
                        f"≥ {v['bucket']}", epsilon, state, _or(v["published_in"]))  # fmt: skip
    found = [bases, vectors]
    if influence:
        shown = _table(
            f"Influence (all together: {_percent(influence['accuracy'])})",
            "hospital", "accuracy without it", "influence", "",
        )  # fmt: skip
        for row in influence["rows"]:
            shown.add_row(row["hospital"], _percent(row["without"]),
                          f"{100 * row['influence']:+.1f} points",
                          "harms" if row["harmful"] else "")  # fmt: skip
        found.append(shown)
    return found


def outbox_table(items: Sequence[Item]) -> Table:
    """A hospital's outbox."""
    table = _table("Outbox", "serial", "run", "base", "made", "ε", "state")
    for i in items:
        epsilon = "no privacy" if i.epsilon is None else f"{i.epsilon:.2f}"
        table.add_row(i.serial, i.run, f"{i.version} ({i.base[:12]})", i.created, epsilon, i.state)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, no_wrap=column in ("serial", "hospital"))
    return table


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _or(value: int | None) -> str:
    return "–" if value is None else str(value)

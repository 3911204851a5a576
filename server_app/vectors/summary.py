"""The end of a run of vectors in figures: what each hospital gave, and tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from server_app.progress import duration, percent
from server_app.registry import Registry


def by_hospital(registry: Registry) -> dict[str, dict[str, Any]]:
    """What each hospital has given, and what ε each of its vectors cost."""
    found: dict[str, dict[str, Any]] = {}
    for entry in registry.vectors():
        row = entry.row
        mine = found.setdefault(
            row.hospital, {"vectors": 0, "published": 0, "states": {}, "epsilons": []}
        )
        mine["vectors"] += 1
        mine["published"] += entry.published_in is not None
        mine["states"][entry.state] = mine["states"].get(entry.state, 0) + 1
        if row.epsilon is not None:
            mine["epsilons"].append(row.epsilon)
    return dict(sorted(found.items()))


def summary_table(summary: Mapping[str, Any], console: Console) -> None:
    """Print the summary of a run of vectors."""
    table = Table(title=f"Run {summary['run']}: {summary['status']}", title_justify="left")
    table.add_column("figure")
    table.add_column("value")
    each = summary["epsilon"]
    rows = {
        "data": summary["source"],
        "bases": f"{summary['bases']} published (best by validation: {summary['best_version']})",
        "validation": percent(summary["validation"]),
        "test accuracy": percent(summary["test_accuracy"]),
        "test macro-F1": percent(summary["test_macro_f1"]),
        "privacy": "no differential privacy" if each is None else
        f"ε = {each:.2f}, δ = {summary['delta']:g} for ONE vector, per {summary['privacy_unit']}",
        "secure aggregation": "off: the server saw each vector",
        "wall time": duration(summary["wall_seconds"]),
    }  # fmt: skip
    if left := summary.get("ensemble"):
        rows["ensemble"] = left.get("error") or (
            f"{left['vectors']} models: test accuracy {percent(left['test_accuracy'])}, macro-F1 "
            f"{percent(left['test_macro_f1'])}, validation {percent(left['validation'])}"
        )
    if summary.get("reason"):
        rows["reason"] = summary["reason"]
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)
    shown = Table(title="Who gave what", title_justify="left")
    for column in ("hospital", "vectors", "published", "ε by vector", "influence"):
        shown.add_column(column)
    influence = {r["hospital"]: r for r in (summary["influence"] or {}).get("rows", ())}
    for name, told in summary["by_hospital"].items():
        epsilons = ", ".join(f"{e:.2f}" for e in told["epsilons"]) or "–"
        row = influence.get(name)
        moved = "–" if row is None else f"{100 * row['influence']:+.1f} points"
        mark = " (harms)" if row is not None and row["harmful"] else ""
        shown.add_row(name, str(told["vectors"]), str(told["published"]), epsilons, moved + mark)
    console.print(shown)

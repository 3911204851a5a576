"""What the pages of both modes show alike: status, data source, classes, who holds what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from server_app import charts
from server_app.reporting.files import Run
from server_app.reporting.values import Json, count, mapping, number, objects, text

HEAT_MAP_LIMIT = 60
SMALL_CLASS = 30


def status(run: Run) -> dict[str, str]:
    """How the run ended, as a word, and whether that is good, bad or neither."""
    recorded = run.summary.get("status")
    if not isinstance(recorded, str):
        return {"text": "unfinished", "kind": "warn"}
    word = text(recorded).lower()
    if word in ("ok", "completed", "complete", "finished", "success", "succeeded", "done"):
        return {"text": "completed", "kind": "good"}
    return {"text": word, "kind": "bad" if word in ("failed", "error", "aborted") else "warn"}


def source(run: Run) -> Json:
    """Where the images came from: ``source``, ``synthetic``, ``digest``."""
    part = mapping(run.partition.get("source"))
    stated = [run.summary.get("source"), part.get("name"), part.get("source")]
    found = list(dict.fromkeys(text(value) for value in stated if value))
    mine, theirs = run.summary.get("source_sha256"), part.get("sha256")
    if mine and theirs and mine != theirs:
        run.notices.append("summary.json and partition.json name data of different hashes.")
    return {
        "source": "; ".join(found) or "not recorded",
        "synthetic": any("synthetic" in value.lower() for value in found),
        "digest": text(mine or theirs or "not recorded"),
    }


def class_view(test: Json, classes: list[str]) -> Json:
    """Figures of each class, the confusion matrix, and the number of images behind them."""
    rows: list[Json] = [
        {
            "name": text(row.get("name")),
            **{key: number(row.get(key)) for key in ("precision", "recall", "f1", "auc")},
            "support": count(row.get("support")),
        }
        for row in objects(test.get("per_class"))
    ]
    matrix = _confusion(test.get("confusion"))
    size = len(matrix)
    labels = [row["name"] for row in rows] if len(rows) == size else classes
    if len(labels) != size:
        labels = [f"class {i}" for i in range(size)]
    wrong: list[Json] = [
        {"true": true, "predicted": labels[j], "count": cell, "share": cell / sum(row)}
        for i, (true, row) in enumerate(zip(labels, matrix, strict=True))
        for j, cell in enumerate(row)
        if i != j and cell
    ]
    wrong.sort(key=lambda row: -row["count"])
    tested = sum(map(sum, matrix)) or sum(row["support"] or 0 for row in rows)
    small = [r["name"] for r in rows if r["support"] is not None and r["support"] < SMALL_CLASS]
    return {
        "per_class": rows,
        "images": tested or None,
        "confusions": wrong[:6],
        "small_classes": small,
        "small_class": SMALL_CLASS,
        "heat_map": charts.confusion(matrix, labels) if 0 < size <= HEAT_MAP_LIMIT else None,
    }


def _confusion(value: object) -> list[list[int]]:
    """Return the matrix if it is a square one of counts, else an empty one."""
    rows = value if isinstance(value, list) else []
    matrix = [
        [n for cell in row if (n := count(cell)) is not None]
        for row in rows
        if isinstance(row, list)
    ]
    square = len(matrix) == len(rows) and all(len(row) == len(rows) for row in matrix)
    return matrix if square else []


def holdings(run: Run, seen: Iterable[str], classes: list[str]) -> Json:
    """Who holds what, as far as it is known, and who else was ``seen``: rows, totals, a chart."""
    found = objects(run.partition.get("hospitals"))
    sizes = [count(item.get("train")) for item in found]
    total = sum(size for size in sizes if size is not None)
    rows: list[Json] = []
    bars: list[tuple[str, list[int]]] = []
    for item, size in zip(found, sizes, strict=True):
        labels = item.get("labels")
        counts = [count(c) or 0 for c in labels] if isinstance(labels, list) else []
        name = text(item.get("name"))
        bars.append((name, counts))
        rows.append({
            "name": name, "train": size, "val": count(item.get("val")),
            "share": size / total if size is not None and total else None,
            "classes": f"{sum(c > 0 for c in counts)} of {len(counts)}" if counts else None,
        })  # fmt: skip
    known = {row["name"] for row in rows}
    empty: dict[str, Any] = {"train": None, "val": None, "share": None, "classes": None}
    rows += [{"name": n, **empty} for n in dict.fromkeys(seen) if n not in known]
    scheme = run.partition.get("scheme")
    return {
        "hospitals": rows,
        "hospital_count": len(rows) or None,
        "hospital_totals": {k: sum(row[k] or 0 for row in rows) or None for k in ("train", "val")},
        "class_bars": charts.hospital_bars(bars, classes) if any(c for _, c in bars) else None,
        "bars_left_out": max(0, len(bars) - charts.BAR_LIMIT),
        "scheme": text(scheme) if scheme else "",
    }

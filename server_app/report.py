"""The report of one run: reads the files of its directory, writes one page.

The page is for a reader who wasn't there. What a file doesn't hold is shown as not recorded,
never guessed; where two files disagree, the page says so. A run that failed early, or is
still going, gets a report as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import DataError
from common.files import atomic_write
from server_app import charts, report_template

FILE_NAME = "report.html"
INPUTS = ("config.json", "partition.json", "metrics.jsonl", "summary.json")
FIGURES = ("accuracy", "macro_f1", "macro_auc")
HEAT_MAP_LIMIT = 60
MATRIX_ROUNDS = 25  # columns that fit a printed page
SMALL_CLASS = 30
Json = dict[str, Any]


@dataclass
class Run:
    """What the run directory holds; missing parts are empty."""

    name: str
    config: Json = field(default_factory=dict)
    partition: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    rounds: list[Json] = field(default_factory=list)
    hashes: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into ``run_dir`` atomically and return its path."""
    if not run_dir.is_dir():
        raise DataError(f"{run_dir} is no run directory", "give the directory that the run wrote")
    target = run_dir / FILE_NAME
    atomic_write(target, report_template.render(_view(read_run(run_dir))))
    return target


def read_run(run_dir: Path) -> Run:
    """Read the run's files; what can't be read becomes a notice in the report."""
    run = Run(name=text(run_dir.resolve().name))
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
            records = [record for record in records if _round(record) is not None]
            run.rounds = records
        elif records:
            setattr(run, name.removesuffix(".json"), records[0])
        if lost := len(parts) - len(records):
            run.notices.append(f"{name}: {lost} of {len(parts)} records unreadable and left out.")
    return run


def _parse(content: bytes) -> Json | None:
    try:
        value = json.loads(content.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# --- Values as they may be, not as they should be ---------------------------------------


def number(value: object) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def count(value: object) -> int | None:
    """Return a sensible whole number that is not negative, or None."""
    found = number(value)
    return int(found) if found is not None and 0 <= found < 1e12 else None


def loss_of_privacy(value: object) -> float | None:
    """Return an ε: infinity is a meaningful answer here, a negative number is none."""
    if value == math.inf:
        return math.inf
    found = number(value)
    return found if found is not None and found >= 0 else None


def text(value: object) -> str:
    """Return readable text: no control characters, none that XML or UTF-8 can't carry."""
    if value is None:
        return charts.MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    plain = value if isinstance(value, str) else json.dumps(value, default=str)
    bad = ("Cc", "Cs", "Cn")
    line = " ".join(plain.split())
    return "".join("\ufffd" if unicodedata.category(c) in bad else c for c in line)


def mapping(value: object) -> Json:
    """Return the object, or an empty one."""
    return value if isinstance(value, dict) else {}


def objects(value: object) -> list[Json]:
    """Return the objects in a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def names(value: object) -> list[str]:
    """Return the items of a list as text."""
    return [text(item) for item in value] if isinstance(value, list) else []


def _round(record: Json) -> int | None:
    found = count(record.get("round"))
    return found if found is not None and found < 1e6 else None


# --- The parts of the page --------------------------------------------------------------


def _view(run: Run) -> Json:
    latest = {key: record for record in run.rounds if (key := _round(record)) is not None}
    # A resumed run repeats a round: the last word counts, except for who took part.
    history = [_history_row(latest[key]) for key in sorted(latest)]
    best = count(run.summary.get("best_round"))
    shown, how = _shown(latest, best)
    test = mapping(latest[shown].get("test")) if shown is not None else {}
    private, spent = _privacy(run, history)
    figures = {key: _figure(run, test, key, shown == best) for key in FIGURES}
    classes = names(run.partition.get("classes"))
    class_view = _classes(test, classes)
    hospital_view = _hospitals(run, history, classes)
    done = [r for r in history if r["status"] == "ok" and r["round"] > 0]
    failed = [r["round"] for r in history if r["status"] == "failed"]
    rounds = count(run.summary.get("rounds"))
    wall = number(run.summary.get("wall_seconds"))
    times = [s for r in run.rounds if (s := number(r.get("seconds"))) is not None]
    secagg = run.summary.get("secagg")
    source = _source(run)
    return {
        "title": f"Run {run.name}",
        "status": _status(run),
        "reason": text(run.summary["reason"]) if run.summary.get("reason") else "",
        **figures,
        "interval": charts.interval(figures["accuracy"], class_view["images"]),
        "shown_round": shown, "shown_how": how, "private": private, "spent": spent,
        "delta": number(run.summary.get("delta")),
        "privacy_unit": str(run.summary.get("privacy_unit") or "image"),
        "secagg": secagg if isinstance(secagg, bool) else None,
        **source,
        "drops": sum(len(objects(record.get("dropped"))) for record in run.rounds),
        "rounds": len(done) if rounds is None else rounds,
        "done": len(done), "failed": len(failed), "best": best,
        "by_validation": shown is not None and _validated_best(history) == shown,
        "took": wall if wall is not None else (sum(times) if times else None),
        "wall_known": wall is not None,
        "curves": charts.curves(history, best, failed, private, number(run.config.get("epsilon"))),
        "history": history, **class_view, **hospital_view,
        "show_spent": private and any(h["epsilon"] for h in hospital_view["hospitals"]),
        **_participation(run.rounds),
        "config": _pairs(run.config),
        "versions": _pairs(run.summary.get("versions")),
        "hashes": [("data source", source["digest"]), *run.hashes],
        "small_class": SMALL_CLASS,
        "notices": run.notices,
    }  # fmt: skip


def _pairs(value: object) -> list[tuple[str, str]]:
    return [(text(key), text(item)) for key, item in mapping(value).items()]


def _history_row(record: Json) -> Json:
    test, train = mapping(record.get("test")), mapping(record.get("train"))
    validation = mapping(record.get("validation"))
    return {
        "round": _round(record), "status": record.get("status"),
        "accuracy": number(test.get("accuracy")), "f1": number(test.get("macro_f1")),
        "auc": number(test.get("macro_auc")), "test_loss": number(test.get("loss")),
        "train_loss": number(train.get("loss")),
        "validation": number(validation.get("accuracy")),
        "validation_loss": number(validation.get("loss")),
        "epsilon": loss_of_privacy(record.get("epsilon")),
        "by_hospital": mapping(record.get("epsilon_by_hospital")),
    }  # fmt: skip


def _shown(latest: Mapping[int, Json], best: int | None) -> tuple[int | None, str]:
    """Choose the round whose test figures are shown, and say how it was chosen."""
    tested = [key for key in sorted(latest) if mapping(latest[key].get("test"))]
    if best in tested:
        return best, "recorded as the best" + (" (the untrained model)" if best == 0 else "")
    # Never by test accuracy: choosing on the test set would flatter the result.
    if not tested:
        return None, ""
    return tested[-1], "the untrained model" if tested[-1] == 0 else "the last one tested"


def _validated_best(history: Sequence[Json]) -> int | None:
    valid = [r for r in history if r["round"] > 0 and r["validation"] is not None]
    return max(valid, key=lambda r: r["validation"])["round"] if valid else None


def _figure(run: Run, test: Json, key: str, compare: bool) -> float | None:
    one, other = number(run.summary.get(f"test_{key}")), number(test.get(key))
    if compare and one is not None and other is not None and abs(one - other) > 5e-4:
        run.notices.append(
            f"summary.json and metrics.jsonl disagree on {key}: {one:g} and {other:g}."
        )
    return other if one is None else one


def _privacy(run: Run, history: Sequence[Json]) -> tuple[bool, float | None]:
    """Tell whether the run claims differential privacy, and the largest ε on record."""
    found = [run.summary.get("epsilon"), *(row["epsilon"] for row in history)]
    found += [e for r in history for h in r["by_hospital"].values() for e in mapping(h).values()]
    value = max((e for f in found if (e := loss_of_privacy(f)) is not None), default=None)
    declared = run.summary.get("privacy")
    declared = run.config.get("privacy") if declared is None else declared
    if value == math.inf:
        return False, value
    if isinstance(declared, str):
        word = declared.strip().lower()
        return bool(word) and not word.startswith(("no", "off", "false", "disabled")), value
    return declared if isinstance(declared, bool) else value is not None, value


def _status(run: Run) -> dict[str, str]:
    recorded = run.summary.get("status")
    if not isinstance(recorded, str):
        return {"text": "unfinished", "kind": "warn"}
    word = text(recorded).lower()
    if word in ("ok", "completed", "complete", "finished", "success", "succeeded", "done"):
        return {"text": "completed", "kind": "good"}
    return {"text": word, "kind": "bad" if word in ("failed", "error", "aborted") else "warn"}


def _source(run: Run) -> Json:
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


def _classes(test: Json, classes: list[str]) -> Json:
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


def _hospitals(run: Run, history: Sequence[Json], classes: list[str]) -> Json:
    spent: Json = {}
    for row in history:
        spent.update({text(name): mapping(value) for name, value in row["by_hospital"].items()})
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
    seen = [name for record in run.rounds for name in names(record.get("expected"))]
    known = {row["name"] for row in rows}
    empty = {"train": None, "val": None, "share": None, "classes": None}
    rows += [{"name": n, **empty} for n in dict.fromkeys([*seen, *spent]) if n not in known]
    for row in rows:
        figures = mapping(spent.get(row["name"]))
        row.update({key: loss_of_privacy(figures.get(key)) for key in ("epsilon", "prv", "pld")})
    scheme = run.partition.get("scheme")
    return {
        "hospitals": rows,
        "hospital_count": len(rows) or None,
        "hospital_totals": {k: sum(row[k] or 0 for row in rows) or None for k in ("train", "val")},
        "class_bars": charts.hospital_bars(bars, classes) if any(c for _, c in bars) else None,
        "bars_left_out": max(0, len(bars) - charts.BAR_LIMIT),
        "scheme": text(scheme) if scheme else "",
    }


def _participation(records: Sequence[Json]) -> Json:
    rows: list[Json] = []
    cells: list[tuple[str, dict[str, tuple[str, str, str]]]] = []
    tries: Counter[int | None] = Counter()
    for record in records:
        expected, gave = names(record.get("expected")), names(record.get("contributed"))
        dropped = [
            {key: text(drop.get(key)) for key in ("hospital", "stage", "reason")}
            for drop in objects(record.get("dropped"))
        ]
        round_ = _round(record)
        tries[round_] += 1
        if not (expected or gave or dropped):
            continue  # round 0 asks no hospital
        label = str(round_) + (f" (try {tries[round_]})" if tries[round_] > 1 else "")
        lost = {drop["hospital"] for drop in dropped}
        silent = [name for name in expected if name not in lost and name not in gave]
        status = text(record.get("status"))
        kind = {"ok": "good", "failed": "bad"}.get(status, "warn")
        rows.append({
            "label": label, "status": status, "kind": kind, "expected": len(expected),
            "contributed": len(gave), "dropped": dropped, "silent": silent,
            "seconds": number(record.get("seconds")),
        })  # fmt: skip
        marks = dict.fromkeys(gave, ("yes", "●", "contributed"))
        marks |= dict.fromkeys(lost, ("dropped", "×", "dropped"))
        marks |= dict.fromkeys(silent, ("unknown", "?", "unaccounted for"))
        cells.append((label, marks))
    everyone = dict.fromkeys(name for _, marks in cells for name in marks)
    absent = ("no", charts.MISSING, "not expected")
    blocks = [cells[i : i + MATRIX_ROUNDS] for i in range(0, len(cells), MATRIX_ROUNDS)]
    matrix = [
        {
            "labels": [label for label, _ in block],
            "rows": [(n, [marks.get(n, absent) for _, marks in block]) for n in everyone],
        }
        for block in blocks
    ]
    return {"participation": rows, "matrix": matrix}

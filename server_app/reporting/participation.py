"""Who took part in which round: a row a round, and a matrix of rounds and hospitals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from server_app.reporting.files import round_of
from server_app.reporting.formats import MISSING
from server_app.reporting.values import Json, names, number, objects, text

MATRIX_ROUNDS = 25  # columns that fit a printed page


def participation(records: Sequence[Json]) -> Json:
    """Of every try of every round: expected, contributed, dropped, and who is unaccounted for."""
    rows: list[Json] = []
    cells: list[tuple[str, dict[str, tuple[str, str, str]]]] = []
    tries: Counter[int | None] = Counter()
    for record in records:
        expected, gave = names(record.get("expected")), names(record.get("contributed"))
        dropped = [
            {key: text(drop.get(key)) for key in ("hospital", "stage", "reason")}
            for drop in objects(record.get("dropped"))
        ]
        round_ = round_of(record)
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
    absent = ("no", MISSING, "not expected")
    blocks = [cells[i : i + MATRIX_ROUNDS] for i in range(0, len(cells), MATRIX_ROUNDS)]
    matrix = [
        {
            "labels": [label for label, _ in block],
            "rows": [(n, [marks.get(n, absent) for _, marks in block]) for n in everyone],
        }
        for block in blocks
    ]
    return {"participation": rows, "matrix": matrix}

"""What the page of a run of vectors shows: from the lines of its files to the template's names.

Made from files alone: the registry is not asked, and what was done to it by hand after the run's
end is not here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from server_app.reporting import formats
from server_app.reporting.drawing import BAR_LIMIT
from server_app.reporting.files import Run
from server_app.reporting.parts import class_view, holdings, source, status
from server_app.reporting.values import (
    Json,
    claims_privacy,
    count,
    loss_of_privacy,
    names,
    number,
    pairs,
    share,
    text,
)
from server_app.vectors.report_charts import influence_bars, quality, timeline
from server_app.vectors.report_events import Ensemble, Published, Story, ensemble, read_story
from server_app.vectors.report_hospitals import contributions, influence_history, last_influences
from server_app.vectors.report_words import CODES, KINDS, unprotected

LISTED = 500
"""Rows of a table of events, the latest: the rest is counted."""


def view(run: Run) -> Json:
    """Return what the page of a run of vectors shows; the template writes it."""
    story = read_story(run.lines)
    shown, how = _shown(run, story)
    private, spent = _privacy(run, story)
    rows = contributions(run, story)
    _compare(run, story, shown, rows)
    found = class_view(shown.test if shown else {}, names(run.partition.get("classes")))
    moved, moved_on = last_influences(run, story)
    left, judged = _ensemble(run, story), _judged(run, story)
    expected = count(run.summary.get("hospitals"))
    accuracy = share(run.summary.get("test_accuracy"))
    accuracy = shown.accuracy if accuracy is None and shown else accuracy
    origin = source(run)
    deltas = [d for d in (share(run.summary.get("delta")), *(a.delta for a in story.arrivals))
              if d is not None]  # fmt: skip
    return {
        "title": f"Run {run.name}", "status": status(run),
        "reason": text(run.summary["reason"]) if run.summary.get("reason") else "",
        **unprotected(
            run, private=private, bare=sum(r["bare"] for r in rows) if private else 0,
            several=max((r["vectors"] for r in rows), default=0),
            judged=judged,
        ),
        "judged": judged,
        "accuracy": accuracy, "interval": formats.interval(accuracy, found["images"]),
        "macro_f1": number(shown.test.get("macro_f1")) if shown else None,
        "macro_auc": number(shown.test.get("macro_auc")) if shown else None,
        "validation": shown.validation if shown else None,
        "first_validation": next((b.validation for b in story.bases), None),
        "shown_kind": "base", "shown_round": shown.version if shown else None,
        "shown_how": how + (", made before any vector came" if shown and not shown.version else ""),
        "private": private, "spent": spent, "delta": max(deltas, default=None),
        "privacy_unit": text(run.summary.get("privacy_unit") or "image"),
        **origin,
        "published": _published(run, story),
        "current": story.bases[-1].version if story.bases else None,
        "arrivals": len(story.arrivals), "late": sum(a.late > 0 for a in story.arrivals),
        "setback_counts": {k: sum(s.kind == k for s in story.setbacks) for k in KINDS},
        "by_hospitals": run.config.get("judged-by") == "hospitals",
        "held_count": len(story.held),
        "delivered": sum(r["vectors"] > 0 for r in rows), "expected": expected or len(rows) or None,
        "took": number(run.summary.get("wall_seconds")), "begins": story.begins,
        "spans": story.spans,
        "timeline": timeline(story, [r["name"] for r in rows]), "bar_limit": BAR_LIMIT,
        "quality": [c for by in ("arrivals", "time") if (c := quality(story, by))],
        "bases": _base_rows(story, shown)[-LISTED:],
        "made_anew": any(b.why.startswith("made anew") or "by hand" in b.why for b in story.bases),
        "held": [
            {"row": h, "why": CODES.get(h.code, ""), "harmful": ", ".join(h.influences.harmful)}
            for h in story.held[-LISTED:]
        ],
        "ensemble": left, "ensemble_why": CODES.get(left.why, left.why) if left else "",
        "contributions": rows, "moved": moved, "moved_on": moved_on,
        "influence_chart": influence_bars(moved), **influence_history(story),
        "vectors": story.arrivals[-LISTED:],
        "any_epsilon": private or any(a.epsilon is not None for a in story.arrivals),
        "setbacks": [
            {"row": s, "what": KINDS[s.kind], "why": CODES.get(s.why, "")}
            for s in story.setbacks[-LISTED:]
        ],
        "left_out_of": {
            "vectors": max(0, len(story.arrivals) - LISTED),
            "bases": max(0, len(story.bases) - LISTED),
            "held": max(0, len(story.held) - LISTED),
            "setbacks": max(0, len(story.setbacks) - LISTED),
        },
        **found, **holdings(run, (), names(run.partition.get("classes"))),
        "config": pairs(run.config), "versions": pairs(run.summary.get("versions")),
        "hashes": [("data source", origin["digest"]), *run.hashes],
        "notices": run.notices,
    }  # fmt: skip


def _shown(run: Run, story: Story) -> tuple[Published | None, str]:
    """The base whose figures are shown, and how it was chosen.

    After a withdrawal a version may be another model than the line of that version tells of: then
    no line is taken for it.
    """
    validated = [b for b in story.bases if b.validation is not None]
    by = "the best by validation" if validated else "recorded as the best"
    best = count(run.summary.get("best_version"))
    if best is not None:
        told = share(run.summary.get("test_accuracy"))
        mine = [b for b in story.bases if b.version == best]
        judged = share(run.summary.get("validation"))
        same = [b for b in mine if _close(b.accuracy, told) and _close(b.validation, judged)]
        if same or (mine and told is not None):
            return (same or mine)[-1], by
        return None, ""
    # Never by test accuracy: choosing on the test set would flatter the result.
    if validated:
        return max(validated, key=lambda b: b.validation or 0.0), by
    tested = [b for b in story.bases if b.test]
    return (tested[-1], "the last one tested") if tested else (None, "")


def _close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= 5e-4


def _privacy(run: Run, story: Story) -> tuple[bool, float | None]:
    """Whether the run claims differential privacy, and the largest ε of a vector on record."""
    found = [loss_of_privacy(run.summary.get("epsilon")), *(a.epsilon for a in story.arrivals)]
    value = max((e for e in found if e is not None), default=None)
    declared = run.summary.get("privacy")
    claims = claims_privacy(run.config.get("privacy") if declared is None else declared)
    if value == math.inf:
        return False, value
    return claims if claims is not None else value is not None, value


def _judged(run: Run, story: Story) -> bool | None:
    """Whether bases were judged before they were published; None if none was published."""
    made = [b for b in story.bases if b.version]
    known = [b.judged for b in made if b.judged is not None]
    if not all(known):  # whatever the run would have done: by hand, or before it was resumed
        return False
    by = run.config.get("judged-by")
    if not made or by == "hospitals":
        return True if made else None
    return by != "none" and any(b.validation is not None for b in made)


def _ensemble(run: Run, story: Story) -> Ensemble | None:
    """By the summary, which is written last; where there is none, by the last line of one."""
    told = run.summary.get("ensemble")
    if isinstance(told, dict):
        return ensemble(told)
    return None if "ensemble" in run.summary else story.ensemble


def _published(run: Run, story: Story) -> int:
    told = count(run.summary.get("bases"))
    versions = {b.version for b in story.bases if b.version}
    return len(versions) if told is None else told


def _compare(run: Run, story: Story, shown: Published | None, rows: Sequence[Json]) -> None:
    """Say where the summary and the lines disagree."""
    told = share(run.summary.get("test_accuracy"))
    if shown and shown.accuracy is not None and told is not None and not _close(
        shown.accuracy, told
    ):  # fmt: skip
        run.notices.append(
            f"summary.json and metrics.jsonl disagree on accuracy: {told:g} and {shown.accuracy:g}."
        )
    summary = run.summary.get("by_hospital")
    if isinstance(summary, dict):
        gone = {s.serial for s in story.setbacks if s.kind == "withdrawal"}
        counted = sum(
            (count(h.get("vectors")) or 0) - (count(_states(h).get("withdrawn")) or 0)
            for h in summary.values() if isinstance(h, dict)
        )  # fmt: skip
        lines = sum(a.serial not in gone for a in story.arrivals)
        if counted != lines:
            run.notices.append(
                f"summary.json counts {counted} vectors that were not taken back, and "
                f"metrics.jsonl {lines}."
            )
    if story.unknown:
        kinds = ", ".join(f"{n} × {kind}" for kind, n in sorted(story.unknown.items())[:10])
        run.notices.append(f"metrics.jsonl has lines that this version cannot show: {kinds}.")


def _states(told: Json) -> Json:
    found = told.get("states")
    return found if isinstance(found, dict) else {}


def _base_rows(story: Story, shown: Published | None) -> list[Json]:
    """Every base with its change in validation, and whether it still stands; oldest first."""
    rows: list[Json] = []
    before: float | None = None
    for base in story.bases:
        change = None
        if before is not None and base.validation is not None:
            change = base.validation - before
        before = base.validation if base.validation is not None else before
        rows.append({
            "row": base, "change": change, "f1": number(base.test.get("macro_f1")),
            "hospitals": ", ".join(base.hospitals), "marks": ["best"] if base is shown else [],
        })  # fmt: skip
    lowest = math.inf  # of the versions that came later
    for row in reversed(rows):
        version = row["row"].version
        if version is not None:
            if lowest <= version:
                row["marks"].append("replaced later")
            lowest = min(lowest, version)
    if rows:
        rows[-1]["marks"].append("current")
    return rows

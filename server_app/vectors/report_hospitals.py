"""What each hospital gave to a run of vectors, what it spent, and what the model is without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from server_app.reporting import formats
from server_app.reporting.files import Run
from server_app.reporting.values import Json, count, loss_of_privacy, mapping, objects, text
from server_app.vectors.report_events import Arrival, Influences, Story, influences

EPSILONS = 12
"""So many ε of one hospital are listed; of more, the rest is counted."""
JUDGEMENTS = 10
"""Columns of the table of influences that fit a page: the latest."""


def contributions(run: Run, story: Story) -> list[Json]:
    """A row for each hospital that is known of, by name; also one that gave nothing."""
    told = {text(k): mapping(v) for k, v in mapping(run.summary.get("by_hospital")).items()}
    sizes = {text(h.get("name")): count(h.get("train")) for h in _partition(run)}
    came: dict[str, list[Arrival]] = {}
    for arrival in story.arrivals:
        came.setdefault(arrival.hospital, []).append(arrival)
    setbacks = Counter(s.hospital for s in story.setbacks)
    moved = {row.hospital: row for row in last_influences(run, story)[0].rows}
    bases = _bases(story)
    known = {*told, *sizes, *came, *setbacks, *moved} - {formats.MISSING}
    rows = []
    for name in sorted(known):
        mine, summary = came.get(name, []), told.get(name, {})
        found = moved.get(name)
        rows.append({
            "name": name, "vectors": len(mine), "images": sizes.get(name),
            "least": max((a.images for a in mine if a.images is not None), default=None),
            "late": sum(a.late > 0 for a in mine), "setbacks": setbacks[name],
            "published": count(summary.get("published")),
            "bases": bases.get(name, ""),
            "states": ", ".join(
                f"{n} {text(state)}" for state, value in mapping(summary.get("states")).items()
                if (n := count(value))
            ),
            **_spent(mine, summary),
            "without": found.without if found else None,
            "moved": found.moved if found else None,
            "harmful": bool(found and found.harmful),
        })  # fmt: skip
    return rows


def _partition(run: Run) -> list[Json]:
    return objects(run.partition.get("hospitals"))


def _bases(story: Story) -> dict[str, str]:
    """The versions in which each hospital's vectors are."""
    found: dict[str, dict[str, None]] = {}
    for base in story.bases:
        for name in base.hospitals:
            found.setdefault(name, {})[text(base.version)] = None
    return {name: ", ".join(versions) for name, versions in found.items()}


def _spent(mine: Sequence[Arrival], summary: Json) -> Json:
    """ε of each vector, and their sum: of all that came, those taken back included."""
    found = [a.epsilon for a in mine if a.epsilon is not None]
    if not mine:  # the lines are lost, the summary is not
        told = summary.get("epsilons")
        listed = told if isinstance(told, list) else []
        found = [e for value in listed if (e := loss_of_privacy(value)) is not None]
    shown = ", ".join(formats.epsilon(e) for e in found[:EPSILONS])
    if rest := found[EPSILONS:]:
        shown += f" and {len(rest)} more, the largest {formats.epsilon(max(rest))}"
    return {
        "epsilons": shown,
        "epsilon_sum": sum(found) if found else None,  # infinity is an answer, too
        "bare": sum(a.epsilon is None for a in mine),
    }


def last_influences(run: Run, story: Story) -> tuple[Influences, str]:
    """The influences measured last, and on what: at the end, or with a base or a candidate."""
    final = influences(run.summary.get("influence"))
    if final.rows:
        return final, "on the base that was current at the end"
    judged = [
        (b.at.arrivals, b.influences, f"when base {text(b.version)} was made") for b in story.bases
    ]
    judged += [
        (
            h.at.arrivals,
            h.influences,
            f"on a candidate after base {text(h.version)} that was held back",
        )
        for h in story.held
    ]
    judged = [entry for entry in judged if entry[1].rows]
    if not judged:
        return Influences(None, None), ""
    _, found, what = max(judged, key=lambda entry: entry[0])
    return found, what


def influence_history(story: Story) -> Json:
    """Each hospital's influence at each judgement, the latest :data:`JUDGEMENTS`."""
    judged = [(b.at, f"base {text(b.version)}", b.influences) for b in story.bases]
    judged += [(h.at, f"held after base {text(h.version)}", h.influences) for h in story.held]
    judged = [entry for entry in judged if entry[2].rows]
    judged.sort(key=lambda entry: entry[0].arrivals)
    shown = judged[-JUDGEMENTS:]
    tables = [{row.hospital: row for row in found.rows} for _, _, found in shown]
    everyone = sorted({name for table in tables for name in table})
    return {
        "judgements": [label for _, label, _ in shown],
        "judgements_left_out": len(judged) - len(shown),
        "influence_rows": [(name, [table.get(name) for table in tables]) for name in everyone],
    }

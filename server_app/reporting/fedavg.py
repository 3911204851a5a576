"""What the page of a fedavg run shows: from lines of rounds to the template's names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from server_app import charts
from server_app.progress import against_words
from server_app.reporting.defence import defence
from server_app.reporting.files import Run, round_of
from server_app.reporting.participation import participation
from server_app.reporting.parts import class_view, holdings, source, status
from server_app.reporting.values import (
    Json,
    claims_privacy,
    count,
    loss_of_privacy,
    mapping,
    names,
    number,
    objects,
    pairs,
    text,
)

FIGURES = ("accuracy", "macro_f1", "macro_auc")


def view(run: Run) -> Json:
    """Return what the page of a fedavg run shows; the template writes it."""
    latest = {key: record for record in run.lines if (key := round_of(record)) is not None}
    # A resumed run repeats a round: the last word counts, except for who took part.
    history = [_history_row(latest[key]) for key in sorted(latest)]
    best = count(run.summary.get("best_round"))
    shown, how = _shown(latest, best)
    test = mapping(latest[shown].get("test")) if shown is not None else {}
    private, spent = _privacy(run, history)
    figures = {key: _figure(run, test, key, shown == best) for key in FIGURES}
    classes = names(run.partition.get("classes"))
    found = class_view(test, classes)
    hospital_view = _hospitals(run, history, classes)
    done = [r for r in history if r["status"] == "ok" and r["round"] > 0]
    failed = [r["round"] for r in history if r["status"] == "failed"]
    rounds = count(run.summary.get("rounds"))
    wall = number(run.summary.get("wall_seconds"))
    times = [s for r in run.lines if (s := number(r.get("seconds"))) is not None]
    secagg = run.summary.get("secagg")
    origin = source(run)
    return {
        "title": f"Run {run.name}",
        "status": status(run),
        "reason": text(run.summary["reason"]) if run.summary.get("reason") else "",
        **figures,
        "interval": charts.interval(figures["accuracy"], found["images"]),
        "shown_kind": "round", "shown_round": shown, "shown_how": how,
        "private": private, "spent": spent,
        "delta": number(run.summary.get("delta")),
        "privacy_unit": str(run.summary.get("privacy_unit") or "image"),
        "secagg": secagg if isinstance(secagg, bool) else None,
        **origin,
        "drops": sum(len(objects(record.get("dropped"))) for record in run.lines),
        "rounds": len(done) if rounds is None else rounds,
        "done": len(done), "failed": len(failed), "best": best,
        "by_validation": shown is not None and _validated_best(history) == shown,
        "took": wall if wall is not None else (sum(times) if times else None),
        "wall_known": wall is not None,
        "curves": charts.curves(history, best, failed, private, number(run.config.get("epsilon"))),
        "history": history, **found, **hospital_view,
        "against": against_words(mapping(run.summary.get("epsilon_against"))),
        "show_spent": private and any(h["epsilon"] for h in hospital_view["hospitals"]),
        **participation(run.lines),
        "defence": defence(run.summary, run.lines),
        "config": pairs(run.config),
        "versions": pairs(run.summary.get("versions")),
        "hashes": [("data source", origin["digest"]), *run.hashes],
        "notices": run.notices,
    }  # fmt: skip


def _history_row(record: Json) -> Json:
    test, train = mapping(record.get("test")), mapping(record.get("train"))
    validation = mapping(record.get("validation"))
    return {
        "round": round_of(record), "status": record.get("status"),
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
    claims = claims_privacy(run.config.get("privacy") if declared is None else declared)
    if value == math.inf:
        return False, value
    return claims if claims is not None else value is not None, value


def _hospitals(run: Run, history: Sequence[Json], classes: list[str]) -> Json:
    spent: Json = {}
    for row in history:
        spent.update({text(name): mapping(value) for name, value in row["by_hospital"].items()})
    seen = [name for record in run.lines for name in names(record.get("expected"))]
    found = holdings(run, [*seen, *spent], classes)
    for row in found["hospitals"]:
        figures = mapping(spent.get(row["name"]))
        row.update({key: loss_of_privacy(figures.get(key)) for key in ("epsilon", "prv", "pld")})
    return found

"""What a person sees while a run goes on: a line a round, and at the end a table."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.text import printable


def percent(value: float | None) -> str:
    """``0.914`` → ``91.4 %``; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    """``75`` → ``1 min 15 s``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


class Progress:
    """Prints to stdout, which Flower streams to whoever started the run."""

    def __init__(self, rounds: int, console: Console | None = None) -> None:
        self._rounds = rounds
        self._console = console or Console(width=110, highlight=False)
        self._started = time.monotonic()
        self._done = 0

    @property
    def console(self) -> Console:
        """Where it prints."""
        return self._console

    def say(self, text: str) -> None:
        """A line; what cannot be printed in it is escaped."""
        self._console.print(printable(text), markup=False, emoji=False)

    def partition(self, table: Mapping[str, Any]) -> None:
        """Who holds what (simulation)."""
        shown = Table(title=f"Who holds what ({table['scheme']})", title_justify="left")
        shown.add_column(
            "hospital", no_wrap=True, min_width=max(len(r["name"]) for r in table["hospitals"])
        )
        for column in ("train", "val", *table["classes"]):
            shown.add_column(escape(printable(column)), justify="right", overflow="fold")
        for row in table["hospitals"]:
            counts = [row["train"], row["val"], *row["labels"]]
            shown.add_row(row["name"], *(str(n) for n in counts))
        self._console.print(shown)

    def round_starts(self, number: int) -> None:
        """Only the first is worth a line: it includes every process's start."""
        if self._done == 0:
            self.say(f"round {number}/{self._rounds} has started …")

    def round_ends(self, record: Mapping[str, Any]) -> None:
        """Accuracy, ε, who contributed, time left."""
        self._done += 1
        test = record["test"] or {}
        parts = [f"round {record['round']}/{self._rounds}"]
        if record["status"] == "rolled-back":
            parts.append(f"ROLLED BACK ({record['reason']})")
        elif record["status"] != "ok":
            parts.append(f"FAILED ({record['reason']})")
        parts.append(f"test accuracy {percent(test.get('accuracy'))}")
        parts.append(f"macro-F1 {percent(test.get('macro_f1'))}")
        if record["epsilon"] is not None:
            parts.append(f"ε {record['epsilon']:.2f}")
        parts.append(f"{len(record['contributed'])}/{len(record['expected'])} hospitals")
        left = (time.monotonic() - self._started) / self._done * (self._rounds - record["round"])
        parts.append(f"{record['seconds']:.0f} s")
        parts.append(f"about {duration(left)} left" if left else "done")
        self.say("  ".join(parts))
        for d in record["dropped"]:
            self.say(f"    {d['hospital']} dropped at {d['stage']}: {d['reason']}")

    def summary(self, summary: Mapping[str, Any], directory: Path) -> None:
        """The result, and where the report is."""
        self._console.print(summary_table(summary))
        self.say(f"report: {directory / 'report.html'}")


def summary_table(summary: Mapping[str, Any]) -> Table:
    """A run's summary as a table of two columns."""
    table = Table(title=f"Run {summary['run']}: {summary['status']}", title_justify="left")
    table.add_column("figure")
    table.add_column("value")
    auc = summary["test_macro_auc"]
    if summary["privacy"] == "none":
        privacy = "no differential privacy"
    elif summary["epsilon"] is None:
        privacy = "nothing was spent"
    else:
        privacy = (
            f"ε = {summary['epsilon']:.2f}, δ = {summary['delta']:g} "
            f"(whole training, per {summary['privacy_unit']})"
        )
    rows = {
        "data": summary["source"],
        "hospitals": str(summary["hospitals"]),
        "rounds": f"{summary['rounds']} (best by validation: {summary['best_round']})",
        "test accuracy": percent(summary["test_accuracy"]),
        "test macro-F1": percent(summary["test_macro_f1"]),
        "test macro-AUC": "–" if auc is None else f"{auc:.4f}",
        "privacy": privacy,
        "ε against": against_words(summary.get("epsilon_against")),
        "secure aggregation": "on" if summary["secagg"] else "off: the server saw each update",
        "wall time": duration(summary["wall_seconds"]),
    }
    found = summary.get("defence") or {}
    if found.get("named"):
        rows["harmed by"] = "; ".join(f"{name}: {why}" for name, why in found["named"].items())
    if found.get("suspected"):
        rows["suspected"] = ", ".join(found["suspected"])
    if summary.get("rolled_back_rounds"):
        rows["rolled back"] = ", ".join(str(n) for n in summary["rolled_back_rounds"])
    if summary.get("reason"):
        rows["reason"] = summary["reason"]
    for name, value in rows.items():
        if value:
            table.add_row(name, escape(printable(value)))
    return table


def against_words(found: Mapping[str, float] | None) -> str:
    """Against whom which ε holds, in words; empty where the noise is not shared."""
    if not found:
        return ""
    return (
        f"server and outside {found['outside']:.2f}; with colluding hospitals "
        f"{found['colluders']:.2f}; one hospital's vector alone {found['broken']:.0f}"
    )

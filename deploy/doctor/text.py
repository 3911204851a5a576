"""The document of :mod:`deploy.doctor.checkup` as a table, and what is to be done below it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from common.text import printable

_SKIPPED = "not checked"


def render(document: dict[str, Any], width: int | None) -> None:
    """Print it; nothing is said by colour alone, nothing in it is read as markup."""
    console = Console(width=width, highlight=False, markup=False, emoji=False, color_system=None)
    checks = document["checks"]
    table = Table(
        title=f"Hospital {document['hospital'] or '(unknown)'}",
        title_justify="left",
        title_style="",
        header_style="",
    )
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for row in checks:
        table.add_row(row["name"], row["status"], printable(row["found"]))
    console.print(table)
    skipped = [row["name"] for row in checks if row["found"].startswith(_SKIPPED)]
    wrong = [r for r in checks if r["status"] != "PASS" and r["name"] not in skipped]
    if wrong:
        console.print("What to do, in this order:")
    for number, row in enumerate(wrong, 1):
        console.print(
            f"{number}. {row['status']} {row['name']}: {printable(row['remedy'])}", soft_wrap=True
        )
    if skipped:
        console.print(f"Then check again: {', '.join(skipped)} could not be checked.")
    counts = [f"{sum(r['status'] == s for r in checks)} {s}" for s in ("PASS", "WARN", "FAIL")]
    console.print(f"{document['status']}: {', '.join(counts)}")

"""A benchmark's table, for people or for a document."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table


def in_markdown(lines: Sequence[Sequence[str]]) -> str:
    """``lines``, the first of which is the head, as a document's table."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))


def show_table(lines: Sequence[Sequence[str]], *, markdown: bool = False) -> None:
    """Print ``lines``, the first of which is the head."""
    if markdown:
        print(in_markdown(lines))
        return
    head, *rest = lines
    table = Table(*head)
    for line in rest:
        table.add_row(*line)
    Console().print(table)


def spread(shares: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds (n − 1), in %; no deviation of one value."""
    sd = f" ± {100 * np.std(shares, ddof=1):.1f}" if len(shares) > 1 else ""
    return f"{100 * np.mean(shares):.1f}{sd}"

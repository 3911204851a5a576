"""The picture: claimed and audited ε, ROC curves, advantages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

from benchmarks.audit.cells import Row
from benchmarks.audit.statistics import largest_tpr

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # after the backend is chosen

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#b3261e", "#d98200", "#1f6fb2", "#2b8a5a")
LOSS, RATIO = "membership, loss threshold", "membership, likelihood ratio"


def draw(rows: list[Row], path: Path) -> None:
    """Write the figure to ``path`` (its suffix is the format); parts without rows stay empty."""
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(16, 5.4), width_ratios=(1.25, 1, 1), layout="constrained"
    )
    _claims(left, [row for row in rows if row["part"] == "canary"])
    attacked = [row for row in rows if row["part"] == "membership"]
    _roc(middle, [row for row in attacked if row["method"] == RATIO])
    _advantages(right, attacked)
    sources = sorted({row["source"] for row in rows})
    figure.suptitle(f"Images: {'; '.join(sources)}", fontsize=9, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _claims(axes: Axes, rows: list[Row]) -> None:
    names = list(dict.fromkeys(row["cell"] for row in rows))
    at = {name: len(names) - 1 - i for i, name in enumerate(names)}
    marks = {"many runs, any mechanism": ("o", -0.16), "many runs, Gaussian mechanism": ("D", 0.16)}
    for method, (mark, shift) in marks.items():
        chosen = [row for row in rows if row["method"] == method]
        axes.scatter(
            [row["audited_lower_bound"] for row in chosen],
            [at[row["cell"]] - shift for row in chosen],
            marker=mark, s=34, zorder=3, label=f"lower bound: {method.partition(', ')[2]}",
            color=[COLOURS[0] if row["refuted"] else COLOURS[3] for row in chosen],
        )  # fmt: skip
    for name in names:
        claim = next(row["claimed_epsilon"] for row in rows if row["cell"] == name)
        axes.plot([claim, claim], [at[name] - 0.38, at[name] + 0.38], color="0.15", lw=2)
    axes.plot([], [], color="0.15", lw=2, label="claimed ε")
    axes.set_yticks([at[name] for name in names], [n.removeprefix("canary: ") for n in names])
    axes.set_xlabel("ε (red: the claim is refuted)")
    axes.set_xlim(left=-0.5)
    axes.grid(axis="x", alpha=0.25)
    axes.set_title("One canary, many runs")
    if names:
        axes.legend(fontsize=8, loc="upper right")


def _label(row: Row) -> str:
    if row["claimed_epsilon"] is None:
        return "no privacy"
    claimed = row["claimed_epsilon"]
    return f"ε = {claimed:.2g}" if claimed < 1000 else "clipping, hardly any noise"


def _roc(axes: Axes, rows: list[Row]) -> None:
    x = np.geomspace(1e-4, 1, 200)
    axes.plot(x, x, color="0.6", lw=1, ls=":", label="guessing")
    for row, colour in zip(rows, COLOURS, strict=False):
        false, true = np.array(row["mia_roc"]).T
        axes.plot(false, true, color=colour, label=_label(row))
        if row["claimed_epsilon"] is not None and row["claimed_epsilon"] < 3:
            limit = largest_tpr(row["claimed_epsilon"], row["delta"], x)
            axes.plot(x, limit, color=colour, lw=1, ls="--", label=f"limit at {_label(row)}")
    axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1.05))
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    axes.set_title("Membership by likelihood ratio")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="lower right")


def _advantages(axes: Axes, rows: list[Row]) -> None:
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    for offset, method, colour in ((-0.2, LOSS, COLOURS[2]), (0.2, RATIO, COLOURS[1])):
        chosen = {row["cell"]: row for row in rows if row["method"] == method}
        heights = [chosen[cell]["mia_advantage"] for cell in cells]
        ends = np.array([chosen[cell]["mia_advantage_interval"] for cell in cells]).reshape(-1, 2)
        errors = np.abs(ends.T - heights)
        axes.bar(
            np.arange(len(cells)) + offset, heights, 0.38, color=colour,
            yerr=errors if cells else None, capsize=3, label=method.partition(", ")[2],
        )  # fmt: skip
    for i, cell in enumerate(cells):
        limit = next(row["mia_advantage_limit"] for row in rows if row["cell"] == cell)
        axes.plot([i - 0.42, i + 0.42], [limit, limit], color="0.15", lw=2)
    axes.plot([], [], color="0.15", lw=2, label="largest that (ε, δ) allows")
    named = [_label(next(row for row in rows if row["cell"] == cell)) for cell in cells]
    axes.set_xticks(range(len(cells)), [name.replace(", ", ",\n") for name in named], fontsize=9)
    axes.axhline(0, color="0.3", lw=0.8)
    axes.set_ylabel("advantage: TPR − FPR, 95 % interval")
    axes.set_title("Membership advantage")
    axes.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.93))

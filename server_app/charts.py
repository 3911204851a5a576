"""The drawings of a fedavg run's report, and those of its hospitals: clean numbers in, SVG out.

How a drawing becomes an element of the page: :mod:`server_app.reporting.drawing`; how figures are
written: :mod:`server_app.reporting.formats`, whose functions are here, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from server_app.reporting.drawing import (
    ALERT,
    BAR_LIMIT,
    DRAWABLE,
    FULL_WIDTH,
    HALF_WIDTH,
    INK,
    LINE_STYLES,
    MUTED,
    SEQUENTIAL,
    as_svg,
    colours,
    drawing,
    drawn_once,
    shorten,
)
from server_app.reporting.formats import (
    MISSING,
    delta,
    duration,
    epsilon,
    fixed,
    interval,
    percent,
    whole,
)

__all__ = [
    "BAR_LIMIT",
    "MISSING",
    "Line",
    "LineChart",
    "colours",
    "confusion",
    "curves",
    "delta",
    "duration",
    "epsilon",
    "fixed",
    "heat_map",
    "hospital_bars",
    "interval",
    "line_chart",
    "percent",
    "shorten",
    "stacked_bars",
    "whole",
]

PAIR_LIMIT = 10  # more classes than this: the matrix needs the page's width
CELL_TEXT_LIMIT = 20  # more classes than this: counts would not be readable


Row = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """One curve: its name in the legend and its (round, value) points."""

    label: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class LineChart:
    """What one chart over the rounds shows, beside its lines."""

    name: str
    alt: str
    percent: bool = False
    full_width: bool = False
    best_round: int | None = None
    failed_rounds: Sequence[int] = ()
    target: tuple[float, str] | None = None


def curves(
    history: Sequence[Row],
    best: int | None,
    failed: Sequence[int],
    private: bool,
    target: float | None,
) -> list[dict[str, Any]]:
    """Draw what the rounds left behind; a chart without a single point is left out."""
    wanted = [
        ("quality", "Accuracy and macro-F1", {
            "accuracy": "test accuracy", "f1": "test macro-F1",
            "validation": "federated validation accuracy"}),
        ("loss", "Loss", {
            "train_loss": "training", "test_loss": "test", "validation_loss": "validation"}),
        ("epsilon", "Privacy loss so far", {"epsilon": "ε, largest of all hospitals"}),
    ]  # fmt: skip
    found = []
    for name, title, keys in wanted:
        lines = [Line(label, _points(history, key)) for key, label in keys.items()]
        lines = [line for line in lines if line.points]
        if lines and (private or name != "epsilon"):
            found.append((name, title, lines))
    drawn = []
    for name, title, lines in found:
        wide = name == "quality" or len(found) < 3
        ends = "; ".join(
            f"{line.label} from {line.points[0][1]:.3g} at round {line.points[0][0]} "
            f"to {line.points[-1][1]:.3g} at round {line.points[-1][0]}"
            for line in lines
        )
        chart = LineChart(
            name,
            f"{title} over the rounds: {ends}.",
            percent=name == "quality",
            full_width=wide,
            best_round=best if name == "quality" else None,
            failed_rounds=failed,
            target=(target, f"target ε = {target:g}")
            if name == "epsilon" and target and 0 < target < DRAWABLE
            else None,
        )
        svg = line_chart(chart, lines)
        drawn.append({"title": title, "legend": [], "svg": svg, "wide": wide})
    return drawn


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> dict[str, Any]:
    """Draw the confusion matrix and say in words what share lies on its diagonal."""
    total = sum(map(sum, counts))
    right = sum(row[i] for i, row in enumerate(counts))
    alt = f"Confusion matrix of {len(counts)} classes: {right} of {total} test images are right."
    svg = heat_map("confusion", alt, counts, classes)
    return {"title": "Confusion matrix", "legend": [], "svg": svg, "wide": len(counts) > PAIR_LIMIT}


def hospital_bars(
    rows: Sequence[tuple[str, Sequence[int]]], classes: Sequence[str]
) -> dict[str, Any]:
    """Draw the classes of each hospital, with a legend that wraps in the page."""
    width = max([len(classes), *(len(values) for _, values in rows)])
    labels = [*classes, *(f"class {i}" for i in range(len(classes), width))]
    alt = "Images of each class at each hospital: " + "; ".join(
        f"{label} {sum(values)}" for label, values in rows[:BAR_LIMIT]
    )
    return {
        "title": "Images of each class at each hospital",
        "legend": list(zip(labels, colours(width), strict=True)),
        "svg": stacked_bars("hospitals", alt, rows, width),
    }


def _points(history: Sequence[Row], key: str) -> list[tuple[int, float]]:
    values = [(row["round"], row[key]) for row in history if row[key] is not None]
    return [(x, y) for x, y in values if abs(y) < DRAWABLE]


@drawn_once
def line_chart(chart: LineChart, lines: Sequence[Line]) -> Markup:
    """Draw curves over the rounds, with the best round, failed rounds and a target."""
    width, height = (FULL_WIDTH, 3.2) if chart.full_width else (HALF_WIDTH, 3.0)
    with drawing(width, height) as (figure, axes):
        for line, (colour, marker, dash) in zip(lines, LINE_STYLES, strict=False):
            xs, ys = zip(*line.points, strict=True)
            size = 4 if len(xs) <= 40 else 0
            axes.plot(
                xs, ys, color=colour, marker=marker, markersize=size, ls=dash, label=line.label
            )
        rounds = [x for line in lines for x, _ in line.points]
        last = max(rounds)
        for number in chart.failed_rounds:
            # Named once; a narrow chart has no room for it and stands beside a wide one.
            named = chart.full_width and number == chart.failed_rounds[0]
            label = "failed round" if named else None
            axes.axvspan(number - 0.4, number + 0.4, color="#cc6677", alpha=0.18, lw=0, label=label)
            last = max(last, number)
        axes.set_xlim(-0.5, max(last, 1) + 0.5)
        _scale(axes, chart, max(y for line in lines for _, y in line.points))
        axes.grid(axis="y")
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=14, integer=True, min_n_ticks=1))
        _best(axes, chart)
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, borderpad=0.2, columnspacing=1.2
        )
        return as_svg(figure, chart.name, chart.alt)


@drawn_once
def heat_map(
    name: str, alt: str, counts: Sequence[Sequence[int]], classes: Sequence[str]
) -> Markup:
    """Draw a confusion matrix: colour is the share of the row, the figure the count."""
    size = len(counts)
    width, height = (9.4, 7.6) if size > PAIR_LIMIT else (5.5, 5.1)
    labels = [shorten(c, 22) for c in classes]
    with drawing(width, height) as (figure, axes):
        axes.set_aspect("equal")
        for row, values in enumerate(counts):
            total = sum(values)
            for column, value in enumerate(values):
                share = value / total if total else 0.0
                axes.add_patch(
                    Rectangle(
                        (column - 0.5, row - 0.5), 1, 1, fc=SEQUENTIAL(share), ec="#fff", lw=1.2
                    )
                )
                if size <= CELL_TEXT_LIMIT:
                    ink = "#ffffff" if share > 0.55 else (INK if value else "#b4bac4")
                    axes.text(
                        column, row, f"{value:,}", color=ink, ha="center", va="center_baseline",
                        fontsize=8 if size <= 14 else 6,
                    )  # fmt: skip
        axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        axes.set_xticks(range(size), labels, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), labels)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.spines[:].set_visible(False)
        return as_svg(figure, name, alt)


@drawn_once
def stacked_bars(
    name: str, alt: str, rows: Sequence[tuple[str, Sequence[int]]], class_count: int
) -> Markup:
    """Draw one bar a hospital, divided by class; the legend stands in the page."""
    rows = rows[:BAR_LIMIT]
    palette = colours(class_count)
    totals = [sum(values) for _, values in rows]
    with drawing(FULL_WIDTH, 0.7 + 0.27 * len(rows)) as (figure, axes):
        for row, (_, values) in enumerate(rows):
            left = 0
            for value, colour in zip(values, palette, strict=False):
                if value:
                    axes.barh(row, value, 0.7, left, color=colour, ec="#fff", lw=0.5)
                left += value
            axes.annotate(
                f"{totals[row]:,}", (totals[row], row), (4, 0), textcoords="offset points",
                va="center_baseline", color=MUTED,
            )  # fmt: skip
        axes.set_xlim(0, max([1, *totals]) * 1.07)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [shorten(label, 36) for label, _ in rows])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.grid(axis="x")
        axes.spines["bottom"].set_visible(False)
        axes.set_xlabel("images")
        return as_svg(figure, name, alt)


def _scale(axes: Axes, chart: LineChart, highest: float) -> None:
    """Start at zero: a cut axis makes small differences look large."""
    if chart.percent:
        axes.set_ylim(0, 1.03)
        axes.set_yticks((0, 0.2, 0.4, 0.6, 0.8, 1.0))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.0f}%"))
        return
    if chart.target is not None:
        value, label = chart.target
        highest = max(highest, value)
        axes.axhline(value, color=ALERT, lw=1.2, ls=(0, (5, 3)))
        axes.annotate(
            label, (0, value), (4, 4), xycoords=("axes fraction", "data"), color=ALERT,
            textcoords="offset points",
        )  # fmt: skip
    axes.set_ylim(0, highest * 1.15 or 1)


def _best(axes: Axes, chart: LineChart) -> None:
    if chart.best_round is None:
        return
    axes.axvline(chart.best_round, color=MUTED, lw=0.8, ls=(0, (2, 2)), zorder=0)
    axes.annotate(
        f"best: round {chart.best_round}", (chart.best_round, 0), (-4, 4),
        xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="right" if chart.best_round > 1 else "left", color=MUTED,
    )  # fmt: skip

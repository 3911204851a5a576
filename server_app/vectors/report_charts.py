"""The drawings of a run of vectors: who submitted when, how good it was, who harms.

How a drawing becomes an element of the page: :mod:`server_app.reporting.drawing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from server_app.reporting.drawing import (
    ALERT,
    BAR_LIMIT,
    DRAWABLE,
    FULL_WIDTH,
    MUTED,
    as_svg,
    drawing,
    drawn_once,
    shorten,
)
from server_app.reporting.formats import percent, points
from server_app.vectors.report_events import Influences, Moment, Story

Chart = dict[str, Any]
DRAWN = 4000
"""Most marks of a kind in one drawing, the latest: more would make the page heavy."""
LABELLED = 12
"""Most bases whose vertical line has its name."""
UNITS = ((120.0, 1.0, "seconds"), (7200.0, 60.0, "minutes"), (259200.0, 3600.0, "hours"))
# Kind → words, colour, shape, filled, and how far from the middle of the hospital's row: what
# happens in the same second must not hide.
MARKS = {
    "arrival": ("vector arrived", "#332288", "o", True, 0.0),
    "late": ("arrived late: for an older base", "#aa7700", "^", True, 0.0),
    "refused": ("refused by the server", "#9a3b00", "x", True, -0.26),
    "refusal": ("the hospital refused", "#9a3b00", "s", False, -0.26),
    "excluded": ("excluded", "#882255", "D", False, 0.26),
    "withdrawal": ("taken back", "#117733", "<", False, 0.26),
}

# Words, colour, shape, line; a candidate has no line, a base holds until the next.
SERIES = (
    ("candidate at its arrival: validation", "#7a828e", "o", "none"),
    ("current base: validation", "#332288", "s", "-"),
    ("current base: test", "#117733", "^", "-."),
)


@drawn_once
def timeline(story: Story, hospitals: Sequence[str]) -> Chart | None:
    """Hospital by time, with every arrival and setback, and the bases as vertical lines.

    None without a time or a hospital. Hospitals beyond ``BAR_LIMIT`` are left to the table.
    """
    if story.spans is None or not hospitals:
        return None
    rows = {name: i for i, name in enumerate(hospitals[:BAR_LIMIT])}
    marks: dict[str, list[tuple[float, float]]] = {}
    happened = [(("late" if a.late else "arrival"), a.hospital, a.at) for a in story.arrivals]
    happened += [(s.kind, s.hospital, s.at) for s in story.setbacks]
    unit, name = _unit(story.spans)
    for kind, hospital, at in happened:
        if hospital in rows and at.seconds is not None:
            place = rows[hospital] + MARKS[kind][4]
            marks.setdefault(kind, []).append((at.seconds / unit, place))
    with drawing(FULL_WIDTH, 1.1 + 0.27 * len(rows)) as (figure, axes):
        # The rows' limits come first: annotations are placed by them.
        axes.set_ylim(len(rows) - 0.4, -0.6)
        _x_limits(axes, 0.0, story.spans / unit)
        for kind, (words, colour, shape, filled, _) in MARKS.items():
            if places := marks.get(kind, [])[-DRAWN:]:
                xs, ys = zip(*places, strict=True)
                axes.plot(
                    xs, ys, ls="none", marker=shape, markersize=6, color=colour, label=words,
                    markerfacecolor=colour if filled else "none", markeredgewidth=1.4,
                    clip_on=False, zorder=3,
                )  # fmt: skip
        _verticals(axes, story, lambda at: None if at.seconds is None else at.seconds / unit)
        axes.set_yticks(range(len(rows)), [shorten(label, 36) for label in rows])
        axes.grid(axis="y")
        axes.set_xlabel(f"{name} since {story.begins} UTC")
        _legend(axes)
        late = sum(bool(a.late) for a in story.arrivals)
        alt = (
            f"When each hospital submitted: {len(story.arrivals)} arrivals, {late} of them late, "
            f"{len(story.setbacks)} refusals, exclusions and withdrawals, and "
            f"{len(story.bases)} bases, over {story.spans / unit:.3g} {name}."
        )
        svg = as_svg(figure, "timeline", alt)
    return {"title": "When each hospital submitted", "legend": [], "svg": svg}


@drawn_once
def quality(story: Story, by: str) -> Chart | None:
    """Accuracy of candidates at their arrival and of the current base, ``by`` arrivals or time.

    The base's is a step: it holds until the next. None where nothing was measured, or (by time)
    no line has one.
    """
    unit, name = (1.0, "arrivals") if by == "arrivals" else _unit(story.spans or 0.0)
    if by == "time" and story.spans is None:
        return None

    def x_of(at: Moment) -> float | None:
        if by == "arrivals":
            return float(at.arrivals)
        return None if at.seconds is None else at.seconds / unit

    found = (
        [(a.at, a.validation) for a in story.arrivals],
        [(b.at, b.validation) for b in story.bases],
        [(b.at, b.accuracy) for b in story.bases],
    )
    lines = [
        [(x, y) for at, y in line if y is not None and (x := x_of(at)) is not None][-DRAWN:]
        for line in found
    ]
    values = [y for line in lines for _, y in line]
    if not values:
        return None
    end = float(len(story.arrivals)) if by == "arrivals" else (story.spans or 0.0) / unit
    floor = _floor(min(values))
    with drawing(FULL_WIDTH, 3.2) as (figure, axes):
        _percents(axes, floor)
        _x_limits(axes, 0.0, end)
        for (label, colour, marker, dash), line in zip(SERIES, lines, strict=True):
            if not line:
                continue
            xs, ys = (list(part) for part in zip(*line, strict=True))
            size = 4 if len(xs) <= 200 else 2
            axes.plot(
                [*xs, max(end, xs[-1])], [*ys, ys[-1]], color=colour, ls=dash, marker=marker,
                markersize=size, markevery=range(len(xs)), drawstyle="steps-post", label=label,
                zorder=2 if dash != "none" else 3,
            )  # fmt: skip
        _verticals(axes, story, x_of)
        axes.grid(axis="y")
        if by == "arrivals":
            axes.set_xlabel("vectors that had arrived")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=14, integer=True, min_n_ticks=1))
        else:
            axes.set_xlabel(f"{name} since {story.begins} UTC")
        _legend(axes)
        ends = "; ".join(
            f"{label} from {percent(line[0][1])} to {percent(line[-1][1])}"
            for (label, *_), line in zip(SERIES, lines, strict=True)
            if line
        )
        svg = as_svg(figure, f"quality-{by}", f"Accuracy over {by}: {ends}.")
    cut = f" (the axis starts at {percent(floor, 0)})" if floor else ""
    return {"title": f"Accuracy over {by}{cut}", "legend": [], "svg": svg}


@drawn_once
def influence_bars(found: Influences) -> Chart | None:
    """What the model loses without each hospital, in points; None where it was not measured."""
    rows = [(r.hospital, r.moved, r.harmful) for r in found.rows if r.moved is not None]
    rows = [row for row in rows if abs(row[1]) < DRAWABLE][:BAR_LIMIT]
    if not rows:
        return None
    with drawing(FULL_WIDTH, 0.9 + 0.27 * len(rows)) as (figure, axes):
        reach = max([0.001, *(abs(moved) for _, moved, _ in rows)]) * 1.25
        if found.margin is not None and 0 < found.margin < DRAWABLE:
            reach = max(reach, found.margin * 1.15)
            axes.axvspan(-found.margin, found.margin, color="#e6e9ef", lw=0, zorder=0,
                         label="within the margin: noise")  # fmt: skip
        for y, (_, moved, harmful) in enumerate(rows):
            axes.barh(
                y, moved, 0.7, color="#cc6677" if harmful else "#332288", ec="#fff", lw=0.5,
                hatch="////" if harmful else None, zorder=2,
            )  # fmt: skip
            axes.annotate(
                points(moved) + (" (harms)" if harmful else ""), (max(moved, 0.0), y), (4, 0),
                textcoords="offset points", va="center_baseline",
                color=ALERT if harmful else MUTED,
            )  # fmt: skip
        axes.axvline(0, color=MUTED, lw=0.8)
        axes.set_xlim(-reach, reach)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [shorten(name, 36) for name, _, _ in rows])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}"))
        axes.grid(axis="x")
        axes.set_xlabel("points that the model loses without the hospital (below 0: it gains)")
        if axes.get_legend_handles_labels()[0]:
            _legend(axes)
        alt = "Influence of each hospital: " + "; ".join(
            f"{name} {points(moved)}{' (harms)' if harmful else ''}"
            for name, moved, harmful in rows
        )
        svg = as_svg(figure, "influence", alt)
    return {"title": "What the model loses without each hospital", "legend": [], "svg": svg}


def _unit(seconds: float) -> tuple[float, str]:
    for below, unit, name in UNITS:
        if seconds < below:
            return unit, name
    return 86400.0, "days"


def _floor(lowest: float) -> float:
    """Where a percent axis starts: at zero, or close below figures that are all high."""
    return 0.0 if lowest < 0.5 else max(0.0, math.floor(10 * lowest - 0.5) / 10)


def _percents(axes: Axes, floor: float) -> None:
    axes.set_ylim(floor, floor + (1 - floor) * 1.03)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))


def _x_limits(axes: Axes, low: float, high: float) -> None:
    wide = max(high - low, 1e-9) if high > low else 1.0
    axes.set_xlim(low - 0.02 * wide, low + 1.02 * wide)


def _verticals(axes: Axes, story: Story, x_of: Callable[[Moment], float | None]) -> None:
    """A line for each base, named while there is room; a dotted one for each held candidate."""
    bases = [(x, b.version) for b in story.bases[-DRAWN:] if (x := x_of(b.at)) is not None]
    held = [x for h in story.held[-DRAWN:] if (x := x_of(h.at)) is not None]
    for xs, colour, dash, label in (
        ([x for x, _ in bases], MUTED, (0, (4, 2)), "base published"),
        (held, ALERT, (0, (1, 2)), "candidate held back"),
    ):
        if xs:
            axes.vlines(
                xs, 0, 1, colors=colour, lw=0.9, ls=[dash], zorder=1, label=label,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
    every = max(1, math.ceil(len(bases) / LABELLED))
    for i, (x, version) in enumerate(bases):
        if (len(bases) - 1 - i) % every == 0 and version is not None:
            axes.annotate(
                f"{version}", (x, 1), (2, -2), xycoords=("data", "axes fraction"),
                textcoords="offset points", va="top", color=MUTED, fontsize=7.5,
            )  # fmt: skip


def _legend(axes: Axes) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4, borderpad=0.2, columnspacing=1.2
    )

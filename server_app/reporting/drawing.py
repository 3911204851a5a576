"""Drawing for the report: one ``<svg>`` element that can stand in an HTML page beside others.

No XML prologue, no metadata, no address of any kind, ids prefixed with the chart's name, text
kept as text. A chart's ``alt`` says in words what the picture shows.

Names of hospitals and classes come from elsewhere. Matplotlib would read ``$`` as
mathematics and raise on nonsense, so that is off; ElementTree escapes the rest.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# Paul Tol's "muted" scheme: distinct under the common colour-vision deficiencies.
QUALITATIVE = (
    "#332288", "#88ccee", "#44aa99", "#117733", "#999933",
    "#ddcc77", "#cc6677", "#882255", "#aa4499", "#aab0ba",
)  # fmt: skip
SEQUENTIAL = LinearSegmentedColormap.from_list(
    "indigo",
    [(0, "#fbfbfd"), (0.08, "#e6e5f4"), (0.3, "#b9b6df"), (0.65, "#6f67b8"), (1, "#332288")],
)
# Colour is never the only difference between two lines.
LINE_STYLES = (("#332288", "o", "-"), ("#cc6677", "s", "--"), ("#117733", "^", "-."))
INK, MUTED, GRID, ALERT = "#2b3340", "#566070", "#e6e9ef", "#9a3b00"
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "consilium", "text.parse_math": False,
    "font.family": "DejaVu Sans", "font.size": 8.5, "text.color": INK,
    "axes.labelcolor": MUTED, "axes.edgecolor": "#b9c0cb", "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": GRID, "grid.linewidth": 0.7, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.6,
    "legend.frameon": False, "legend.handlelength": 2.6,
}  # fmt: skip
FULL_WIDTH, HALF_WIDTH = 9.4, 4.6  # inches; both are scaled alike to the page
DRAWABLE = 1e9  # a diverged loss would flatten all else, and infinity has no place
BAR_LIMIT = 60  # more hospitals than this: the table has them all
KEPT = 16  # drawings of a kind: those of a few reports

P = ParamSpec("P")
T = TypeVar("T")


def drawn_once(draw: Callable[P, T]) -> Callable[P, T]:
    """Keep what ``draw`` gave for the same figures: a report is written again after each event.

    Only for functions of plain numbers and text, or of data classes and sequences of them, whose
    ``repr`` says all that they are.
    """
    kept: OrderedDict[bytes, T] = OrderedDict()

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        # A hash: what a run of months did would be megabytes.
        key = hashlib.sha256(repr((args, kwargs)).encode("utf-8", "backslashreplace")).digest()
        if key in kept:
            return kept[key]
        found = kept[key] = draw(*args, **kwargs)
        if len(kept) > KEPT:
            kept.popitem(last=False)
        return found

    return drawn


@contextmanager
def drawing(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """An empty figure in the report's style, ``width`` × ``height`` inches, and its axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def colours(count: int) -> list[str]:
    """Return ``count`` colours; a second pass through the palette is lighter."""
    return [
        colour if i < len(QUALITATIVE) else _lighter(colour)
        for i in range(count)
        for colour in [QUALITATIVE[i % len(QUALITATIVE)]]
    ]


def shorten(label: str, limit: int) -> str:
    """Cut a label that would push the drawing aside."""
    return label if len(label) <= limit else label[: limit - 1].rstrip() + "…"


def _lighter(colour: str) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{(part + 255) // 2:02x}" for part in parts)


def as_svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an element of a page; ``name`` makes its ids its own, ``alt`` is read aloud."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the measuring font lacks: the browser has the glyphs.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        # As savefig(transparent=True), which draws everything once more only to measure it.
        figure.patch.set_facecolor("none")
        for axes in figure.axes:
            axes.patch.set_facecolor("none")
        FigureCanvasSVG(figure).print_svg(buffer)  # type: ignore[no-untyped-call]
    root = ET.fromstring(buffer.getvalue())
    for parent in root.iter():
        for child in list(parent):
            # Metadata names addresses; the style sheet would apply to the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {
            _local(key): _prefixed(_local(key), value, name)
            for key, value in element.attrib.items()
        }
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib.update({"role": "img", "aria-label": alt})
    return Markup(ET.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _prefixed(key: str, value: str, prefix: str) -> str:
    """Make ids and the references to them the chart's own."""
    if key == "id":
        return f"{prefix}-{value}"
    if key == "href":
        return value.replace("#", f"#{prefix}-", 1)
    return re.sub(r"url\(#", f"url(#{prefix}-", value)

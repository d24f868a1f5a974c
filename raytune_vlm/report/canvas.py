"""What all plots share: style, palette, and how they become SVG images in data URIs.

matplotlib's object interface only: no pyplot, no state that outlives a plot. The colours are Okabe
and Ito's (2008, "Color Universal Design"), which colour-blind readers can tell apart, and no
meaning rests on colour alone. Letters stay text (`svg.fonttype: none`), so that the browser sets
them in the page's own type; where the reader's system is dark, an image turns its greys round. The
same folder gives the same bytes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from raytune_vlm.report.formatting import recipe_value

INK, MUTED, GRID, QUIET = "#1b2430", "#5d6b7c", "#e6eaef", "#b4bfcb"
WINNER, BASE, DEFAULT = "#0072b2", "#d55e00", "#009e73"
MARKERS = {"finished": "o", "stopped": "v", "failed": "X", "running": "D"}
WORDS = {
    "finished": "finished",
    "stopped": "stopped early",
    "failed": "failed",
    "running": "running",
}

_STYLE: dict[str, Any] = {
    "svg.hashsalt": "raytune_vlm",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.minor.visible": False,
    "text.parse_math": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "lines.solid_capstyle": "round",
}


_DARK = {INK: "#e6ebf1", MUTED: "#a9b4c1", GRID: "#2b3440", QUIET: "#667486", WINNER: "#4aa8e0"}
_DARK["white"] = _DARK["#ffffff"] = "#161c24"
"""Colour -> what it becomes on a dark page; the others are told apart on both."""


@dataclass(frozen=True)
class Plot:
    """A figure with its title, a sentence for those who cannot see it, and a note."""

    figure: Figure
    title: str
    alt: str
    note: str = ""

    @cached_property
    def uri(self) -> str:
        """The figure as an SVG image in a data URI, without date or version."""
        stream = io.BytesIO()
        blank = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(stream, format="svg", transparent=True, metadata=blank)
        text = stream.getvalue().decode()
        text = text.replace("'DejaVu Sans'", f"{_TYPE}, 'DejaVu Sans'")
        text = text.replace("</defs>", f"<style>{_dark_rules()}</style></defs>", 1)
        return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()

    def png(self) -> bytes:
        """The figure on white, at 200 dots per inch, for slides and papers."""
        stream = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(stream, format="png", dpi=200, metadata={"Software": None})
        return stream.getvalue()


_TYPE = "system-ui, 'Segoe UI', Helvetica, Arial"


def _dark_rules() -> str:
    """What turns the greys of an SVG image round where its reader prefers dark."""
    rules = "".join(
        f'[style*="{part}: {light}"]{{{part}:{dark}!important}}'
        for light, dark in _DARK.items()
        for part in ("fill", "stroke")
    )
    return f"@media (prefers-color-scheme: dark){{{rules}}}"


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis in plain numbers: several also where it spans under a decade."""
    steps: tuple[float, ...] = (1.0,)
    if high / low < 10:
        steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    elif high / low < 3000:
        steps = (1.0, 3.0)
    axis.set_major_locator(LogLocator(base=10, subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: recipe_value(float(value))))
    axis.set_minor_locator(NullLocator())


@contextmanager
def canvas(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of that size in inches with one pair of axes, in the house style."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def thinned(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points in the same order: means of equal parts where there are more."""
    size = -(-len(points) // most)
    if size <= 1:
        return points
    parts = (points[start : start + size] for start in range(0, len(points), size))
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]


def is_number(value: Any) -> bool:
    """Whether a value can be a coordinate."""
    return isinstance(value, int | float) and math.isfinite(value)


def legend_above(axes: Axes) -> None:
    """The legend above the plot, in a line or two, where there is anything to explain."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    first = ("winner", "default", "base model")
    places = {label: first.index(label) if label in first else len(first) for label in labels}
    order = sorted(range(len(labels)), key=lambda index: places[labels[index]])
    axes.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=len(labels) if len(labels) < 5 else 3,
        handlelength=1.5,
        columnspacing=1.0,
        handletextpad=0.5,
    )

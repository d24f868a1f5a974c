"""The answers of `inspect` and `stats` as one HTML file without scripts that needs no network.

The look is that of the report: its style sheet is read as a file, since this package stands below
`report`. Everything that comes from data is escaped by jinja2; the page's own
Content-Security-Policy forbids scripts, frames, forms and every request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import raytune_vlm
from raytune_vlm.inspection import terminal
from raytune_vlm.inspection.lengths import Histogram, Statistics
from raytune_vlm.inspection.sample_view import RefusedView, SampleView
from raytune_vlm.inspection.target import Target
from raytune_vlm.inspection.text import line, middle_out
from raytune_vlm.records import write_text

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
"""That of the report, without its script."""

PACKAGE = Path(raytune_vlm.__file__).parent
MAX_CHARACTERS = 20_000

WIDTH, HEIGHT, BOTTOM, TOP, LEFT = 860, 260, 24, 34, 22
"""Of the histogram's drawing; the margins keep the numbers inside."""


@dataclass(frozen=True)
class Bar:
    """A bar of the histogram in the drawing's own units."""

    left: float
    top: float
    width: float
    height: float
    count: str
    label: str
    long: bool


def write_inspection(file: Path, target: Target, views: Sequence[SampleView | RefusedView]) -> None:
    """Write the page of `inspect`."""
    write_text(file, render("inspect.html.j2", target, views=views))


def write_statistics(file: Path, target: Target, statistics: Statistics) -> None:
    """Write the page of `stats`."""
    histogram = statistics.histogram
    write_text(
        file,
        render(
            "stats.html.j2",
            target,
            statistics=statistics,
            facts=terminal.facts(statistics),
            spreads=terminal.spread_rows(statistics),
            drawing=None if histogram is None else drawing(histogram, statistics.max_length),
        ),
    )


def render(template: str, target: Target, **values: Any) -> str:
    """A page as text."""
    folders = [PACKAGE / "inspection" / "templates", PACKAGE / "report" / "templates"]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        shown=lambda text: middle_out(text, MAX_CHARACTERS).replace("\n", "↵\n"), line=line
    )
    return environment.get_template(template).render(
        policy=POLICY,
        target=target,
        name=line(Path(target.name).name or target.name, 80),
        model=line(target.experiment.model.name),
        image_line=terminal.image_line,
        token_line=terminal.token_line,
        **values,
    )


def drawing(histogram: Histogram, max_length: int) -> dict[str, Any]:
    """The histogram as the coordinates of an SVG picture."""
    most = max(histogram.counts)
    step = (WIDTH - 2 * LEFT) / len(histogram.counts)
    room = HEIGHT - BOTTOM - TOP
    drawn = []
    for place, (count, label) in enumerate(
        zip(histogram.counts, terminal.bin_labels(histogram), strict=True)
    ):
        height = max(room * count / most, 1.5 if count else 0)
        drawn.append(
            Bar(
                left=round(LEFT + place * step + 1.5, 1),
                top=round(HEIGHT - BOTTOM - height, 1),
                width=round(step - 3, 1),
                height=round(height, 1),
                count=f"{count:,}" if count else "",
                label=label,
                long=histogram.edges[place] >= max_length,
            )
        )
    low, high = histogram.edges[0], histogram.edges[-2 if histogram.open_end else -1]
    inside = low < max_length < high
    edges = [(round(LEFT + place * step, 1), edge) for place, edge in enumerate(histogram.edges)]
    ends = edges[:-1] if histogram.open_end else edges
    limit = (max_length - low) / (histogram.edges[-1] - low) * (WIDTH - 2 * LEFT) + LEFT
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "base": HEIGHT - BOTTOM,
        "bars": drawn,
        "ticks": [(place, f"{edge:,}") for place, edge in ends],
        "open_end": round(edges[-2][0] + step / 2, 1) if histogram.open_end else None,
        "limit": round(limit, 1) if inside else None,
        "max_length": f"{max_length:,}",
    }

"""Score against every key that the search varied: rank x learning rate, and one panel a key.

Observational: the searcher put more trials where it expected good ones, and a stopped trial is
shown at the best rung that it reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from raytune_vlm.report.canvas import (
    BASE,
    INK,
    MARKERS,
    MUTED,
    QUIET,
    WINNER,
    WORDS,
    Plot,
    canvas,
    is_number,
    legend_above,
    log_ticks,
)
from raytune_vlm.report.formatting import recipe_value
from raytune_vlm.report.loading import SweepView

RANK, LEARNING_RATE = "lora.rank", "train.learning_rate"


@dataclass(frozen=True)
class Point:
    """One trial in a plot of the search space."""

    value: Any
    other: Any
    score: float
    status: str
    is_winner: bool


def space_plots(view: SweepView) -> tuple[list[Plot], list[Plot]]:
    """The rank x learning-rate plot (where both are varied), and a small panel per varied key."""
    wide = [_rank_by_learning_rate(view)]
    panels = [_panel(view, key) for key in view.varied_keys]
    return [plot for plot in wide if plot], [plot for plot in panels if plot]


def _points(view: SweepView, key: str, other: str | None = None) -> list[Point]:
    """Every trial that has the key (and the other) and a score; the winner last: on top."""
    points = []
    for trial in view.trials:
        best, recipe = view.best(trial), trial.record.recipe
        if best is None or key not in recipe or (other is not None and other not in recipe):
            continue
        is_winner = view.result is not None and trial.trial_id == view.result.winner
        second = recipe[other] if other else None
        points.append(Point(recipe[key], second, best[1].value, trial.record.status, is_winner))
    return sorted(points, key=lambda point: point.is_winner)


def _rank_by_learning_rate(view: SweepView) -> Plot | None:
    points = _points(view, LEARNING_RATE, RANK)
    points = [p for p in points if is_number(p.value) and is_number(p.other)]
    if len(points) < 2:
        return None
    ranks = sorted({point.other for point in points})
    scores = [point.score for point in points]
    with canvas(4.8, 3.1) as (figure, axes):
        look: dict[str, Any] = {"cmap": "viridis" if view.mode == "max" else "viridis_r"}
        look |= {"vmin": min(scores), "vmax": max(scores), "s": 62, "zorder": 3}
        look |= {"edgecolors": MUTED, "linewidths": 0.7}
        for status in dict.fromkeys(point.status for point in points):
            group = [point for point in points if point.status == status]
            x, y = [p.value for p in group], [ranks.index(p.other) for p in group]
            colours = [p.score for p in group]
            drawn = axes.scatter(x, y, c=colours, marker=MARKERS[status], **look)
            label: dict[str, Any] = {"color": QUIET, "markersize": 7, "label": WORDS[status]}
            axes.plot([], [], MARKERS[status], linestyle="none", **label)
        _ring(axes, [(p.value, ranks.index(p.other)) for p in points if p.is_winner])
        axes.set(xlabel=LEARNING_RATE, ylabel=RANK, ylim=(-0.6, len(ranks) - 0.4))
        axes.set_xscale("log")
        log_ticks(axes.xaxis, *axes.get_xlim())
        axes.set_yticks(range(len(ranks)), [recipe_value(rank) for rank in ranks])
        legend_above(axes)
        bar = figure.colorbar(drawn, ax=axes, aspect=28, pad=0.02, label=view.metric)
        bar.outline.set_visible(False)  # type: ignore[operator]
        return Plot(
            figure,
            "Rank and learning rate",
            f"Scatter of {RANK} against {LEARNING_RATE}, coloured by {view.metric}.",
            f"n = {len(points)} trials, each at its best rung on select.",
        )


def _panel(view: SweepView, key: str) -> Plot | None:
    points = _points(view, key)
    if not points:
        return None
    with canvas(3.0, 2.3) as (figure, axes):
        values = [point.value for point in points]
        if is_continuous(view, key, values):
            xs = [float(value) for value in values]
            if is_logarithmic(view, key, xs):
                axes.set_xscale("log")
        else:
            xs = _categories(axes, points)
        for x, point in zip(xs, points, strict=True):
            look: dict[str, Any] = {"color": WINNER if point.is_winner else QUIET}
            look |= {"markersize": 8 if point.is_winner else 6, "markeredgecolor": "white"}
            look |= {"markeredgewidth": 0.6, "zorder": 4 if point.is_winner else 3}
            axes.plot([x], [point.score], MARKERS[point.status], **look)
        if axes.get_xscale() == "log":
            log_ticks(axes.xaxis, *axes.get_xlim())
        base = view.best(view.base) if view.base else None
        if base:
            axes.axhline(base[1].value, color=BASE, linestyle=(0, (5, 3)), linewidth=1.1, zorder=2)
        axes.set_ylabel(view.metric)
        alt = f"{view.metric} on select against {key}, {len(points)} trials."
        return Plot(figure, key, alt, f"n = {len(points)}")


def is_continuous(view: SweepView, key: str, values: list[Any]) -> bool:
    """Numbers from an interval get an axis; choices, texts and truth values get places."""
    if any(isinstance(value, bool) or not is_number(value) for value in values):
        return False
    return _distribution(view, key).get("type") not in ("choice", "grid")


def is_logarithmic(view: SweepView, key: str, values: list[float]) -> bool:
    """Whether the numbers of a key belong on a logarithmic scale."""
    if min(values) <= 0:
        return False
    kind = _distribution(view, key).get("type")
    return kind == "loguniform" or (kind is None and max(values) / min(values) > 20)


def _distribution(view: SweepView, key: str) -> dict[str, Any]:
    entry = view.search_space.get(key, {})
    return entry if isinstance(entry, dict) else {}


def ordered(values: list[Any]) -> list[Any]:
    """The distinct values: numbers by size, texts by their length and then by their letters."""
    distinct = list({recipe_value(value): value for value in values}.values())
    if all(is_number(value) and not isinstance(value, bool) for value in distinct):
        return sorted(distinct)
    return sorted(distinct, key=lambda value: (len(str(value)), str(value)))


def _categories(axes: Axes, points: list[Point]) -> list[float]:
    """A place per distinct value, its median as a bar, and a shift that keeps equal ones apart."""
    values = ordered([point.value for point in points])
    names = [recipe_value(value) for value in values]
    labels = [name.replace("+", "\n+") for name in names]
    axes.set_xticks(range(len(names)), labels)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.grid(False, axis="x")
    xs = [0.0] * len(points)
    for place, name in enumerate(names):
        members = [i for i, p in enumerate(points) if recipe_value(p.value) == name]
        members.sort(key=lambda i: points[i].score)
        for order, index in enumerate(members):
            xs[index] = place + (0.11 * ((order % 3) - 1) if len(members) > 1 else 0.0)
        scores = [points[i].score for i in members]
        middle = len(scores) // 2
        median = scores[middle] if len(scores) % 2 else (scores[middle - 1] + scores[middle]) / 2
        axes.hlines(median, place - 0.28, place + 0.28, color=INK, linewidth=1.2, zorder=2.5)
    return xs


def _ring(axes: Axes, places: list[tuple[float, float]]) -> None:
    for x, y in places:
        ring: dict[str, Any] = {"markersize": 14, "markeredgecolor": WINNER, "markeredgewidth": 2}
        axes.plot([x], [y], "o", color="none", zorder=4, **ring)
        axes.plot([], [], "o", color="none", label="winner", **(ring | {"markersize": 8}))

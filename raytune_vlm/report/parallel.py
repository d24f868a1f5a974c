"""Parallel coordinates: every trial as a line through its values and to its score."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes

from raytune_vlm.report.canvas import INK, MUTED, QUIET, WINNER, Plot, canvas
from raytune_vlm.report.formatting import recipe_value, score
from raytune_vlm.report.loading import SweepView
from raytune_vlm.report.space_plots import is_continuous, is_logarithmic, ordered

MAX_KEYS = 9


@dataclass(frozen=True)
class _Scale:
    """One upright axis: trial -> its height from 0 to 1, and the labels beside it."""

    label: str
    heights: dict[str, float]
    ticks: list[tuple[float, str]]


def parallel_coordinates(view: SweepView) -> Plot | None:
    """The first keys that vary and the score; None for fewer than two keys or trials."""
    scored = {t.trial_id: best[1].value for t in view.trials if (best := view.best(t))}
    found = [_scale_of(view, key, scored) for key in view.varied_keys]
    scales = [scale for scale in found if scale is not None]
    if len(scales) < 2 or len(scored) < 2:
        return None
    left_out = len(scales[MAX_KEYS:])
    drawn = [*scales[:MAX_KEYS], _numbers(view.metric, scored, form=score)]
    with canvas(8.6, 3.6) as (figure, axes):
        _lines(view, axes, drawn, scored)
        _upright(axes, drawn)
    note = f"n = {len(scored)}; from violet, the worst, to yellow; thick and blue: the winner."
    if left_out:
        note += f" {left_out} more keys are not drawn."
    keys = ", ".join(scale.label for scale in drawn[:-1])
    return Plot(
        figure,
        "Parallel coordinates",
        f"A line for each of {len(scored)} trials through its values of {keys} to {view.metric}.",
        note,
    )


def _lines(view: SweepView, axes: Axes, scales: list[_Scale], scored: dict[str, float]) -> None:
    colours = matplotlib.colormaps["viridis"]
    sign = 1.0 if view.mode == "max" else -1.0
    order = sorted(scored, key=lambda trial_id: sign * scored[trial_id])
    winner = view.result.winner if view.result else None
    for place, trial_id in enumerate(order):
        xs = [x for x, scale in enumerate(scales) if trial_id in scale.heights]
        ys = [scales[x].heights[trial_id] for x in xs]
        look: dict[str, Any] = {"linewidth": 1.2, "alpha": 0.75, "zorder": 2}
        look["color"] = colours(0.25 + 0.67 * place / max(1, len(order) - 1))
        if trial_id == winner:
            look = {"linewidth": 3, "zorder": 5, "color": WINNER}
        axes.plot(xs, ys, **look)


def _upright(axes: Axes, scales: list[_Scale]) -> None:
    """The axes, each with its labels on its left."""
    axes.grid(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.set_yticks([])
    axes.set_xticks(range(len(scales)), [_broken(scale.label) for scale in scales], color=INK)
    axes.tick_params(axis="x", length=0)
    axes.set(xlim=(-0.45, len(scales) - 0.55), ylim=(-0.06, 1.06))
    for x, scale in enumerate(scales):
        axes.axvline(x, color=QUIET, linewidth=1, zorder=1)
        for height, text in scale.ticks:
            paper: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75}
            axes.text(
                x - 0.03,
                height,
                text,
                ha="right",
                va="center",
                fontsize=8,
                color=MUTED,
                zorder=6,
                bbox={"boxstyle": "square,pad=0.1", **paper},
            )


def _broken(label: str) -> str:
    """A dotted key on two lines."""
    head, dot, last = label.rpartition(".")
    return f"{head}{dot}\n{last}" if dot else label


def _scale_of(view: SweepView, key: str, scored: dict[str, float]) -> _Scale | None:
    """The axis of a key; None where all trials have the same value."""
    values = {
        trial.trial_id: trial.record.recipe[key]
        for trial in view.trials
        if trial.trial_id in scored and key in trial.record.recipe
    }
    names = {trial_id: recipe_value(value) for trial_id, value in values.items()}
    if len(set(names.values())) < 2:
        return None
    if is_continuous(view, key, list(values.values())):
        numbers = {trial_id: float(value) for trial_id, value in values.items()}
        return _numbers(key, numbers, log=is_logarithmic(view, key, list(numbers.values())))
    places = [recipe_value(value) for value in ordered(list(values.values()))]
    last = len(places) - 1
    ticks = [(place / last, name.replace("+", "\n+")) for place, name in enumerate(places)]
    heights = {trial_id: places.index(name) / last for trial_id, name in names.items()}
    return _Scale(key, heights, ticks)


def _numbers(
    label: str, values: dict[str, float], *, log: bool = False, form: Any = recipe_value
) -> _Scale:
    """Numbers on a scale from their least to their greatest, logarithmic where asked for."""
    turn = math.log if log else float
    back = math.exp if log else float
    low, high = turn(min(values.values())), turn(max(values.values()))
    width = (high - low) or 1.0
    heights = {trial_id: (turn(value) - low) / width for trial_id, value in values.items()}
    ticks = [(part, form(back(low + part * width))) for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return _Scale(label, heights, ticks)

"""Quality against what it cost: training time and trainable parameters."""

from __future__ import annotations

from typing import Any

from raytune_vlm.report.canvas import (
    BASE,
    DEFAULT,
    INK,
    MARKERS,
    QUIET,
    WINNER,
    WORDS,
    Plot,
    canvas,
    legend_above,
    log_ticks,
)
from raytune_vlm.report.front import COSTS
from raytune_vlm.report.loading import SweepView, TrialView

_DRAWN = ("train_seconds", "trainable_parameters")


def quality_against_cost(view: SweepView) -> list[Plot]:
    """A plot for each cost in which two trials with a score differ."""
    plots = [_plot(view, cost) for cost in _DRAWN]
    return [plot for plot in plots if plot is not None]


def _plot(view: SweepView, cost: str) -> Plot | None:
    points = [
        (float(getattr(trial.record, cost)), best[1].value, trial)
        for trial in view.trials
        if (best := view.best(trial)) and getattr(trial.record, cost) > 0
    ]
    if len({x for x, _, _ in points}) < 2:
        return None
    sign = 1.0 if view.mode == "max" else -1.0
    with canvas(4.8, 3.1) as (figure, axes):
        front = _front([(x, y) for x, y, trial in points if _may_win(view, trial)], sign)
        line: dict[str, Any] = {"color": INK, "linewidth": 1.1, "drawstyle": "steps-post"}
        xs, ys = [x for x, _ in front], [y for _, y in front]
        axes.plot(xs, ys, label="best for its cost", zorder=2, **line)
        seen: dict[str, None] = {}
        for x, y, trial in points:
            look = _look(view, trial)
            seen[trial.record.status] = None
            axes.plot([x], [y], MARKERS[trial.record.status], **look)
        for status in seen:
            label: dict[str, Any] = {"color": QUIET, "linestyle": "none", "label": WORDS[status]}
            axes.plot([], [], MARKERS[status], **label)
        if view.base and (base := view.best(view.base)):
            axes.axhline(base[1].value, color=BASE, linestyle=(0, (5, 3)), label="base model")
        axes.set_xscale("log")
        log_ticks(axes.xaxis, *axes.get_xlim())
        axes.set(xlabel=COSTS[cost], ylabel=f"{view.metric} on select")
        legend_above(axes)
    name = COSTS[cost].removesuffix(" in seconds")
    return Plot(
        figure,
        f"Quality against {name}",
        f"Scatter of {view.metric} on select against {name}, n = {len(points)} trials, with a "
        "line along those that are the best for their cost.",
        f"n = {len(points)}; each trial at its best rung, its whole cost.",
    )


def _may_win(view: SweepView, trial: TrialView) -> bool:
    return trial.record.status != "failed" and trial.trial_id not in view.infeasible


def _front(points: list[tuple[float, float]], sign: float) -> list[tuple[float, float]]:
    """Those that no cheaper one equals or beats, by cost."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def _look(view: SweepView, trial: TrialView) -> dict[str, Any]:
    if view.result and trial.trial_id == view.result.winner:
        return {"color": WINNER, "markersize": 9, "zorder": 5, "label": "winner"}
    if trial.trial_id == view.default_id:
        return {"color": DEFAULT, "markersize": 7, "zorder": 4, "label": "default"}
    return {"color": QUIET, "markersize": 6, "zorder": 3}

"""Learning curves: the select metric by step and the training loss by step."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes

from raytune_vlm.report.canvas import (
    BASE,
    DEFAULT,
    MARKERS,
    QUIET,
    WINNER,
    WORDS,
    Plot,
    canvas,
    is_number,
    legend_above,
    log_ticks,
    thinned,
)
from raytune_vlm.report.loading import SweepView, TrialView

MAX_POINTS = 200
"""Of a curve of losses: the page stays small however long a trial is."""


def learning_curves(view: SweepView) -> list[Plot]:
    """The select metric by step, and the training loss by step; only those that have points."""
    plots = [_metric_by_step(view), _loss_by_step(view)]
    return [plot for plot in plots if plot is not None]


def _drawn_last(view: SweepView) -> list[TrialView]:
    """All trials, the default and the winner last: on top of the others."""
    order = {view.default_id: 1, view.result.winner if view.result else None: 2}
    return sorted(view.trials, key=lambda trial: order.get(trial.trial_id, 0))


def _line(view: SweepView, trial: TrialView) -> dict[str, Any]:
    if view.result and trial.trial_id == view.result.winner:
        return {"color": WINNER, "linewidth": 2.4, "zorder": 5, "label": "winner"}
    if trial.trial_id == view.default_id:
        return {"color": DEFAULT, "linewidth": 1.8, "zorder": 4, "label": "default"}
    return {"color": QUIET, "linewidth": 1.1, "zorder": 3}


def _metric_by_step(view: SweepView) -> Plot | None:
    if not any(trial.estimates(view.metric) for trial in view.trials):
        return None
    with canvas(4.8, 3.1) as (figure, axes):
        seen: set[str] = set()
        for trial in _drawn_last(view):
            points = trial.estimates(view.metric)
            if not points:
                continue
            line = _line(view, trial)
            steps, values = [step for step, _ in points], [e.value for _, e in points]
            axes.plot(steps, values, **line)
            status = trial.record.status
            seen.add(status)
            open_ended = status in ("stopped", "failed", "running")
            face = "white" if status in ("stopped", "running") else line["color"]
            dot: dict[str, Any] = {
                "markerfacecolor": face,
                "markeredgecolor": line["color"],
                "markersize": 5.5,
            }
            marker = MARKERS[status] if open_ended else "o"
            axes.plot(steps[-1:], values[-1:], marker, zorder=line["zorder"] + 0.5, **dot)
        base = view.best(view.base) if view.base else None
        if base:
            axes.axhline(base[1].value, color=BASE, linestyle=(0, (5, 3)), label="base model")
        _legend_of_ends(axes, seen)
        axes.set(xlabel="step", ylabel=f"{view.metric} on select")
        axes.set_xlim(left=0)
        legend_above(axes)
        better = "higher" if view.mode == "max" else "lower"
        return Plot(
            figure,
            "Score on select by step",
            f"Curves of {view.metric} on the select split by step, one a trial.",
            f"Each point is a rung; {better} is better.",
        )


def _legend_of_ends(axes: Axes, seen: set[str]) -> None:
    for status in ("stopped", "failed", "running"):
        if status in seen:
            face = QUIET if status == "failed" else "white"
            look: dict[str, Any] = {
                "markerfacecolor": face,
                "markeredgecolor": QUIET,
                "markersize": 5.5,
            }
            axes.plot([], [], MARKERS[status], label=WORDS[status], **look)


def _loss_by_step(view: SweepView) -> Plot | None:
    with canvas(4.8, 3.1) as (figure, axes):
        drawn = False
        for trial in _drawn_last(view):
            points = [
                (row["step"], row["loss"]) for row in trial.logs if is_number(row.get("loss"))
            ]
            if not points:
                continue
            drawn = True
            line = _line(view, trial)
            line["linewidth"] *= 0.75
            axes.plot(*zip(*thinned(points, MAX_POINTS), strict=True), **line)
        if not drawn:
            return None
        axes.set(xlabel="step", ylabel="loss per labelled token", yscale="log")
        axes.set_xlim(left=0)
        log_ticks(axes.yaxis, *axes.get_ylim())
        legend_above(axes)
        alt = "Curves of the training loss by step on a logarithmic scale, one a trial."
        return Plot(figure, "Training loss by step", alt, "Logarithmic scale.")

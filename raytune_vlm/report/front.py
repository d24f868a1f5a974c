"""The Pareto front of a sweep with several objectives: a table, and a plot of the first two."""

from __future__ import annotations

from typing import Any

from raytune_vlm.report.canvas import (
    INK,
    MARKERS,
    QUIET,
    WINNER,
    Plot,
    canvas,
    is_number,
    legend_above,
    log_ticks,
)
from raytune_vlm.report.loading import SweepView, TrialView

COSTS = {
    "trainable_parameters": "trainable parameters",
    "train_seconds": "training time in seconds",
    "peak_memory_gb": "peak memory in GB",
}
"""Objective that is no metric -> its name on the plot."""


def front_plot(view: SweepView) -> Plot | None:
    """All trials by the first two objectives, those of the front joined; None without a front."""
    result = view.result
    if result is None or not result.front:
        return None
    first, second = list(result.objectives)[:2]
    row_of = {row["trial_id"]: row for row in result.front}
    with canvas(4.8, 3.1) as (figure, axes):
        for trial in view.trials:
            if trial.trial_id in row_of or trial.trial_id in view.infeasible:
                continue
            x, y = _value(view, trial, second), _value(view, trial, first)
            if is_number(x) and is_number(y):
                axes.plot([x], [y], MARKERS[trial.record.status], color=QUIET, markersize=5.5)
        steps = sorted(result.front, key=lambda row: row[second])
        xs, ys = [row[second] for row in steps], [row[first] for row in steps]
        axes.plot(xs, ys, "o-", color=INK, linewidth=1.2, markersize=6, label="front")
        if winner := row_of.get(result.winner):
            axes.plot(
                [winner[second]], [winner[first]], "o", color=WINNER, markersize=9, label="winner"
            )
        if second in COSTS and min(xs) > 0:
            axes.set_xscale("log")
            log_ticks(axes.xaxis, *axes.get_xlim())
        axes.set(xlabel=COSTS.get(second, second), ylabel=f"{first} on select")
        legend_above(axes)
        return Plot(
            figure,
            "Pareto front",
            f"Trials by {second} and {first}, those that no other beats joined by a line.",
            "No trial is better than one on the line in every objective. The winner is the best "
            "in the first.",
        )


def _value(view: SweepView, trial: TrialView, objective: str) -> Any:
    if objective in COSTS:
        return getattr(trial.record, objective) or None
    best = view.best(trial, objective)
    return best[1].value if best else None

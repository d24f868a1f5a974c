"""The training loss of each trial: a line of a few pixels on the page, a plot as a PNG file."""

from __future__ import annotations

import base64
from dataclasses import dataclass

from raytune_vlm.report.canvas import Plot, canvas, is_number, log_ticks, thinned
from raytune_vlm.report.formatting import count, score
from raytune_vlm.report.loading import SweepView, TrialView

MAX_POINTS = 60
_WIDTH, _HEIGHT = 64, 24


@dataclass(frozen=True)
class Loss:
    """The losses of one trial, drawn small."""

    uri: str
    alt: str
    last: float


def losses(view: SweepView) -> dict[str, Loss]:
    """Trial -> its loss by step; without trials that logged fewer than two."""
    found = {}
    for trial in view.trials:
        points = _points(trial)
        if len(points) > 1:
            (start, first), (end, last) = points[0], points[-1]
            alt = (
                f"training loss of {trial.trial_id}: {score(first)} at step {count(start)}, "
                f"{score(last)} at step {count(end)}"
            )
            found[trial.trial_id] = Loss(_drawn(points), alt, last)
    return found


def loss_plot(trial: TrialView) -> Plot | None:
    """The loss of one trial by step; None if it logged fewer than two."""
    points = _points(trial)
    if len(points) < 2:
        return None
    with canvas(4.8, 3.1) as (figure, axes):
        axes.plot(*zip(*points, strict=True), linewidth=1.4)
        axes.set(xlabel="step", ylabel="loss per labelled token")
        axes.set_title(trial.trial_id)
        axes.set_xlim(left=0)
        if min(value for _, value in points) > 0:
            axes.set_yscale("log")
            log_ticks(axes.yaxis, *axes.get_ylim())
    return Plot(figure, trial.trial_id, f"Training loss of {trial.trial_id} by step.")


def _points(trial: TrialView) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in trial.logs if is_number(row.get("loss"))]


def _drawn(points: list[tuple[float, float]]) -> str:
    """The points as an SVG image in a data URI."""
    means = thinned(points, MAX_POINTS)
    left, right = means[0][0], means[-1][0]
    low, high = min(y for _, y in means), max(y for _, y in means)
    width, height = (right - left) or 1.0, (high - low) or 1.0
    line = " ".join(
        f"{1 + (_WIDTH - 2) * (x - left) / width:.1f},{1 + (_HEIGHT - 2) * (high - y) / height:.1f}"
        for x, y in means
    )
    image = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">'
        f'<polyline points="{line}" fill="none" stroke="#6b7c8f" stroke-width="1.5"/></svg>'
    )
    return "data:image/svg+xml;base64," + base64.b64encode(image.encode()).decode()

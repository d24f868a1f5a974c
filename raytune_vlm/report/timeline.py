"""When each trial ran and when it was scored, from the ledger."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from raytune_vlm.report.canvas import INK, MARKERS, QUIET, WINNER, WORDS, Plot, canvas, legend_above
from raytune_vlm.report.formatting import count
from raytune_vlm.report.loading import SweepView

_ENDED = ("finished", "stopped", "failed")
_UNITS = ((7200, 3600, "hours"), (180, 60, "minutes"), (0, 1, "seconds"))
"""From a span in seconds -> the unit that it is told in."""


def rung_timeline(view: SweepView) -> Plot | None:
    """A line a trial from its start to its end, with a tick for each rung; None without events."""
    events = _events(view)
    if not events:
        return None
    start = min(float(event["time"]) for rows in events.values() for event in rows)
    end = max(float(event["time"]) for rows in events.values() for event in rows)
    scale, unit = next((scale, unit) for least, scale, unit in _UNITS if end - start >= least)
    trials = [trial for trial in view.trials if trial.trial_id in events]
    winner = view.result.winner if view.result else None
    size = max(2.0, 0.8 + 0.2 * len(trials))
    with canvas(7.6, size) as (figure, axes):
        seen: dict[str, None] = {}
        for place, trial in enumerate(trials):
            rows = events[trial.trial_id]
            times = [(float(row["time"]) - start) / scale for row in rows]
            scored = [t for t, row in zip(times, rows, strict=True) if row["event"] == "scored"]
            colour = WINNER if trial.trial_id == winner else QUIET
            axes.plot([times[0], times[-1]], [place, place], color=colour, linewidth=3, zorder=2)
            axes.plot(scored, [place] * len(scored), "|", color=INK, markersize=8, zorder=3)
            status = trial.record.status
            seen[status] = None
            axes.plot(times[-1:], [place], **_end(status, colour), zorder=4)
        axes.plot([], [], "|", color=INK, markersize=8, label="scored at a rung")
        for ended in seen:
            axes.plot([], [], label=WORDS[ended], linestyle="none", **_end(ended, QUIET))
        every = max(1, len(trials) // 60 + 1)
        axes.set_yticks(
            range(0, len(trials), every), [trial.trial_id for trial in trials[::every]], fontsize=7
        )
        axes.set(xlabel=f"{unit} since the first trial started", ylim=(len(trials) - 0.4, -0.6))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=7, min_n_ticks=2))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.grid(False, axis="y")
        legend_above(axes)
    return Plot(
        figure,
        "Rungs by time",
        f"A line for each of {count(len(trials))} trials from its start to its end, with a tick "
        "where it was scored at a rung.",
        "From the ledger; a gap between two ticks is training, waiting or a pause.",
    )


def _events(view: SweepView) -> dict[str, list[dict[str, Any]]]:
    """Trial -> what the ledger says of its run, in order; only trials that started."""
    known = {trial.trial_id for trial in view.trials}
    wanted = {"started", "scored", *_ENDED}
    found: dict[str, list[dict[str, Any]]] = {}
    for event in view.ledger:
        if event.get("event") in wanted and event.get("trial_id") in known and "time" in event:
            found.setdefault(event["trial_id"], []).append(event)
    return found


def _end(status: str, colour: str) -> dict[str, Any]:
    face = "white" if status in ("stopped", "running") else colour
    return {
        "marker": MARKERS[status],
        "color": colour,
        "markerfacecolor": face,
        "markersize": 6,
    }

"""The end of a sweep on the console: leaderboard, verdict, where things are, what to do next."""

from __future__ import annotations

from raytune_vlm.monitor import Monitor
from raytune_vlm.records import SweepFolder
from raytune_vlm.report.formatting import recipe_value, score
from raytune_vlm.report.headline import headline
from raytune_vlm.report.leaderboard import leaderboard
from raytune_vlm.report.loading import SweepView, load_view

TOLD = (
    "Lineage",
    "Over its seeds",
    "With other seeds",
    "Without overlap",
    "Detectable difference",
    "Report split touched",
)
"""The facts of the report page that the console tells as well."""


def conclude(folder: SweepFolder, monitor: Monitor) -> None:
    """Print the leaderboard, the verdict, the report's path and the next command."""
    view = load_view(folder.root)
    columns, rows = leaderboard_rows(view)
    monitor.table(f"Leaderboard of {view.name}: best score on `select`", columns, rows)
    found = headline(view)
    for station in found.stations:
        low, high = score(station.estimate.lower), score(station.estimate.upper)
        monitor.say(
            f"report split: {station.role} {view.metric} {score(station.estimate.value)} "
            f"[{low}, {high}], {station.num_samples} samples"
        )
    for label, value, explanation in found.facts:
        if label in TOLD:
            monitor.say(f"{label.lower()}: {value} ({explanation})")
    monitor.say(found.verdict)
    monitor.say(found.detail)
    monitor.say(f"winner's adapter: {folder.best}")
    monitor.say(f"report: {folder.report / 'index.html'}")
    monitor.say(f"next: raytune-vlm train {folder.best / 'experiment.yaml'}")


def leaderboard_rows(view: SweepView) -> tuple[list[str], list[list[str]]]:
    """Column names and cells of the console's leaderboard."""
    columns = ["trial", *view.varied_keys, "outcome", "step", *view.metrics]
    rows = []
    for row in leaderboard(view):
        name = row.trial_id + "".join(f" ({role})" for role in row.roles if role != row.trial_id)
        recipe = [recipe_value(row.recipe[key]) for key in view.varied_keys]
        cells = [row.cells.get(metric) for metric in view.metrics]
        best = cells[0].best_step if cells[0] else 0
        scores = [score(cell.best.value) if cell else "" for cell in cells]
        rows.append([name, *recipe, row.outcome, str(best), *scores])
    return columns, rows

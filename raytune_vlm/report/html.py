"""The report page: one HTML file that needs no network.

Everything that comes from data, models or messages is escaped by jinja2. The page's own
Content-Security-Policy forbids frames, forms and every request, and allows one script by its hash:
the one that sorts and filters the leaderboard (`templates/table.js`), the same for every sweep.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from raytune_vlm.records import TrialRecord, write_text
from raytune_vlm.report.controls import controls_section
from raytune_vlm.report.cost import quality_against_cost
from raytune_vlm.report.data import data_section
from raytune_vlm.report.faults import faults
from raytune_vlm.report.formatting import FILTERS
from raytune_vlm.report.front import front_plot
from raytune_vlm.report.gallery import NUM_OPENING, gallery
from raytune_vlm.report.headline import clearly, headline
from raytune_vlm.report.images import write_images
from raytune_vlm.report.importance import importance
from raytune_vlm.report.leaderboard import leaderboard, write_leaderboard
from raytune_vlm.report.loading import SweepView, load_view
from raytune_vlm.report.parallel import parallel_coordinates
from raytune_vlm.report.plots import learning_curves
from raytune_vlm.report.slices import slices
from raytune_vlm.report.space_plots import space_plots
from raytune_vlm.report.sparklines import losses
from raytune_vlm.report.timeline import rung_timeline

POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
    "base-uri 'none'; form-action 'none'"
)
MAX_QUARANTINED_ROWS = 50


def build_report(folder: Path, *, png: bool = False) -> Path:
    """Write `report/index.html` and the leaderboard files of a sweep folder; the page's path.

    With `png`, every plot and the loss of every trial is also written to `report/plots/`.

    Raises
    ------
    DataError
        If the folder is not a sweep folder.
    """
    view = load_view(folder)
    shown = content(view)
    write_leaderboard(view, shown["rows"])
    page = view.folder.report / "index.html"
    write_text(page, render(shown))
    if png:
        write_images(view, shown)
    return page


def render(shown: dict[str, Any]) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("raytune_vlm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    script = (files("raytune_vlm.report") / "templates" / "table.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("index.html.j2")
    return page.render(policy=POLICY.format(digest=digest), script=Markup(script), **shown)


def content(view: SweepView) -> dict[str, Any]:
    """All that the templates show, by name."""
    wide, panels = space_plots(view)
    return {
        "view": view,
        "headline": headline(view),
        "rows": leaderboard(view),
        "paired": _paired(view),
        "metric_table": _metric_table(view),
        "against_base": _against_base(view),
        "seeds": view.result.seeds() if view.result else [],
        "controls": controls_section(view),
        "guard": _guard(view),
        "against_cost": [plot for plot in (front_plot(view), *quality_against_cost(view)) if plot],
        "losses": losses(view),
        "curves": learning_curves(view),
        "wide_plots": wide,
        "panels": panels,
        "parallel": parallel_coordinates(view),
        "importance": importance(view),
        "slices": slices(view),
        "exhibits": gallery(view),
        "num_opening": NUM_OPENING,
        "data": data_section(view),
        "quarantined": view.quarantined[:MAX_QUARANTINED_ROWS],
        "times": _times(view),
        "timeline": rung_timeline(view),
        "faults": faults(view),
        "audit": _audit(view),
        "experiment_yaml": yaml.safe_dump(view.experiment, sort_keys=False, allow_unicode=True),
        "has_best": view.folder.best.is_dir(),
    }


def _paired(view: SweepView) -> list[dict[str, Any]]:
    """The paired tests, with the split that they were made on and what they say."""
    if view.result is None:
        return []
    words = {"good": "better", "bad": "worse", "unclear": "cannot tell"}
    return [
        {
            "test": test,
            "split": "report" if view.is_on_report(test) else "select",
            "says": words[clearly(test, view.mode_of(test.metric))],
        }
        for test in view.result.paired
    ]


def _against_base(view: SweepView) -> list[dict[str, Any]]:
    """Every trial against the base model on `select`, the smallest adjusted p-value first."""
    tests = view.result.against_base if view.result else []
    words = {"good": "better", "bad": "worse", "unclear": "cannot tell"}
    level = 1 - view.confidence
    found = []
    for test in sorted(tests, key=lambda test: (test.adjusted_p or 0.0, test.first)):
        told = test.adjusted_p is not None and test.adjusted_p <= level
        found.append(
            {"test": test, "says": words[clearly(test, view.mode)] if told else words["unclear"]}
        )
    return found


def _guard(view: SweepView) -> list[dict[str, Any]]:
    """The guard's scores, and whether the role is worse than the base model."""
    if view.result is None:
        return []
    words = {"good": "better", "bad": "worse", "unclear": "cannot tell"}
    return [
        {
            "score": entry,
            "says": words[clearly(entry.against_base, view.mode_of(entry.metric))]
            if entry.against_base
            else "",
        }
        for entry in view.result.guard
    ]


def _metric_table(view: SweepView) -> list[dict[str, Any]]:
    """All metrics of the roles that were scored on the untouched split."""
    table = []
    for role in ("base", "default", "winner"):
        scores = view.report_scores(role)
        if scores is not None:
            table.append({"role": role, "trial_id": view.role_of(role), "scores": scores})
    return table


def _times(view: SweepView) -> list[dict[str, Any]]:
    """Per trial the seconds of train, evaluate, other, and widths in percent of the longest."""
    longest = max((_total(trial.record) for trial in view.trials), default=0.0) or 1.0
    times = []
    for trial in view.trials:
        record, total = trial.record, _total(trial.record)
        other = total - record.train_seconds - record.evaluate_seconds
        parts = {"train": record.train_seconds, "evaluate": record.evaluate_seconds, "other": other}
        bars = [
            {"part": part, "seconds": seconds, "width": round(100 * seconds / longest, 2)}
            for part, seconds in parts.items()
        ]
        times.append({"trial_id": trial.trial_id, "total": total, "bars": bars})
    return times


def _total(record: TrialRecord) -> float:
    return max(record.seconds, record.train_seconds + record.evaluate_seconds)


def _audit(view: SweepView) -> dict[str, Any]:
    """Audit results as a matrix: trials by names, whatever the names are."""
    audited = [trial for trial in view.trials if trial.record.audit]
    names = list(dict.fromkeys(name for trial in audited for name in trial.record.audit))
    lines = [
        (trial.trial_id, [_verdict(trial.record.audit.get(name)) for name in names])
        for trial in audited
    ]
    verdicts = [verdict for _, line in lines for verdict, _ in line]
    num_failed, num_passed = verdicts.count("failed"), verdicts.count("passed")
    return {"names": names, "lines": lines, "failed": num_failed, "passed": num_passed}


def _verdict(entry: Any) -> tuple[str, Any]:
    """(`passed`, `failed` or nothing, the details) of one audit entry."""
    if isinstance(entry, bool):
        return ("passed" if entry else "failed"), {}
    if isinstance(entry, dict) and isinstance(entry.get("passed"), bool):
        details = {key: value for key, value in entry.items() if key != "passed"}
        return ("passed" if entry["passed"] else "failed"), details
    return "", entry

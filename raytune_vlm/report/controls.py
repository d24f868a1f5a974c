"""What the scores on `report` are due to: controls as a table, robustness as curves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_vlm.comparisons import CONTROLS_FILE, ROBUSTNESS_FILE, Comparison, Comparisons
from raytune_vlm.records import read_json
from raytune_vlm.report.canvas import BASE, DEFAULT, WINNER, Plot, canvas, legend_above
from raytune_vlm.report.headline import clearly
from raytune_vlm.report.loading import UNREADABLE, SweepView
from raytune_vlm.visible import one_line

LABELS = {
    "blank_image": "blank images",
    "shuffled_image": "images of other samples",
    "text_only": "no images",
    "gold": "the reference as answer",
}
_COLOURS = {"base": BASE, "default": DEFAULT, "winner": WINNER}
_AXES = {
    "jpeg_quality": "JPEG quality",
    "blur_sigma": "blur, sigma in pixels",
    "rotation_degrees": "rotation in degrees",
    "scale": "size, share of the side",
}


@dataclass(frozen=True)
class ControlRow:
    """One control of one role in the deciding metric."""

    role: str
    label: str
    entry: Comparison
    says: str


def controls_section(view: SweepView) -> dict[str, Any]:
    """Rows of the table, notes, what could not be read, and the curves; all may be empty."""
    problems: list[str] = []
    rows, notes, curves = [], [], {}
    for role, folder in _evaluations(view):
        controls = _read(folder / CONTROLS_FILE, problems)
        for entry in controls.entries:
            rows.append(
                ControlRow(role, LABELS.get(entry.name, entry.name), entry, _says(view, entry))
            )
        notes += [note for note in controls.notes if note not in notes]
        robustness = _read(folder / ROBUSTNESS_FILE, problems)
        if robustness.entries:
            curves[role] = robustness.entries
    return {"rows": rows, "notes": notes, "problems": problems, "plots": _plots(view, curves)}


def _evaluations(view: SweepView) -> Iterator[tuple[str, Path]]:
    """Role -> the folder of its evaluation on `report`; a trial with two roles comes once."""
    seen = set()
    for role in ("winner", "base", "default"):
        scores = view.report_scores(role)
        if scores is None or scores.trial_id in seen:
            continue
        seen.add(scores.trial_id)
        trial = view.folder.trial(view.role_of(role))
        yield role, trial.evaluation("report", scores.step)


def _read(file: Path, problems: list[str]) -> Comparisons:
    if not file.is_file():
        return Comparisons([])
    try:
        return Comparisons.from_json(read_json(file))
    except UNREADABLE as error:
        what = f"{file.name} cannot be read: {type(error).__name__}: {error!s:.300}"
        problems.append(one_line(what))
        return Comparisons([])


def _says(view: SweepView, entry: Comparison) -> str:
    """In a word what the altered prompts did to the score."""
    if view.metric not in entry.tests:
        return entry.skipped or "not scored"
    words = {"good": "better", "bad": "worse", "unclear": "cannot tell"}
    return words[clearly(entry.tests[view.metric], view.mode)]


def _plots(view: SweepView, curves: dict[str, list[Comparison]]) -> list[Plot]:
    """One plot for each kind of alteration: the score against its strength, by role."""
    kinds = dict.fromkeys(
        entry.name.split("=")[0] for entries in curves.values() for entry in entries
    )
    plots = [_plot(view, curves, kind) for kind in kinds]
    return [plot for plot in plots if plot is not None]


def _plot(view: SweepView, curves: dict[str, list[Comparison]], kind: str) -> Plot | None:
    """Scores with the interval of the difference to the unaltered images about each."""
    drawn, said = False, []
    with canvas(4.2, 2.6) as (figure, axes):
        for role, entries in curves.items():
            points = sorted(_points(view, entries, kind))
            if not points:
                continue
            strengths, values, below, above, plain = map(list, zip(*points, strict=True))
            axes.errorbar(
                strengths,
                values,
                yerr=[below, above],
                marker="o",
                markersize=4,
                capsize=2,
                color=_COLOURS[role],
                label="base model" if role == "base" else role,
            )
            axes.axhline(plain[0], color=_COLOURS[role], linewidth=0.8, linestyle=":")
            said.append(
                f"{role}: {plain[0]:.3f} as they are, "
                + ", ".join(
                    f"{value:.3f} at {x:g}" for x, value in zip(strengths, values, strict=True)
                )
            )
            drawn = True
        if not drawn:
            return None
        axes.set_xlabel(_AXES.get(kind, kind))
        axes.set_ylabel(view.metric)
        legend_above(axes)
    return Plot(
        figure,
        f"Robustness: {_AXES.get(kind, kind)}",
        f"{view.metric} with altered images. " + "; ".join(said),
        "dotted: images as they are; bars: interval of the difference to it",
    )


def _points(
    view: SweepView, entries: list[Comparison], kind: str
) -> Iterator[tuple[float, float, float, float, float]]:
    """(strength, score, reach below, reach above, plain score) of one kind of alteration."""
    for entry in entries:
        name, _, strength = entry.name.partition("=")
        test = entry.tests.get(view.metric)
        if name != kind or test is None or not math.isfinite(test.difference):
            continue
        below, above = test.difference - test.lower, test.upper - test.difference
        yield (
            float(strength),
            entry.altered[view.metric],
            below,
            above,
            entry.plain[view.metric],
        )

"""The leaderboard: one row a trial, best first, for the page, the CSV file and the JSON file."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, replace
from typing import Any

from raytune_vlm.records import BASE_TRIAL, MetricEstimate, TrialRecord, write_text
from raytune_vlm.report.loading import SweepView, TrialView, lookup


@dataclass(frozen=True)
class Cell:
    """A metric of one trial on `select`: at its last rung and at its best."""

    metric: str
    last_step: int
    last: MetricEstimate
    best_step: int
    best: MetricEstimate


@dataclass(frozen=True)
class Row:
    """One line of the leaderboard."""

    rank: int | None
    """1 for the best; None for the base model and for trials that have no score or failed."""
    trial_id: str
    roles: tuple[str, ...]
    """Of `winner`, `default`, `base`."""
    record: TrialRecord
    recipe: dict[str, Any]
    """Every varied key; None where the recipe has none (a conditional key)."""
    cells: dict[str, Cell]
    num_samples: int
    """Of `select`, that the best rung was scored on."""
    infeasible: str | None = None
    """The constraint that the trial broke, so that it may not win."""
    is_in_front: bool = False
    """Whether no other trial beats it in every objective, where there are several."""
    is_tied: bool = False
    """Whether it cannot be told from the winner."""
    lineage: tuple[str, ...] = ()
    """Whose clone it is, and which clone has replaced it."""
    by_hand: tuple[str, ...] = ()
    """What a person did to it while the sweep ran."""

    @property
    def outcome(self) -> str:
        """How the trial ended, in words, whose clone it is, and what a person did to it."""
        return "; ".join([self._end, *self.lineage, *self.by_hand])

    @property
    def _end(self) -> str:
        record = self.record
        if self.trial_id == BASE_TRIAL:
            return "not trained"
        if self.infeasible:
            return f"infeasible: {self.infeasible.removeprefix('infeasible: ')}"
        if record.status == "failed":
            return f"failed: {record.failure or 'no reason recorded'}"
        if record.status == "stopped":
            return f"stopped at step {record.step:,}"
        return record.status


def leaderboard(view: SweepView) -> list[Row]:
    """Rows best first by the best rung in the deciding metric; without a score, then those that
    failed or broke a constraint, last.

    Trials that were scored on fewer samples of `select` come after those with more. Ties go to the
    winner, then to the trial that was proposed first.
    """
    trials = [*view.trials, *([view.base] if view.base else [])]
    sign = -1.0 if view.mode == "max" else 1.0
    winner = view.result.winner if view.result else None
    infeasible = view.infeasible
    front = {row["trial_id"] for row in view.result.front} if view.result else set()
    tied = set(view.result.indistinguishable) - {winner} if view.result else set()

    def key(trial: TrialView) -> tuple[bool, bool, int, float, bool, int]:
        best = view.best(trial)
        return (
            trial.record.status == "failed" or trial.trial_id in infeasible,
            best is None,
            -trial.num_select,
            sign * best[1].value if best else 0.0,
            trial.trial_id != winner,
            trial.record.number,
        )

    rows: list[Row] = []
    rank = 0
    for trial in sorted(trials, key=key):
        ranked = trial.trial_id != BASE_TRIAL and trial.record.status != "failed"
        ranked = ranked and view.best(trial) is not None and trial.trial_id not in infeasible
        rank += ranked
        row = _row(view, trial, rank if ranked else None)
        broken, is_in_front = infeasible.get(trial.trial_id), trial.trial_id in front
        by_hand = view.by_hand.get(trial.trial_id, ())
        is_tied = trial.trial_id in tied
        row = replace(row, is_in_front=is_in_front, is_tied=is_tied, by_hand=by_hand)
        lineage = view.lineages.get(trial.trial_id, ())
        rows.append(replace(row, infeasible=broken, lineage=lineage))
    return rows


def _row(view: SweepView, trial: TrialView, rank: int | None) -> Row:
    roles = []
    if view.result and trial.trial_id == view.result.winner:
        roles.append("winner")
    if trial.trial_id == view.default_id:
        roles.append("default")
    if trial.trial_id == BASE_TRIAL:
        roles.append("base")
    cells = {}
    for metric in view.metrics:
        best = view.best(trial, metric)
        if best is not None:
            last_step, last = trial.estimates(metric)[-1]
            cells[metric] = Cell(metric, last_step, last, *best)
    recipe = _recipe(view, trial)
    return Row(rank, trial.trial_id, tuple(roles), trial.record, recipe, cells, trial.num_select)


def _recipe(view: SweepView, trial: TrialView) -> dict[str, Any]:
    """The varied keys of a trial; the default trial's gaps are filled from the experiment, and the
    seed of a recipe's first trial, which is the experiment's."""
    recipe = trial.record.recipe
    filled = view.experiment if trial.trial_id == view.default_id else {}
    own = {"seed": lookup(view.experiment, "seed")}
    return {key: recipe.get(key, own.get(key, lookup(filled, key))) for key in view.varied_keys}


_PARTS = ("", "_lower", "_upper", "_step")


def columns(view: SweepView) -> list[str]:
    """The columns of the CSV file and the keys of a row of the JSON file, in order."""
    metrics = [
        f"{metric}/{which}{part}"
        for metric in view.metrics
        for which in ("best", "last")
        for part in _PARTS
    ]
    first = ["rank", "trial_id", "roles", "status", "failure", "step", "max_steps"]
    last = [
        "num_select_samples",
        "trainable_parameters",
        "seconds",
        "train_seconds",
        "evaluate_seconds",
        "peak_memory_gb",
        "infeasible",
        "is_in_front",
        "lineage",
        "by_hand",
    ]
    return [*first, *view.varied_keys, *metrics, *last]


def flat_rows(view: SweepView, rows: list[Row]) -> list[dict[str, Any]]:
    """The rows as flat mappings of the same columns: what CSV and JSON hold."""
    flat = []
    for row in rows:
        record = row.record
        entry: dict[str, Any] = {
            "rank": row.rank,
            "trial_id": row.trial_id,
            "roles": "+".join(row.roles),
            "status": "base" if row.trial_id == BASE_TRIAL else record.status,
            "failure": record.failure,
            "step": record.step,
            "max_steps": record.max_steps,
            **row.recipe,
            "num_select_samples": row.num_samples,
            "trainable_parameters": record.trainable_parameters,
            "seconds": record.seconds,
            "train_seconds": record.train_seconds,
            "evaluate_seconds": record.evaluate_seconds,
            "peak_memory_gb": record.peak_memory_gb,
            "infeasible": row.infeasible,
            "is_in_front": row.is_in_front,
            "lineage": "; ".join(row.lineage) or None,
            "by_hand": "; ".join(row.by_hand) or None,
        }
        for metric, cell in row.cells.items():
            for which, step, estimate in (
                ("best", cell.best_step, cell.best),
                ("last", cell.last_step, cell.last),
            ):
                values = (estimate.value, estimate.lower, estimate.upper, step)
                names = (f"{metric}/{which}{part}" for part in _PARTS)
                entry.update(zip(names, values, strict=True))
        flat.append({name: _finite(entry.get(name)) for name in columns(view)})
    return flat


def _finite(value: Any) -> Any:
    """Strict JSON has no NaN: an interval that could not be computed is empty."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _no_formula(value: Any) -> Any:
    """Text that a spreadsheet would run as a formula, with an apostrophe ahead, as OWASP advises.

    A failure's message and a recipe may hold text of others; numbers stay numbers.
    """
    return f"'{value}" if isinstance(value, str) and value[:1] in _FORMULA else value


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a cell that is run begins with."""


def write_leaderboard(view: SweepView, rows: list[Row]) -> None:
    """Write `report/leaderboard.csv` and `report/leaderboard.json`."""
    flat = flat_rows(view, rows)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=columns(view), lineterminator="\n")
    writer.writerow({name: _no_formula(name) for name in columns(view)})
    writer.writerows({name: _no_formula(value) for name, value in row.items()} for row in flat)
    write_text(view.folder.report / "leaderboard.csv", stream.getvalue())
    document = {"metric": view.metric, "mode": view.mode, "split": "select", "rows": flat}
    text = json.dumps(document, indent=1, ensure_ascii=False)
    write_text(view.folder.report / "leaderboard.json", text + "\n")

"""`raytune-vlm rescore FOLDER`: stored answers scored again, by mended or other rules.

Works from `predictions.parquet` alone; `result.json` stays as it was decided.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.errors import ConfigError, did_you_mean
from raytune_vlm.evaluate.metrics import METRICS
from raytune_vlm.evaluate.scoring import PREDICTIONS_FILE, SCORES_FILE, rescore, stored_metrics
from raytune_vlm.records import Scores, SweepFolder, read_json
from raytune_vlm.sweep.head import experiment_in
from raytune_vlm.sweep.lease import Lease


def rescore_folder(root: Path, metrics: Sequence[str] | None) -> Iterator[str]:
    """Score all evaluations of a sweep folder again; yields a line for each score, old and new.

    Parameters
    ----------
    metrics
        The variants to compute for all evaluations alike; None: those that each one stores.

    Raises
    ------
    ConfigError
        `root` is no sweep folder, a metric is unknown, the deciding one is missing, or a variant
        would take the place of another one of the same metric.
    EvaluationError
        Stored predictions cannot be read. Checked for all before any is replaced.
    """
    folder = SweepFolder(root)
    experiment = experiment_in(folder)
    places = sorted(file.parent for file in root.glob(f"trials/**/{PREDICTIONS_FILE}"))
    best = folder.best / "evaluation"
    places += [best] if (best / PREDICTIONS_FILE).exists() else []
    if not places:
        raise ConfigError(f"{root} has no stored predictions")
    stored = {place: stored_metrics(place) for place in places}
    if metrics is not None:
        _check(metrics, experiment, {name for names in stored.values() for name in names})
    with Lease(folder.lease_file):
        changed = 0
        for place in places:
            lines, differs = _rescored(place, place.relative_to(root), metrics, experiment)
            changed += differs
            yield from lines
    yield f"{len(places)} evaluations scored again, {changed} with other numbers than before"
    if changed and folder.result_file.exists():
        yield (
            f"{folder.result_file} stays as it was decided; `raytune-vlm report {root}` shows the "
            "new scores"
        )


def _check(metrics: Sequence[str], experiment: ExperimentConfig, stored: set[str]) -> None:
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"--metrics: unknown metric {name!r}{did_you_mean(name, METRICS)}")
    if experiment.metric not in metrics:
        raise ConfigError(
            f"--metrics must hold {experiment.metric!r}, by which this sweep is decided"
        )
    for name in metrics:
        kind = name.partition("@")[0]
        others = sorted(s for s in stored - set(metrics) if s.partition("@")[0] == kind)
        if name not in stored and others:
            raise ConfigError(
                f"--metrics: {name!r} would take the place of {others[0]!r}, and scores of "
                "different variants do not compare; name both to have both"
            )


def _rescored(
    place: Path, name: Path, metrics: Sequence[str] | None, experiment: ExperimentConfig
) -> tuple[list[str], bool]:
    """The lines of one evaluation, and whether a score differs from before."""
    file = place / SCORES_FILE
    old = Scores.from_json(read_json(file)).metrics if file.exists() else {}
    evaluation: EvaluationConfig = experiment.evaluation
    new = rescore(
        place,
        metrics=metrics,
        confidence=evaluation.confidence,
        num_bootstrap=evaluation.num_bootstrap,
        seed=experiment.seed,
    )
    lines, differs = [], False
    for metric, estimate in new.metrics.items():
        before = old.get(metric)
        same = before is not None and math.isclose(before.value, estimate.value, abs_tol=1e-12)
        differs = differs or (before is not None and not same)
        shown = "new" if before is None else "as before" if same else f"was {before.value:.4f}"
        reach = f"[{estimate.lower:.4f}, {estimate.upper:.4f}]"
        lines.append(f"{name}: {metric} {estimate.value:.4f} {reach} ({shown})")
    lines += [f"{name}: {metric} left out" for metric in old if metric not in new.metrics]
    return lines, differs

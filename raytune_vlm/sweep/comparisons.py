"""What a decision compares: the scores, paired tests of them, and scores without overlap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from raytune_vlm.evaluate.matrix import read_matrix
from raytune_vlm.evaluate.metrics import METRICS
from raytune_vlm.evaluate.statistics import holm, paired_test
from raytune_vlm.records import BASE_TRIAL, MetricEstimate, PairedTest
from raytune_vlm.sweep.detect import base_scores, detectable
from raytune_vlm.sweep.ledger import TrialState
from raytune_vlm.sweep.runner import Scoring, Session


@dataclass(frozen=True)
class Candidate:
    """A trial at a rung, with its score on `select`."""

    trial: TrialState
    step: int
    value: float


def scored(running: Session) -> list[Candidate]:
    """Every score on `select` of trials that have not failed."""
    metric = running.experiment.metric
    return [
        Candidate(state, step, scores[metric])
        for state in running.states.values()
        if state.ended != "failed"
        for step, scores in sorted(state.scored.items())
    ]


def test_pair(
    running: Session, files: tuple[Path, Path], names: tuple[str, str], metric: str
) -> PairedTest:
    """The paired test of two files of predictions, the first minus the second."""
    experiment = running.experiment
    values, weights, groups, _ = read_matrix(files, metric)
    return paired_test(
        values,
        weights,
        groups,
        metric=metric,
        first=names[0],
        second=names[1],
        confidence=experiment.evaluation.confidence,
        num_bootstrap=experiment.evaluation.num_bootstrap,
        seed=experiment.seed,
        combine=METRICS[metric].combine,
    )


def adjusted(tests: list[PairedTest]) -> list[PairedTest]:
    """Tests that were made together, with the p-values that Holm's rule leaves."""
    values = holm([test.p_value for test in tests])
    return [
        replace(test, adjusted_p=value, num_tests=len(tests))
        for test, value in zip(tests, values, strict=True)
    ]


def against_base(running: Session) -> list[PairedTest]:
    """Every trial against the base model on `select`, after Holm for their number.

    A trial counts with its last score, not its best: which rung is best is chance, too. Trials
    that were only scored on a part of `select` cannot be compared with the base model's score on
    all of it.
    """
    folder, experiment = running.folder, running.experiment
    base = Scoring(None, "select", 0).scores_file(folder).with_name("predictions.parquet")
    if not base.exists():
        return []
    last = {entry.trial.trial_id: entry for entry in scored(running)}
    tests = []
    for trial_id, entry in last.items():
        if experiment.select_share(entry.step) == 1:
            file = folder.trial(trial_id).evaluation("select", entry.step) / "predictions.parquet"
            tests.append(
                test_pair(running, (file, base), (trial_id, BASE_TRIAL), experiment.metric)
            )
    return adjusted(tests)


def detectable_by_split(running: Session) -> dict[str, float]:
    """The smallest difference that each split would likely tell, from the base model's scores."""
    found = {}
    for split in ("select", "report"):
        pilot = base_scores(running.folder, split)
        value = detectable(running.experiment, pilot.num_groups, pilot) if pilot else None
        if value is not None:
            found[split] = value
    return found


def clean_scores(
    running: Session, roles: dict[str, str], winner: Candidate
) -> tuple[dict[str, MetricEstimate], int | None]:
    """Each role's score on the samples of `report` that are like no training sample."""
    found, number = {}, None
    for role, trial_id in roles.items():
        scores = running.folder.trial(trial_id).scores("report")
        if role == "winner":
            scores = [entry for entry in scores if entry.step == winner.step]
        clean = scores[-1].clean
        if clean is not None:
            number = clean.num_samples
            if running.experiment.metric in clean.metrics:
                found[role] = clean.metrics[running.experiment.metric]
    return found, number

"""The guard: a second, fixed suite of benchmarks that shows what tuning made a model forget.

Its data is checked before a sweep starts and prepared before its executors do; base, default and
winner are scored on it once, beside `report`. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.evaluate.benchmarks import find_benchmark
from raytune_vlm.evaluate.matrix import read_matrix
from raytune_vlm.evaluate.metrics import METRICS
from raytune_vlm.evaluate.statistics import paired_test
from raytune_vlm.monitor import Monitor
from raytune_vlm.records import GuardScore, PairedTest, Scores, read_json
from raytune_vlm.sweep import runner
from raytune_vlm.sweep.benchmarks import Suite, prepare_suite, score_benchmarks, suite_of

BASE = "base"
"""The role that the others are compared with."""


def guard_suite(experiment: ExperimentConfig) -> Suite | None:
    """The benchmarks of `evaluation.guard`; None where there are none.

    Raises
    ------
    ConfigError, DataError
        One of them, or its data, is not there.
    """
    evaluation = experiment.evaluation
    if not evaluation.guard:
        return None
    chosen = [find_benchmark(name) for name in evaluation.guard]
    return suite_of(experiment, chosen, data=evaluation.guard_data, limit=evaluation.guard_samples)


def prepare_guard(experiment: ExperimentConfig, monitor: Monitor) -> None:
    """Prepare the guard's data, so that it is there when the executors hold every CPU."""
    suite = guard_suite(experiment)
    if suite is not None:
        prepare_suite(suite, monitor)


def score_guard(
    running: runner.Session, scorings: Mapping[str, runner.Scoring]
) -> list[GuardScore]:
    """Score the roles on the guard; empty where there is none.

    Parameters
    ----------
    scorings
        Role (`base`, `default`, `winner`) -> what of it was scored on `report`.

    Returns
    -------
    A row for each benchmark, metric and role, with the paired difference to the base model.

    Raises
    ------
    EvaluationError
        If one could not be scored.
    """
    suite = guard_suite(running.experiment)
    if suite is None:
        return []
    prepared, _ = prepare_suite(suite, running.monitor)
    running.monitor.say(f"guard: scoring {', '.join(scorings)} on {len(prepared)} benchmarks")
    found: list[GuardScore] = []
    for benchmark in prepared:
        asked = {
            role: replace(scoring, split=benchmark.name, benchmark=benchmark)
            for role, scoring in scorings.items()
        }
        files = {role: scoring.scores_file(running.folder) for role, scoring in asked.items()}
        # Two roles may be one trial at one step.
        score_benchmarks(running, list({files[role]: asked[role] for role in asked}.values()))
        scores = {role: Scores.from_json(read_json(file)) for role, file in files.items()}
        for role, entry in scores.items():
            for metric, estimate in entry.metrics.items():
                is_other = files[role] != files[BASE] and metric in scores[BASE].metrics
                found.append(
                    GuardScore(
                        benchmark=benchmark.name,
                        metric=metric,
                        role=role,
                        trial_id=entry.trial_id,
                        estimate=estimate,
                        num_samples=entry.num_samples,
                        left_out=benchmark.facts["quarantined"] + benchmark.facts["over_long"],
                        against_base=_against_base(running, asked, role, metric)
                        if is_other
                        else None,
                    )
                )
    return found


def _against_base(
    running: runner.Session, asked: Mapping[str, runner.Scoring], role: str, metric: str
) -> PairedTest:
    files = [
        asked[name].scores_file(running.folder).with_name("predictions.parquet")
        for name in (role, BASE)
    ]
    values, weights, groups, _ = read_matrix(files, metric)
    evaluation = running.experiment.evaluation
    return paired_test(
        values,
        weights,
        groups,
        metric=metric,
        first=role,
        second=BASE,
        confidence=evaluation.confidence,
        num_bootstrap=evaluation.num_bootstrap,
        seed=running.experiment.seed,
        combine=METRICS[metric].combine,
    )

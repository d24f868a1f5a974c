"""What is said beforehand of the differences that a sweep can tell."""

from __future__ import annotations

import pytest
from made import experiment

from raytune_vlm.config.evaluation import METRIC_MODES, NO_SHARES
from raytune_vlm.evaluate.metrics import METRICS
from raytune_vlm.prepare.sizes import note_sizes, noted_sizes
from raytune_vlm.records import (
    BASE_TRIAL,
    MetricEstimate,
    Scores,
    SplitStatistics,
    SweepFolder,
    write_json,
)
from raytune_vlm.sweep.detect import detectable, detectable_lines, pilot_scores

PILOT = Scores(
    "base", 0, "select", 100, 100, {"cer@micro": MetricEstimate(1.2, 1, 2, 0.1)}, 0, 0, 0
)


def test_metrics_that_are_no_shares_are_known():
    assert set(METRIC_MODES) >= NO_SHARES
    assert {name for name, metric in METRICS.items() if metric.combine} <= NO_SHARES


def test_lines_name_the_splits_and_where_the_variance_is_from():
    config = experiment(
        data={"sources": [{"type": "messages", "path": "x"}], "max_report_samples": 50}
    )
    lines = detectable_lines(
        config, {"train": (900, 900), "select": (100, 80), "report": (400, 400)}
    )
    assert lines[0].startswith(
        "select (100 samples in at most 80 groups): differences in exact_match"
    )
    assert "the largest variance there is" in lines[0]
    assert lines[1].startswith("report (50 samples in at most 50 groups)")
    assert detectable_lines(config, {}) == []
    errors = experiment(evaluation={"metrics": ["cer@micro"]})
    assert "known when the base model is scored" in detectable_lines(errors, {"select": (9, 9)})[0]
    assert detectable(errors, 100, PILOT) == pytest.approx(2.8016 * 2**0.5 * 0.1, abs=1e-4)


def test_a_sweep_to_start_from_is_a_pilot_on_the_first_start(tmp_path):
    earlier = SweepFolder(tmp_path / "earlier")
    write_json(earlier.trial(BASE_TRIAL).evaluation("select", 0) / "scores.json", PILOT)
    errors = experiment(
        evaluation={"metrics": ["cer@micro"]}, sweep={"warm_start": [str(earlier.root)]}
    )
    new = SweepFolder(tmp_path / "new")
    pilot = pilot_scores(errors, new)
    assert pilot == PILOT
    (line,) = detectable_lines(errors, {"select": (100, 100)}, pilot)
    assert "cer@micro from 0.396 are told" in line and "from the base model's scores" in line
    own = Scores("base", 0, "select", 9, 9, {"cer@micro": MetricEstimate(1, 1, 1, 0.2)}, 0, 0, 0)
    write_json(new.trial(BASE_TRIAL).evaluation("select", 0) / "scores.json", own)
    assert pilot_scores(errors, new) == own
    plain = experiment(sweep={"warm_start": [str(earlier.root)]})
    assert plain.metric not in PILOT.metrics and pilot_scores(plain, SweepFolder("x")) is None
    across = {"warm_start": [str(earlier.root)], "warm_start_across_data": True}
    assert pilot_scores(errors.model_copy(update={"sweep": experiment(sweep=across).sweep}), new)
    assert pilot_scores(experiment(sweep=across), SweepFolder("x")) is None


def test_sizes_of_the_last_preparation_are_found_again(tmp_path):
    config = experiment(storage_path=str(tmp_path))
    assert noted_sizes(config) == {}
    note_sizes(config, {"select": SplitStatistics(9, 8, 1, 0, 7, 8, 30, 20.0, 0.0)})
    assert noted_sizes(config) == {"select": (8, 7)}
    assert noted_sizes(config.model_copy(update={"seed": 3})) == {}

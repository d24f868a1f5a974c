"""Coverage, size, bias and power, by simulation from known truths; the script prints more of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def simulation() -> Any:
    file = Path(__file__).parents[1] / "benchmarks" / "statistics_simulation.py"
    spec = importlib.util.spec_from_file_location("statistics_simulation", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.OPTIONS["num_bootstrap"] = 200
    return module


@pytest.mark.parametrize(
    ("kind", "num_groups", "p", "icc"),
    [
        ("single", 40, 0.02, 0.0),
        ("single", 100, 0.97, 0.0),
        ("single", 100, 0.5, 0.0),
        ("equal (5)", 60, 0.95, 0.3),
        ("unequal (1 to 20)", 60, 0.03, 0.3),
        ("unequal (1 to 20)", 100, 0.5, 0.3),
    ],
)
def test_intervals_hold_the_truth(
    simulation: Any, kind: str, num_groups: int, p: float, icc: float
) -> None:
    held, width = simulation.coverage(kind, num_groups, p, icc, 200)
    assert held >= 0.9 and width < 0.4


def test_intervals_of_graded_scores_hold_the_truth(simulation: Any) -> None:
    assert simulation.graded_coverage(100, 0.9, 200) >= 0.9


def test_tests_of_equal_systems_keep_their_level(simulation: Any) -> None:
    for rate in simulation.paired_sizes(60, 0.5, 250).values():
        assert rate <= 0.09


def test_holm_keeps_the_family_at_its_level(simulation: Any) -> None:
    plain, adjusted = simulation.family_errors(16, 100, 200)
    assert plain > 0.15
    assert adjusted <= 0.08


def test_the_winner_of_64_trials_on_100_documents_loses_its_flattery(simulation: Any) -> None:
    naive, corrected, held, lost = simulation.winner_bias(64, 100, 0.02, 30)
    assert naive > 0.04
    assert abs(corrected) < naive / 3
    assert held >= 0.9 and lost <= 0.1


def test_the_detectable_difference_is_detected(simulation: Any) -> None:
    difference, tested, apart = simulation.power(100, 0.3, 150)
    assert 0.15 < difference < 0.25
    assert 0.65 <= tested <= apart <= 0.9

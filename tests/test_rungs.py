"""Rungs on a part of `select`, what may win, and touches of `report`."""

from __future__ import annotations

import itertools
import re

import pytest
from made import experiment
from pydantic import ValidationError

from raytune_vlm.evaluate.subset import within_share
from raytune_vlm.records import Replicate, SweepFolder, SweepResult
from raytune_vlm.sweep.ledger import Ledger, replay

IDS = [f"{number:04x}" for number in range(2000)]


def made(**evaluation):
    asha = {"type": "asha", "grace_period": 10, "reduction_factor": 2}
    return experiment(
        train={"max_steps": 40},
        evaluation=evaluation,
        sweep={"scheduler": asha, "num_trials": 4, "search_space": made.space},
    )


made.space = {}


def test_parts_are_nested_and_stay_when_samples_are_added():
    parts = [within_share(IDS, share, seed=1) for share in (0.1, 0.25, 0.5, 1.0)]
    for smaller, larger in itertools.pairwise(parts):
        assert set(smaller) < set(larger)
    assert [len(part) / 2000 for part in parts] == pytest.approx([0.1, 0.25, 0.5, 1], abs=0.03)
    more = within_share([*IDS[:500], *(f"new {n}" for n in range(99)), *IDS[500:]], 0.25, seed=1)
    kept = [place if place < 500 else place - 99 for place in more if not 500 <= place < 599]
    assert kept == parts[1]
    assert within_share(IDS, 0.25, seed=2) != parts[1]


def test_each_rung_has_its_share_and_the_last_has_all():
    assert made().select_share(10) == 1
    single = made(rung_samples=0.25)
    assert [single.select_share(step) for step in (0, 10, 20, 40)] == [1, 0.25, 0.25, 1]
    each = made(rung_samples=[0.2, 0.5])
    assert [each.select_share(step) for step in (0, 10, 20, 40)] == [1, 0.2, 0.5, 1]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.5, 0.2], "none smaller than the one before"),
        ([0.0, 0.5], "shares above 0"),
        (1.5, "at most 1"),
        ([0.5], "a share for each rung before the last (2: steps 10, 20)"),
    ],
)
def test_shares_that_do_not_fit_are_refused(shares, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        made(rung_samples=shares)


def test_a_setting_without_effect_or_without_comparison_is_refused():
    with pytest.raises(ValidationError, match=r"rung_samples=0\.5 has no effect: the only rung"):
        experiment(sweep={"scheduler": {"type": "fifo"}}, evaluation={"rung_samples": 0.5})
    made.space = {"train.max_steps": {"type": "choice", "values": [40, 80]}}
    try:
        with pytest.raises(ValidationError, match=r"search_space\.train\.max_steps exclude"):
            made(rung_samples=0.5)
    finally:
        made.space = {}
    with pytest.raises(ValidationError, match="replicate_top=2 has no effect"):
        experiment(sweep={"replicate_top": 2})


def test_touches_are_counted_over_the_life_of_a_folder(tmp_path):
    folder = SweepFolder(tmp_path)
    assert folder.report_touches() == []
    for trial_id in ("base", "t0001", "t0001"):
        Ledger(folder.ledger_file).append("touched", trial_id=trial_id, step=40)
    assert [row["trial_id"] for row in folder.report_touches()] == ["base", "t0001", "t0001"]
    assert replay(folder.ledger_file) == {}


def test_the_best_by_the_mean_over_seeds_may_be_another():
    def result(mode, replicates, replicated):
        return SweepResult(
            "m", mode, "t1", 40, None, 0.8, None, {}, [], [], 0, 1.0, replicates, replicated
        )

    runs = [
        Replicate(1, 0.7, None, "t1"),
        Replicate(2, None, "x", "t1"),
        Replicate(1, 0.75, None, "t2"),
    ]
    found = result("max", runs, {"t1": 0.8, "t2": 0.79})
    assert [(s.trial_id, s.mean, s.spread, s.num_failed) for s in found.seeds()] == [
        ("t1", 0.7, None, 1),
        ("t2", 0.75, None, 0),
    ]
    assert found.best_by_seeds() == "t2"
    assert result("min", runs, {"t1": 0.8, "t2": 0.79}).best_by_seeds() == "t1"
    old = result("max", [Replicate(1, 0.7), Replicate(2, 0.8)], {})
    assert old.seeds()[0].mean == pytest.approx(0.75) and old.best_by_seeds() is None

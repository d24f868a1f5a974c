"""The decision from stored scores alone: what may win, what it is compared with, touches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made import experiment

from raytune_vlm.evaluate.scoring import Prediction, score, write_evaluation
from raytune_vlm.evaluate.subset import within_share
from raytune_vlm.records import SweepFolder, TrialRecord, write_json
from raytune_vlm.sweep import comparisons, decide
from raytune_vlm.sweep.ledger import Ledger, TrialState

IDS = [f"{number:04x}" for number in range(80)]
RIGHT = {"base": 0.2, "t0000": 0.5, "t0001": 0.9, "t0002": 0.95}
"""How often each is right."""


@pytest.fixture
def running(tmp_path: Any) -> Any:
    """A sweep that has only to be decided: t0002 was stopped at the first rung."""
    config = experiment(
        train={"max_steps": 40},
        evaluation={"rung_samples": 0.25, "num_bootstrap": 200},
        sweep={"num_trials": 3, "scheduler": {"type": "asha", "grace_period": 20}},
    )
    folder = SweepFolder(tmp_path)
    states = {}

    def scored(trial_id: str, split: str, step: int) -> float:
        share = config.select_share(step) if split == "select" else 1.0
        generator = np.random.default_rng([len(split), *trial_id.encode(), step])
        answers = []
        for place in within_share(IDS, share, config.seed):
            text = "tea" if generator.random() < RIGHT[trial_id] else "bun"
            answers.append(Prediction(IDS[place], IDS[place], "q", "tea", text, 1, False))
        options: Any = {"confidence": 0.95, "num_bootstrap": 200, "seed": 0, "seconds": 1.0}
        names = config.evaluation.metrics
        options |= {"metrics": names, "answer": "text", "overlapping": IDS[:5]}
        scores, table = score(answers, trial_id=trial_id, step=step, split=split, **options)
        write_evaluation(folder.trial(trial_id).evaluation(split, step), scores, table)
        return scores.metrics[names[0]].value

    scored("base", "select", 0)
    for number, trial_id in enumerate(("t0000", "t0001", "t0002")):
        steps = (20,) if trial_id == "t0002" else (20, 40)
        values = {step: {config.metric: scored(trial_id, "select", step)} for step in steps}
        ended: Any = "finished" if 40 in steps else "stopped"
        states[trial_id] = TrialState(trial_id, number, {}, values, ended)
        record = TrialRecord(trial_id, number, {}, ended, trainable_parameters=10 + number)
        write_json(folder.trial(trial_id).record_file, record)
    for trial_id in ("base", "t0000", "t0001"):
        scored(trial_id, "report", 0 if trial_id == "base" else 40)
    said: list[str] = []
    monitor = SimpleNamespace(say=said.append, said=said)
    ledger = Ledger(folder.ledger_file)
    return SimpleNamespace(
        experiment=config, folder=folder, states=states, monitor=monitor, ledger=ledger
    )


def winner_of(running: Any) -> tuple[list[Any], Any]:
    candidates = decide._candidates(running)
    return candidates, decide._best(candidates, "max", running.folder)


def test_only_who_was_scored_on_all_of_select_can_win(running: Any) -> None:
    candidates, winner = winner_of(running)
    assert {(entry.trial.trial_id, entry.step) for entry in candidates} == {
        ("t0000", 40),
        ("t0001", 40),
    }
    assert winner.trial.trial_id == "t0001"
    found = decide._selection(running, candidates, winner)
    assert found["corrected"].value == pytest.approx(winner.value, abs=0.01)
    assert found["indistinguishable"] == ["t0001"]
    tops = decide._tops(decide._teams(running, candidates), "max", running.folder)
    assert [entry.trial.trial_id for entry in tops] == ["t0001", "t0000"]
    for state in running.states.values():
        state.scored.pop(40, None)
    assert {entry.step for entry in decide._candidates(running)} == {20}
    assert "on a share of 0.25" in running.monitor.said[-1]


def test_every_trial_on_all_of_select_meets_the_base_and_pays_for_the_others(running: Any) -> None:
    tests = comparisons.against_base(running)
    assert [(test.first, test.second, test.num_tests) for test in tests] == [
        ("t0000", "base", 2),
        ("t0001", "base", 2),
    ]
    for test in tests:
        assert test.adjusted_p is not None and test.p_value <= test.adjusted_p
        assert test.mcnemar_p is not None


def test_report_is_touched_once_a_role_and_told_without_overlap(running: Any) -> None:
    candidates, winner = winner_of(running)
    roles, paired, guard = decide._report(running, decide._teams(running, candidates), winner)
    assert guard == []
    assert roles == {"base": "base", "default": "t0000", "winner": "t0001"}
    assert len(running.folder.report_touches()) == 3
    assert [test.num_tests for test in paired] == [2, 2]
    decide._report(running, decide._teams(running, candidates), winner)
    assert len(running.folder.report_touches()) == 3
    clean, number = comparisons.clean_scores(running, roles, winner)
    assert number == 75 and clean.keys() == roles.keys()
    found = comparisons.detectable_by_split(running)
    assert found.keys() == {"select", "report"} and 0.1 < found["report"] < 0.3


def test_with_several_seeds_the_recipe_with_the_best_mean_wins_by_its_best_trial(
    running: Any,
) -> None:
    """t0001 is the luckiest trial, but the other seed of its recipe is the worst."""
    metric = running.experiment.metric
    values = {"t0000": 0.7, "t0001": 0.9, "t0002": 0.1, "t0003": 0.6}
    firsts = {"t0002": "t0001", "t0003": "t0000"}
    for number, (trial_id, value) in enumerate(values.items()):
        state = TrialState(trial_id, number, {}, {40: {metric: value}}, "finished")
        state.replicates = firsts.get(trial_id)
        running.states[trial_id] = state
        record = TrialRecord(trial_id, number, {}, "finished", trainable_parameters=10)
        write_json(running.folder.trial(trial_id).record_file, record)
    found = decide._candidates(running)
    teams = decide._teams(running, found)
    assert [[entry.trial.trial_id for entry in team] for team in teams] == [
        ["t0000", "t0003"],
        ["t0001", "t0002"],
    ]
    tops = decide._tops(teams, "max", running.folder)
    assert [entry.trial.trial_id for entry in tops] == ["t0000", "t0001"]

    running.states["t0003"].scored.clear()
    running.states["t0003"].message = "diverged: loss is nan"
    running.states["t0003"].ended = "failed"
    left = [team[0].trial.trial_id for team in decide._teams(running, decide._candidates(running))]
    assert left == ["t0001"], "a recipe that diverges with one of its seeds does not win by another"
    running.states["t0003"].message = "infrastructure: its node is gone"
    left = [team[0].trial.trial_id for team in decide._teams(running, decide._candidates(running))]
    assert left == ["t0000", "t0001"]

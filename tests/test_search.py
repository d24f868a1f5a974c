"""Searcher and scheduler: seeded, rebuilt from the ledger, stopped trials told PRUNED."""

from __future__ import annotations

import optuna
import pytest
from made import experiment
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from raytune_vlm.config.distributions import (
    Choice,
    Grid,
    LogUniform,
    QUniform,
    RandInt,
    Uniform,
)
from raytune_vlm.sweep.ledger import Ledger, TrialState, replay
from raytune_vlm.sweep.samplers import optuna_distribution
from raytune_vlm.sweep.search import build_scheduler
from raytune_vlm.sweep.searcher import OptunaSearcher

SPACE = {
    "lora.rank": {"type": "choice", "values": [1, 4, 16]},
    "train.learning_rate": {"type": "loguniform", "lower": 1e-4, "upper": 1e-1},
}


def setup(tmp_path, trials=None, **sweep):
    config = experiment(
        sweep={"num_trials": 9, "search_space": SPACE, **sweep}, train={"max_steps": 90}
    )
    ledger = Ledger(tmp_path / "ledger.jsonl")
    study = tmp_path / "study.db"
    known = trials if trials is not None else {}
    return config, OptunaSearcher(config, ledger, known, study, None), known, ledger


def score_of(recipe):
    """A made-up landscape with its best at rank 4 and learning rate 1e-2."""
    import math

    return 1 - abs(math.log10(recipe["train.learning_rate"]) + 2) / 3 - (recipe["lora.rank"] != 4)


def live(searcher, states, ledger, number):
    """One whole trial: proposed, scored at its two rungs, finished, or stopped if it is bad."""
    config = searcher.suggest(f"tune-{number}")
    state = states[config["trial_id"]]
    value = score_of(config["recipe"])
    steps = (30, 90) if value > 0.2 else (30,)
    for step in steps:
        scores = {"exact_match@strip": value * step / 90}
        state.scored[step] = scores
        ledger.append("scored", trial_id=state.trial_id, step=step, scores=scores)
    state.ended = "finished" if len(steps) == 2 else "stopped"
    ledger.append(state.ended, trial_id=state.trial_id, step=steps[-1], message=None)
    searcher.tell(state)
    return config["recipe"]


def test_the_first_trial_is_the_experiment_s_own_recipe(tmp_path):
    _, searcher, states, _ = setup(tmp_path)
    assert searcher.suggest("x")["recipe"] == {"lora.rank": 16, "train.learning_rate": 1e-3}
    assert list(states) == ["t0000"]
    second = tmp_path / "second"
    second.mkdir()
    _, plain, _, _ = setup(second, include_default=False)
    assert plain.suggest("x")["recipe"] != {"lora.rank": 16, "train.learning_rate": 1e-3}


def test_the_same_seed_proposes_the_same_and_ends_with_finished(tmp_path):
    runs = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        _, searcher, states, ledger = setup(folder)
        runs.append([live(searcher, states, ledger, number) for number in range(9)])
        assert searcher.suggest("more") == "FINISHED"
    assert runs[0] == runs[1]
    assert len({str(recipe) for recipe in runs[0]}) == 9


@pytest.mark.parametrize("killed_after", [1, 4, 7])
def test_a_searcher_rebuilt_from_the_ledger_proposes_what_it_would_have(tmp_path, killed_after):
    whole = tmp_path / "whole"
    whole.mkdir()
    _, searcher, states, ledger = setup(whole)
    expected = [live(searcher, states, ledger, number) for number in range(9)]

    broken = tmp_path / "broken"
    broken.mkdir()
    _, first, states, ledger = setup(broken)
    for number in range(killed_after):
        live(first, states, ledger, number)
    interrupted = first.suggest("killed here")
    known = replay(broken / "ledger.jsonl")
    _, second, states, ledger = setup(broken, trials=known)
    again = second.suggest("again")
    assert (again["trial_id"], again["recipe"]) == (
        interrupted["trial_id"],
        interrupted["recipe"],
    )
    known.pop(again["trial_id"])

    known = replay(broken / "ledger.jsonl")
    _, third, states, ledger = setup(broken, trials=known)
    rest = [live(third, states, ledger, number) for number in range(killed_after, 9)]
    assert rest == expected[killed_after:]


def test_optuna_is_told_finished_stopped_and_failed_trials_rightly(tmp_path):
    config, searcher, states, ledger = setup(tmp_path)
    for number in range(8):
        live(searcher, states, ledger, number)
    failed = states[searcher.suggest("last")["trial_id"]]
    failed.ended, failed.message = "failed", "diverged: nan"
    searcher.tell(failed)
    study = optuna.load_study(study_name=config.name, storage=f"sqlite:///{tmp_path / 'study.db'}")
    for trial, state in zip(study.trials, states.values(), strict=True):
        assert trial.params == state.recipe
        assert trial.intermediate_values == {
            step: scores["exact_match@strip"] for step, scores in state.scored.items()
        }
        finished = state.ended == "finished"
        assert trial.state.name == ("COMPLETE" if finished else "PRUNED")


def test_a_grid_is_walked_whole(tmp_path):
    space = {
        "lora.rank": {"type": "grid", "values": [1, 2]},
        "lora.scope": {"type": "choice", "values": ["text", "text+vision"]},
    }
    _, searcher, *_ = setup(
        tmp_path,
        search_space=space,
        searcher={"type": "grid"},
        num_trials=4,
        include_default=False,
    )
    drawn = {tuple(searcher.suggest(str(n))["recipe"].values()) for n in range(4)}
    assert drawn == {(1, "text"), (1, "text+vision"), (2, "text"), (2, "text+vision")}


def test_distributions_are_optuna_s_with_ray_s_meaning():
    assert optuna_distribution(Choice(type="choice", values=(1, 2))).choices == (1, 2)
    assert optuna_distribution(Grid(type="grid", values=("a",))).choices == ("a",)
    integer = optuna_distribution(RandInt(type="randint", lower=1, upper=5))
    assert (integer.low, integer.high) == (1, 4)
    assert optuna_distribution(LogUniform(type="loguniform", lower=0.1, upper=1)).log
    assert not optuna_distribution(Uniform(type="uniform", lower=0.1, upper=1)).log
    assert optuna_distribution(QUniform(type="quniform", lower=0, upper=1, q=0.25)).step == 0.25


class Trial:
    def __init__(self, trial_id):
        self.trial_id = trial_id
        self.config = {"trial_id": trial_id}


@pytest.mark.parametrize("metric", ["exact_match@strip", "cer@micro"])
def test_a_rebuilt_asha_stops_and_keeps_as_the_first_one_would(metric):
    sign = 1 if metric == "exact_match@strip" else -1
    config = experiment(
        evaluation={"metrics": [metric]},
        train={"max_steps": 90},
        sweep={"scheduler": {"type": "asha", "grace_period": 10, "reduction_factor": 3}},
    )
    states = {}
    for number, value in enumerate([0.9, 0.5, 0.4, 0.8]):
        states[f"t{number}"] = TrialState(
            f"t{number}", number, {}, {10: {metric: sign * value}}, "stopped"
        )
    scheduler = build_scheduler(config, states)
    assert isinstance(scheduler, AsyncHyperBandScheduler)
    decisions = []
    for trial_id, value in (("good", 0.95), ("bad", 0.3)):
        trial = Trial(trial_id)
        scheduler.on_trial_add(None, trial)
        result = {"step": 10, metric: sign * value}
        decisions.append(scheduler.on_trial_result(None, trial, result))
    assert decisions == [TrialScheduler.CONTINUE, TrialScheduler.STOP]


def test_a_rebuilt_median_rule_decides_as_the_first_one_would():
    metric = "exact_match@strip"
    config = experiment(
        train={"max_steps": 40},
        evaluation={"metrics": [metric], "every": 10},
        sweep={"scheduler": {"type": "median", "grace_period": 20}, "search_space": SPACE},
    )
    states = {
        f"t{number}": TrialState(
            f"t{number}", number, {}, {step: {metric: value} for step in (10, 20, 30)}
        )
        for number, value in enumerate([0.9, 0.8, 0.7])
    }
    states["t3"] = TrialState("t3", 3, {}, {10: {metric: 0.85}, 20: {metric: 0.1}})
    whole = build_scheduler(config, {})
    trials = {name: Trial(name) for name in states}
    for name, state in states.items():
        whole.on_trial_add(None, trials[name])
        for step, scores in state.scored.items():
            assert whole.on_trial_result(None, trials[name], {"step": step, **scores}) == "CONTINUE"
        whole.on_trial_complete(None, trials[name], {"failed": "error"})
    rebuilt = build_scheduler(config, states)
    again = Trial("t3")
    rebuilt.on_trial_add(None, again)
    # Its best score of all, before the resume, is what the rule looks at.
    low = {"step": 30, metric: 0.1}
    assert whole.on_trial_result(None, trials["t3"], low) == TrialScheduler.CONTINUE
    assert rebuilt.on_trial_result(None, again, low) == TrialScheduler.CONTINUE
    for scheduler in (whole, rebuilt):
        bad = Trial("bad")
        scheduler.on_trial_add(None, bad)
        result = {"step": 20, metric: 0.2}
        assert scheduler.on_trial_result(None, bad, result) == TrialScheduler.STOP


def test_paused_trials_count_as_pruned_for_the_sampler_and_stay_open_in_the_study(tmp_path):
    scheduler = {"type": "halving", "grace_period": 30}
    runs = []
    for name, value in (("low", 0.1), ("high", 0.9)):
        folder = tmp_path / name
        folder.mkdir()
        config, searcher, states, _ = setup(
            folder, scheduler=scheduler, searcher={"type": "tpe", "num_startup_trials": 2}
        )
        for number in range(4):
            state = states[searcher.suggest(f"tune-{number}")["trial_id"]]
            better = number == 1
            state.scored[30] = {"exact_match@strip": value if better else 1 - value}
        runs.append([state.recipe for state in states.values()])
        url = f"sqlite:///{folder / 'study.db'}"
        study = optuna.load_study(study_name=config.name, storage=url)
        assert study.trials == []  # they are open, and the file shows those that have ended
        for state in states.values():
            state.scored[config.train.max_steps] = {"exact_match@strip": 0.5}
            state.ended = "finished"
            searcher.tell(state)
        study = optuna.load_study(study_name=config.name, storage=url)
        assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 4
        assert [trial.params for trial in study.trials] == runs[-1]
    assert runs[0][:2] == runs[1][:2] and runs[0][2:] != runs[1][2:]


def test_rungs_are_where_asha_decides_and_at_the_end():
    config = experiment(
        train={"max_steps": 100},
        sweep={"scheduler": {"type": "asha", "grace_period": 7, "reduction_factor": 2.5}},
        evaluation={"metrics": ["cer@micro"], "every": 40},
    )
    assert config.rungs == (7, 18, 40, 44, 80, 100)

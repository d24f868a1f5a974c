"""Samplers, conditions, first points, constraints: proposed alike, live and after any kill."""

from __future__ import annotations

import importlib.util
import json
import math
import sqlite3

import optuna
import pytest
from made import experiment
from pydantic import ValidationError

from raytune_vlm.config.distributions import branches, combinations
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.config.search_space import own_recipe, search_space_problems
from raytune_vlm.errors import ConfigError, LeaseError
from raytune_vlm.sweep.ledger import Ledger, replay
from raytune_vlm.sweep.samplers import SAMPLERS, sampler, suggest
from raytune_vlm.sweep.searcher import OptunaSearcher
from raytune_vlm.train.packages import OF_SEARCHERS, check_searcher

METRIC = "exact_match@strip"
NUMBERS = {
    "train.learning_rate": {"type": "loguniform", "lower": 1e-4, "upper": 1e-1},
    "lora.dropout": {"type": "uniform", "lower": 0, "upper": 0.5},
    "lora.rank": {"type": "randint", "lower": 1, "upper": 17},
}
CHOICES = {
    "lora.rank": {"type": "choice", "values": [1, 4, 16]},
    "lora.scope": {"type": "choice", "values": ["text", "text+vision"]},
    "lora.dropout": {"type": "choice", "values": [0.0, 0.1]},
}
CONDITIONAL = {
    "lora.rank_by_scope.vision": {
        "type": "randint",
        "lower": 1,
        "upper": 9,
        "when": {"lora.scope": "text+vision"},
    },
    "lora.scope": {"type": "choice", "values": ["text", "text+vision"]},
    "train.learning_rate": {"type": "loguniform", "lower": 1e-4, "upper": 1e-1},
}
LEARNERS = {
    "tpe": {"num_startup_trials": 3},
    "gp": {"num_startup_trials": 3},
    "cmaes": {"population_size": 4},
    "nsga2": {"population_size": 3},
}
STOPPED = optuna.trial.TrialState.PRUNED
OBJECTIVES = [{"metric": METRIC}, {"metric": "train_seconds"}]


def installed(kind):
    return kind not in OF_SEARCHERS or importlib.util.find_spec(OF_SEARCHERS[kind])


@pytest.fixture(params=sorted(SAMPLERS))
def kind(request):
    if not installed(request.param):
        pytest.skip(f"needs {OF_SEARCHERS[request.param]}")
    return request.param


class Sweep:
    """A sweep without training: proposals, made-up scores, and a ledger that can be replayed."""

    def __init__(self, folder, config, **options):
        folder.mkdir(exist_ok=True)
        self.config, file = config, folder / "ledger.jsonl"
        self.states = replay(file)
        self.ledger = Ledger(file)
        self.said = []
        self.searcher = OptunaSearcher(
            config, self.ledger, self.states, folder / "study.db", None, say=self.said.append,
            **options,
        )  # fmt: skip
        self.running = []

    def start(self):
        config = self.searcher.suggest(f"tune-{len(self.states)}-{len(self.running)}")
        if config == "FINISHED":
            return None
        state = self.states[config["trial_id"]]
        self.running.append(state)
        return state.trial_id, state.recipe

    def end(self):
        """The trial that has run longest is scored, and finished, stopped or failed."""
        state = self.running.pop(0)
        value = 1 - abs(math.log10(state.recipe.get("train.learning_rate", 1e-3)) + 2) / 3
        value += state.recipe["lora.rank"] / 100 if "lora.rank" in state.recipe else 0
        steps = () if state.number % 5 == 4 else (30,) if state.number % 3 == 2 else (30, 90)
        for step in steps:
            scores, costs = {METRIC: value * step / 90}, {"train_seconds": step * (2 - value)}
            if step not in state.scored:
                state.scored[step], state.costs[step] = scores, costs
                self.ledger.append(
                    "scored", trial_id=state.trial_id, step=step, scores=scores, costs=costs
                )
        state.ended = {0: "failed", 1: "stopped", 2: "finished"}[len(steps)]
        state.message = "diverged: loss is nan" if state.ended == "failed" else None
        self.ledger.append(
            state.ended, trial_id=state.trial_id, step=max(steps, default=0), message=state.message
        )
        self.searcher.tell(state)

    def run(self, at_once=2, most=None):
        """Proposals until the end, or until so many trials have ended."""
        seen, ended = [], 0
        while True:
            while len(self.running) < at_once and (entry := self.start()):
                seen.append(entry)
            if not self.running or ended == most:
                return seen
            self.end()
            ended += 1


def sampled(kind, **sweep):
    space = CHOICES if kind == "grid" else NUMBERS
    plain = {
        "num_trials": 13 if kind == "grid" else 12,
        "search_space": space,
        "searcher": {"type": kind, **LEARNERS.get(kind, {})},
        **sweep,
    }
    return experiment(sweep=plain, train={"max_steps": 90})


def test_a_sweep_killed_anywhere_proposes_what_the_whole_one_did(kind, tmp_path):
    """Each life of the sweep ends, with two trials running, some ended trials after the last."""
    config = sampled(kind)
    whole = Sweep(tmp_path / "whole", config).run()
    assert len(whole) == config.sweep.num_trials == len(set(map(str, whole)))
    broken: list = []
    for most in (1, 3, 2, 4, None):
        life = Sweep(tmp_path / "broken", config)
        broken += life.run(most=most)
        assert life.said == []
    assert dict(broken) == dict(whole)
    assert Sweep(tmp_path / "broken", config).searcher.is_done


def test_paused_trials_teach_as_much_as_after_a_resume(tmp_path):
    """Trials wait at two rungs, some end: what a sampler was shown of them before is not kept."""
    halving = {"type": "halving", "grace_period": 10, "reduction_factor": 3}
    config = sampled("tpe", scheduler=halving)
    assert config.rungs == (10, 30, 90)
    assert played(tmp_path / "whole", config, 1) == played(tmp_path / "resumed", config, 9)


def played(folder, config, num_lives):
    """The proposals of nine trials in so many lives of a sweep."""
    for number in range(9):
        if number < num_lives:
            life = Sweep(folder, config)
            while life.searcher.has_waiting:
                life.start()
        life.start()
        for back, step in ((0, 10), (2, 30)):
            state = life.states.get(f"t{number - back:04d}")
            if state is not None and state.ended is None:
                scores = {METRIC: math.log10(state.recipe["train.learning_rate"]) * (3 - back)}
                state.scored[step] = scores
                life.ledger.append("scored", trial_id=state.trial_id, step=step, scores=scores)
        if number % 4 == 3:
            life.states[f"t{number - 2:04d}"].ended = "stopped"
            life.ledger.append("stopped", trial_id=f"t{number - 2:04d}", step=10)
            life.searcher.tell(life.states[f"t{number - 2:04d}"])
    return [state.recipe for state in life.states.values()]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_tpe_proposes_what_optuna_s_own_would(direction):
    sweep = experiment(
        sweep={
            "searcher": {"type": "tpe", "num_startup_trials": 4},
            "search_space": {**NUMBERS, "lora.scope": CHOICES["lora.scope"]},
        }
    ).sweep
    ours, theirs = (optuna.create_study(direction=direction) for _ in range(2))
    for number in range(40):
        ours.sampler = sampler(sweep, 7, number)
        theirs.sampler = optuna.samplers.TPESampler(
            seed=7 * 100_003 + number, n_startup_trials=4, multivariate=True, constant_liar=True
        )
        asked = ours.ask(), theirs.ask()
        recipe, expected = (suggest(trial, sweep.search_space) for trial in asked)
        assert recipe == expected
        value = recipe["lora.rank"] - abs(math.log10(recipe["train.learning_rate"]) + 2)
        for study, trial in zip((ours, theirs), asked, strict=True):
            tell_in_some_way(study, trial, round(value))


def tell_in_some_way(study, trial, value):
    """Finished, stopped early or before its first score, infeasible, failed; some stay open."""
    way = trial.number % 7
    if way in (1, 2, 5):
        trial.report(math.nan if way == 5 else value, 10 * way)
    if way == 3:
        trial.set_constraint("cost", value)
    if way == 0:
        study.tell(trial, value)
    elif way != 6:
        study.tell(trial, state=optuna.trial.TrialState.FAIL if way == 4 else STOPPED)


def test_what_is_learned_changes_what_is_proposed(tmp_path, kind):
    if kind not in LEARNERS:
        pytest.skip("learns nothing")
    one = Sweep(tmp_path / "one", sampled(kind, include_default=False)).run(at_once=1)
    other = Sweep(tmp_path / "other", sampled("random", include_default=False)).run(at_once=1)
    assert [entry for entry, twin in zip(one, other, strict=True) if entry != twin]


@pytest.mark.parametrize("kind", ["tpe", "nsga2", "random"])
def test_several_objectives_are_proposed_alike_after_a_kill(kind, tmp_path):
    config = sampled(kind, objectives=OBJECTIVES)
    whole = Sweep(tmp_path / "whole", config).run()
    broken: list = []
    for most in (5, None):
        broken += Sweep(tmp_path / "broken", config).run(most=most)
    assert dict(broken) == dict(whole)
    study = optuna.load_study(
        study_name=config.name, storage=f"sqlite:///{tmp_path / 'broken' / 'study.db'}"
    )
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    finished = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    assert finished and all(len(trial.values) == 2 for trial in finished)


def test_the_dashboard_sees_how_each_trial_ended(tmp_path):
    sweep = Sweep(tmp_path, sampled("tpe", num_trials=6))
    sweep.run()
    study = optuna.load_study(study_name="test", storage=f"sqlite:///{tmp_path / 'study.db'}")
    shown = {trial.user_attrs["trial"]: trial for trial in study.trials}
    assert sorted(shown) == sorted(sweep.states)
    attributes = shown["t0003"].user_attrs
    assert (attributes["status"], attributes["steps"]) == ("finished", 90)
    assert attributes["folder"] == "trials/t0003" and attributes["seconds"] > 0
    failed = shown["t0004"]
    assert failed.state.name == "PRUNED" and failed.constraints == {"failed": 1.0}
    assert failed.user_attrs["message"] == "diverged: loss is nan"


def test_another_proposal_than_the_recorded_one_is_said_and_the_record_kept(tmp_path):
    config = sampled("nsga2", num_trials=5)
    Sweep(tmp_path, config).run(most=3)
    file = tmp_path / "ledger.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    proposed = [row for row in rows if row["event"] == "proposed"]
    proposed[2]["recipe"]["lora.rank"] = proposed[2]["recipe"]["lora.rank"] % 16 + 1
    for row in rows:
        del row["crc"]  # as in a ledger of an earlier version
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = Sweep(tmp_path, config)
    assert len(again.said) == 1 and "t0002: the nsga2 sampler" in again.said[0]
    assert again.states["t0002"].recipe == proposed[2]["recipe"]


def test_a_key_with_a_condition_is_proposed_only_where_it_holds(tmp_path):
    config = experiment(
        sweep={"num_trials": 12, "search_space": CONDITIONAL}, train={"max_steps": 90}
    )
    whole = Sweep(tmp_path / "whole", config).run()
    for _, recipe in whole:
        assert ("lora.rank_by_scope.vision" in recipe) == (recipe["lora.scope"] != "text")
        config.with_recipe(recipe)
    assert {recipe["lora.scope"] for _, recipe in whole} == {"text", "text+vision"}
    broken: list = []
    for most in (7, None):
        broken += Sweep(tmp_path / "broken", config).run(most=most)
    assert dict(broken) == dict(whole)


def test_every_branch_of_a_space_is_validated():
    assert list(search_space_problems(experiment(sweep={"search_space": CONDITIONAL}))) == []
    wrong = {**CONDITIONAL, "lora.dropout": {
        "type": "uniform", "lower": 0, "upper": 2, "when": {"lora.scope": "text"}}}  # fmt: skip
    problems = list(search_space_problems(experiment(sweep={"search_space": wrong})))
    assert [key for key, _ in problems] == ["lora.dropout"]
    assert "with lora.scope=text" in problems[0][1]


def test_branches_and_grids_know_conditions():
    space = experiment(sweep={"search_space": CONDITIONAL}).sweep.search_space
    assert [(given["lora.scope"], len(keys)) for given, keys in branches(space)] == [
        ("text", 2),
        ("text+vision", 3),
    ]
    grid = {
        "lora.rank_by_scope.vision": {
            "type": "grid",
            "values": [2, 4],
            "when": {"lora.scope": ["text+vision"]},
        },
        "lora.scope": {"type": "choice", "values": ["text", "text+vision"]},
    }
    sweep = {"search_space": grid, "searcher": {"type": "grid"}, "num_trials": 4}
    assert len(combinations(experiment(sweep=sweep).sweep.search_space)) == 3


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"search_space": CHOICES, "searcher": {"type": "cmaes"}}, "cmaes searches numbers only"),
        (
            {"search_space": {"lora.dropout": NUMBERS["lora.dropout"]},
             "searcher": {"type": "cmaes"}},
            "at least 2 keys",
        ),
        ({"search_space": CONDITIONAL, "searcher": {"type": "gp"}}, "cannot search a space with"),
        ({"objectives": OBJECTIVES, "searcher": {"type": "cmaes"}}, "one objective only"),
        (
            {"constraints": {"max_memory_gb": 1}, "searcher": {"type": "cmaes"}},
            "does not learn from constraints",
        ),
        ({"searcher": {"type": "nsga2", "population_size": 1}}, "greater than or equal to 2"),
        ({"objectives": OBJECTIVES[:1]}, "one alone is written as metric"),
        ({"objectives": [OBJECTIVES[0]] * 2}, "must differ"),
        ({"objectives": OBJECTIVES, "metric": METRIC}, "exclude each other"),
        ({"objectives": OBJECTIVES[::-1]}, "first objective picks the winner"),
        (
            {"objectives": [OBJECTIVES[0], {"metric": "cer@micro"}]},
            r"objectives\.1\.metric='cer@micro': no benchmark of this experiment reports it",
        ),
        (
            {"objectives": [OBJECTIVES[0], {"metric": "train_seconds", "mode": "max"}]},
            "of train_seconds min is better",
        ),
        ({"max_gpu_hours": -1}, "greater than 0"),
        ({"max_gpu_hours": 1}, "has no effect: train.gpus_per_worker=0"),
        ({"max_cost": 5}, "needs a price"),
        ({"stop_when_stable": {"trials": 16}}, "must be below num_trials=16"),
        ({"warm_start": ["x"], "searcher": {"type": "random"}}, "has no effect with"),
        ({"warm_start_across_data": True}, "has no effect without warm_start"),
        (
            {"points_to_evaluate": [{}, {}], "num_trials": 2, "search_space": NUMBERS},
            "2 points after the experiment's own recipe do not fit",
        ),
        (
            {"search_space": {"lora.rank": {**NUMBERS["lora.rank"], "when": {"lora.scop": "a"}}}},
            "'lora.scop' is not a key of the search space",
        ),
        (
            {"search_space": {**CONDITIONAL, "lora.dropout": {
                **NUMBERS["lora.dropout"], "when": {"lora.scope": "txt"}}}},
            r"lora\.scope is never 'txt' \(did you mean 'text'",
        ),
        (
            {"search_space": {
                "lora.rank": {**CHOICES["lora.rank"], "when": {"lora.scope": "text"}},
                "lora.scope": {**CHOICES["lora.scope"], "when": {"lora.rank": 1}}}},
            "go round in a circle: lora.",
        ),
    ],
)  # fmt: skip
def test_what_a_search_cannot_do_is_refused(sweep, message):
    with pytest.raises(ValidationError, match=message):
        experiment(sweep=sweep)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ("{lora.rank: 5}", "x.yaml:11: sweep.points_to_evaluate.0.lora.rank: value 5 is not in"),
        ("{lora.rnk: 4}", "points_to_evaluate.0.lora.rnk: no such key .*did you mean 'lora.rank'"),
        ("{lora.rank_by_scope.vision: 4}", "its conditions do not hold"),
        ("{}", "is tried already"),
    ],
)
def test_a_first_point_is_checked_with_its_line(tmp_path, point, message):
    (tmp_path / "x.yaml").write_text(
        f"""name: x
data: {{sources: [{{type: messages, path: a.jsonl}}]}}
lora: {{rank: 4}}
sweep:
  search_space:
    lora.rank: {{type: choice, values: [1, 4]}}
    lora.scope: {{type: choice, values: [text, text+vision]}}
    lora.rank_by_scope.vision:
      {{type: randint, lower: 1, upper: 9, when: {{lora.scope: text+vision}}}}
  points_to_evaluate:
    - {point}
"""
    )
    with pytest.raises(ConfigError, match=message):
        load_experiment(tmp_path / "x.yaml")


def test_given_points_come_after_the_default_one(tmp_path):
    points = [{"lora.rank": 3}, {"lora.rank": 5, "lora.dropout": 0.25}]
    config = sampled("tpe", points_to_evaluate=points, num_trials=5)
    proposed = Sweep(tmp_path, config).run()
    assert [recipe for _, recipe in proposed[:3]] == [
        own_recipe(config),
        own_recipe(config, points[0]),
        own_recipe(config, points[1]),
    ]


def test_a_sampler_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr("raytune_vlm.train.packages.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"type=gp needs scipy: pip install 'raytune-vlm\[sear"):
        check_searcher(sampled("gp").sweep)
    check_searcher(sampled("tpe").sweep)


def test_notes_tell_what_teaches_a_sampler_nothing():
    notes = sampled("nsga2").sweep.notes()
    assert len(notes) == 2 and "several objectives" in notes[0] and "halving stops" in notes[1]
    assert sampled("tpe").sweep.notes() == []


def test_a_locked_study_file_is_named(tmp_path):
    Sweep(tmp_path, sampled("random"))
    holder = sqlite3.connect(tmp_path / "study.db")
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LeaseError, match=r"study\.db is locked by another process"):
        Sweep(tmp_path, sampled("random"))
    holder.close()
    Sweep(tmp_path, sampled("random"))

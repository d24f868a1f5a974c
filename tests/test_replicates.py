"""Several seeds of each recipe: ranked, promoted, told to the searcher and picked by their mean."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from made import experiment
from pydantic import ValidationError

from raytune_vlm.config.search_space import clone_recipe
from raytune_vlm.evaluate.statistics import corrected_winner
from raytune_vlm.sweep.ledger import BY_HAND, Ledger, TrialState, replay
from raytune_vlm.sweep.replicates import by_recipe, together, value_at
from raytune_vlm.sweep.scheduler import Rule, decide
from raytune_vlm.sweep.searcher import OptunaSearcher
from raytune_vlm.sweep.warm_start import read_sweep

METRIC = "exact_match@strip"
SPACE = {
    "train.learning_rate": {"type": "loguniform", "lower": 1e-4, "upper": 1e-1},
    "lora.dropout": {"type": "uniform", "lower": 0, "upper": 0.5},
}


def config(seeds: int = 3, recipes: int = 6, **sweep: Any) -> Any:
    """A sweep with several seeds of each recipe, on a rung of 30 and the end."""
    plain = {
        "num_trials": seeds * recipes,
        "search_space": SPACE,
        "searcher": {"type": "tpe", "num_startup_trials": 2},
        "scheduler": {"type": "halving", "grace_period": 30, "seeds": seeds},
        **sweep,
    }
    return experiment(sweep=plain, train={"max_steps": 90})


def trials(*rows: tuple[float | None, str | None, str | None]) -> list[TrialState]:
    """Trials of one recipe, by score at rung 10, ending and message."""
    found = []
    for number, (value, ended, message) in enumerate(rows):
        state = TrialState(f"t{number}", number, {}, {} if value is None else {10: {METRIC: value}})
        state.ended, state.message = ended, message  # type: ignore[assignment]
        state.replicates = "t0" if number else None
        found.append(state)
    return found


@pytest.mark.parametrize(
    ("rows", "value"),
    [
        ([(0.2, None, None), (0.4, "finished", None)], 0.3),
        ([(0.2, None, None), (None, None, None)], None),
        ([(0.9, None, None), (None, "failed", "diverged: loss is nan")], None),
        ([(0.9, None, None), (None, "stopped", None)], None),  # it broke a limit
        ([(0.9, None, None), (None, "failed", "infrastructure: node is gone")], 0.9),
        ([(0.9, None, None), (None, "stopped", BY_HAND)], 0.9),
        ([(0.9, None, None), (0.5, "failed", "diverged: later")], 0.7),
        ([(0.9, None, None), (math.nan, None, None)], math.nan),
        ([(None, "failed", "infrastructure: node is gone")] * 2, None),
    ],
)
def test_a_recipe_is_worth_the_mean_of_its_trials_once_all_have_come(rows: Any, value: Any) -> None:
    found = value_at(trials(*rows), 10, METRIC)
    assert found is None if value is None else found == pytest.approx(value, nan_ok=True)


def state_of(number: int, seeds: int, scores: dict[int, float], **fields: Any) -> TrialState:
    first = f"t{number // seeds * seeds}"
    replicates = None if first == f"t{number}" else first
    scored = {step: {METRIC: value} for step, value in scores.items()}
    return TrialState(f"t{number}", number, {}, scored, replicates=replicates, **fields)


def test_the_steady_recipe_goes_on_and_not_the_one_with_the_luckiest_seed() -> None:
    rule = Rule((10, 30), 2, 1, 4, 4, METRIC, "max", seeds=2)
    scores = [0.9, 0.1, 0.6, 0.6]
    states = [state_of(number, 2, {10: value}) for number, value in enumerate(scores)]
    for expected in ("t2", "t3"):
        action = decide(states, rule)
        assert (action.kind, action.trial_id, action.step) == ("promote", expected, 30)
        states[int(expected[1])].promoted_to = 30
    assert decide(states, rule).kind == "wait", "the others are not of the best half"


def test_a_recipe_that_went_on_in_part_is_not_overtaken_and_a_pinned_trial_goes_alone() -> None:
    rule = Rule((10, 30), 2, 1, 8, 8, METRIC, "max", seeds=2)
    states = [state_of(number, 2, {10: 0.5 + number / 100}) for number in range(4)]
    states[2].promoted_to = 30
    states += [state_of(number, 2, {10: 0.9}) for number in (4, 5)]
    assert decide(states, rule).trial_id == "t3"
    states[2].pinned = True
    assert decide(states, rule).trial_id == "t4"


def test_a_recipe_waits_for_the_replicates_that_are_still_to_be_proposed() -> None:
    rule = Rule((10, 30), 2, 1, 6, 4, METRIC, "max", seeds=2)
    states = [state_of(n, 2, {10: value}) for n, value in enumerate([0.2, 0.2, 0.9])]
    assert decide(states, rule).kind == "start"
    states.append(state_of(3, 2, {10: 0.8}))
    assert decide(states, rule).trial_id == "t2"
    # No more will come: who is there counts.
    states = [state_of(n, 2, {10: value}) for n, value in enumerate([0.2, 0.2, 0.9])]
    final = Rule((10, 30), 2, 1, 3, 4, METRIC, "max", seeds=2)
    assert decide(states, final).trial_id == "t2"


class Sweep:
    """A sweep without training: every trial reaches rung 30, every other recipe the end."""

    def __init__(self, folder: Any, chosen: Any) -> None:
        folder.mkdir(exist_ok=True)
        file = folder / "ledger.jsonl"
        self.states, self.ledger = replay(file), Ledger(file)
        self.searcher = OptunaSearcher(chosen, self.ledger, self.states, folder / "study.db", None)
        self.running: list[TrialState] = []

    @property
    def told(self) -> list[Any]:
        """What the sampler was told."""
        done = self.searcher._study._study.get_trials(deepcopy=False)
        return [trial for trial in done if trial.state.is_finished()]

    def run(self, most: int | None = None) -> None:
        """Two trials at a time, until the end or until so many have ended."""
        ended = 0
        while True:
            while len(self.running) < 2:
                proposed: Any = self.searcher.suggest(f"{len(self.states)}-{len(self.running)}")
                if proposed == "FINISHED":
                    break
                self.running.append(self.states[proposed["trial_id"]])
            if not self.running or ended == most:
                return
            self.end(self.running.pop(0))
            ended += 1

    def end(self, state: TrialState) -> None:
        value = 1 - abs(math.log10(state.recipe["train.learning_rate"]) + 2) / 3
        value += state.recipe.get("seed", 0) / 10
        for step in (30, 90) if state.number // 3 % 2 else (30,):
            if step not in state.scored:
                state.scored[step] = {METRIC: value}
                self.ledger.append(
                    "scored", trial_id=state.trial_id, step=step, scores=state.scored[step]
                )
        state.ended = "finished" if 90 in state.scored else "stopped"
        step = max(state.scored)
        state.ended_at = self.ledger.append(state.ended, trial_id=state.trial_id, step=step)
        self.searcher.tell(state)


def test_each_proposal_is_so_many_trials_and_the_sampler_is_told_their_mean_once(
    tmp_path: Any,
) -> None:
    sweep = Sweep(tmp_path / "whole", config())
    sweep.run()
    recipes = by_recipe(sweep.states.values())
    assert [len(own) for own in recipes] == [3] * 6
    for own in recipes:
        assert [state.recipe.get("seed") for state in own] == [None, 1, 2]
        assert len({state.recipe["train.learning_rate"] for state in own}) == 1
    assert len({own[0].recipe["train.learning_rate"] for own in recipes}) == 6
    assert [trial.user_attrs["trial"] for trial in sweep.told] == [
        own[0].trial_id for own in recipes
    ]
    for trial, own in zip(sweep.told, recipes, strict=True):
        mean = np.mean([state.scored[30][METRIC] for state in own])
        assert trial.intermediate_values[30] == pytest.approx(mean)
        assert trial.value == pytest.approx(mean)  # of a pruned one the last of its rungs
    # Nor does a later sweep take them for different recipes.
    head = {"experiment": config().model_dump(mode="json"), "data": "digest"}
    (tmp_path / "whole" / "experiment.json").write_text(json.dumps(head))
    taken, left_out = read_sweep(config(seeds=1), "digest", tmp_path / "whole")
    assert [entry.trial_id for entry in taken] == [own[0].trial_id for own in recipes]
    assert not left_out and taken[1].scored[90] == pytest.approx(sweep.told[1].value)


def test_a_killed_sweep_proposes_the_same_replicates(tmp_path: Any) -> None:
    whole = Sweep(tmp_path / "whole", config())
    whole.run()
    for most in (1, 3, 2, 4, None):
        Sweep(tmp_path / "broken", config()).run(most)
    broken = Sweep(tmp_path / "broken", config())
    assert broken.searcher.is_done
    rows = [
        {name: (s.recipe, s.replicates, s.scored) for name, s in sweep.states.items()}
        for sweep in (whole, broken)
    ]
    assert rows[0] == rows[1]
    assert [(t.params, t.values) for t in broken.told] == [(t.params, t.values) for t in whole.told]


def test_a_grid_is_tried_with_every_seed(tmp_path: Any) -> None:
    space = {"train.learning_rate": {"type": "grid", "values": [0.01, 0.001]}}
    grid = {"search_space": space, "searcher": {"type": "grid"}, "include_default": False}
    sweep = Sweep(tmp_path / "grid", config(3, 4, **grid))
    sweep.run()
    rates = [state.recipe["train.learning_rate"] for state in sweep.states.values()]
    assert rates == [0.01] * 3 + [0.001] * 3 and sweep.searcher.is_done


def test_a_recipe_is_one_trial_to_the_searcher() -> None:
    own = trials((0.2, "stopped", None), (0.6, "failed", "diverged: loss is nan"))
    own[0].costs, own[1].costs = {10: {"train_seconds": 4.0}}, {10: {"train_seconds": 6.0}}
    found = together(own)
    assert found.scored == {10: {METRIC: pytest.approx(0.4)}}
    assert found.costs == {10: {"train_seconds": 5.0}}
    assert (found.ended, found.message) == ("failed", "diverged: loss is nan")
    own[1].message = "infrastructure: node is gone"
    assert together(own).ended == "stopped"
    own[1].ended = None
    assert together(own).ended is None
    assert together(own[:1]) is own[0]


def test_a_clone_of_a_replicate_keeps_its_seed() -> None:
    recipe = {"train.learning_rate": 0.01, "lora.dropout": 0.0, "seed": 2}
    found = clone_recipe(config(), recipe, {"train.learning_rate": 0.02})
    assert found == {**recipe, "train.learning_rate": 0.02}


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"num_trials": 8}, "num_trials=8 must be a multiple of scheduler.seeds=3"),
        ({"num_trials": 2}, "the trials of each recipe: 3 or 6"),
        ({"num_replicates": 1, "replicate_top": 7}, "more than num_trials=18 .scheduler.seeds=3"),
        (
            {"points_to_evaluate": [{"lora.dropout": n / 100} for n in range(1, 7)]},
            "do not fit into num_trials=18 .scheduler.seeds=3",
        ),
    ],
)
def test_counts_that_do_not_fit_are_refused(sweep: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**sweep)


def test_by_default_the_first_rung_waits_for_all_recipes_but_those_in_training() -> None:
    rule = Rule.of(config(num_executors=5))
    assert (rule.seeds, rule.num_trials, rule.min_results) == (3, 18, 4)
    assert Rule.of(config(seeds=1, num_executors=5)).min_results == 2


def test_the_correction_picks_a_team_by_its_mean_and_then_its_best_trial() -> None:
    values = np.array([[1.0] * 40, [0.0] * 40, [0.7] * 40, [0.6] * 40])
    groups = [str(number) for number in range(40)]
    options: Any = {"confidence": 0.95, "num_bootstrap": 50, "seed": 0, "mode": "max"}
    arguments = (values, np.ones_like(values), groups)
    assert corrected_winner(*arguments, **options).value == 1.0
    paired = corrected_winner(*arguments, **options, teams=[[0, 1], [2, 3]])
    assert paired.value == pytest.approx(0.7)
    alone = corrected_winner(*arguments, **options, teams=[[0], [1], [2], [3]])
    assert alone == corrected_winner(*arguments, **options)

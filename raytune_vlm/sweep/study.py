"""The Optuna study of a sweep: proposals, and how they ended; rebuilt from the ledger.

Proposal `k` comes from a sampler seeded with `seed` and `k` that sees the trials told so far, in
the order of the ledger, so a sweep that was killed proposes what it would have proposed. Stopped
trials, by hand too, are told PRUNED with their intermediate values. Failed ones, and those whose
score is not a number, are told PRUNED with a constraint above 0, which ranks them worst (TPE
ignores FAILED trials and would propose the same again). Attributes are written before a trial is
told: Optuna takes none afterwards.

The study is kept in memory, where samplers also put pickled state of their own; what a file shows
of it, for optuna-dashboard, is written by `mirror.py` and never read back.

Clones (`control.py`) are in that file only: what they reach follows from two recipes, so samplers
would learn from it what is not so. Proposals are counted without them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from raytune_vlm.config.distributions import combinations
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.search_space import own_recipe
from raytune_vlm.monitor import Say
from raytune_vlm.sweep.constraints import violations
from raytune_vlm.sweep.ledger import TrialState, trial_name
from raytune_vlm.sweep.mirror import Mirror
from raytune_vlm.sweep.samplers import KEEP_STATE, inside, optuna_distribution, sampler, suggest
from raytune_vlm.sweep.warm_start import WarmTrial

DIRECTIONS = {"max": "maximize", "min": "minimize"}


class _Storage(optuna.storages.InMemoryStorage):
    """Trials in memory; samplers may be shown some of them otherwise than they are.

    A study copied for each proposal instead would make a proposal the dearer, the more trials there
    are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shown: dict[int, FrozenTrial] = {}
        """Number -> what is given instead of the trial."""

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[OptunaState] | None = None,
    ) -> list[FrozenTrial]:
        if not self.shown or states == (OptunaState.WAITING,):
            return super().get_all_trials(study_id, deepcopy, states)
        trials = super().get_all_trials(study_id, deepcopy=False)
        for number, trial in self.shown.items():
            trials[number] = trial  # a trial's number is its place
        if states is not None:
            trials = [trial for trial in trials if trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials


class SweepStudy:
    """Asks Optuna for recipes and tells it how they ended.

    Parameters
    ----------
    file
        SQLite file for optuna-dashboard; written anew.
    trials
        What the ledger says already.
    warm
        Trials of other sweeps, from the ledger too.
    say
        Tells a person something.

    Raises
    ------
    LeaseError
        If another process has locked the file.
    """

    def __init__(
        self,
        experiment: ExperimentConfig,
        file: Path,
        trials: Iterable[TrialState],
        warm: Iterable[WarmTrial],
        say: Say,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._experiment, self._say = experiment, say
        self._sweep = experiment.sweep
        self._space = self._sweep.search_space
        self._distributions = {key: optuna_distribution(e) for key, e in self._space.items()}
        self._given = self._given_recipes()
        self._asked: dict[str, optuna.Trial] = {}
        self._shown: dict[int, FrozenTrial] = {}
        """Open trials with scores as samplers see them, by number."""
        self._num_shown: dict[str, int] = {}
        """How many scores they were given."""
        directions = [DIRECTIONS[mode] for mode in experiment.objectives.values()]
        self._storage = _Storage()
        self._study = optuna.create_study(storage=self._storage, directions=directions)
        for entry in warm:
            self._study.add_trial(entry.frozen(self._distributions, experiment.objectives))
        states = list(trials)
        self._replay(states)
        self._mirror = Mirror(file, experiment.name, directions, say)
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state.is_finished():
                self._mirror.add(trial)
        for state in states:
            if state.origin is not None and state.ended is not None:
                self.tell(state)

    @property
    def num_given(self) -> int | None:
        """How many recipes there are in all, where they are known beforehand: with a grid."""
        return len(self._given) if self._sweep.searcher.type == "grid" else None

    def propose(self, number: int, states: Mapping[str, TrialState]) -> dict[str, Any]:
        """The recipe of the trial `number`; ask in order.

        `states` are the sweep's trials so far. Those that wait at a rung have not been told: Optuna
        lets no trial go on that was. Samplers that keep nothing see them as PRUNED there.
        """
        place = number - sum(state.origin is not None for state in states.values())
        self._storage.shown = self._paused(states)
        try:
            recipe, asked = self._ask(place, self._given.get(place))
        finally:
            self._storage.shown = {}
        if asked is not None:
            self._asked[trial_name(number)] = asked
        return recipe

    def tell(self, state: TrialState) -> None:
        """Tell Optuna how a trial ended; of a clone only the file is told."""
        study, asked = self._study, self._asked.pop(state.trial_id, None)
        if self._num_shown.pop(state.trial_id, 0) and asked is not None:
            del self._shown[asked.number]
        if state.origin is not None and inside(self._space, state.recipe):
            study = optuna.create_study(
                storage=optuna.storages.InMemoryStorage(), directions=study.directions
            )
            study.enqueue_trial(state.recipe)
            asked = study.ask()
            suggest(asked, self._space)
        if asked is not None:
            self._tell(asked, state, study)
            self._mirror.add(study.get_trials(deepcopy=False)[asked.number])

    def _paused(self, states: Mapping[str, TrialState]) -> dict[int, FrozenTrial]:
        """Open trials with scores as a sampler that keeps nothing sees them: PRUNED."""
        if self._sweep.searcher.type in KEEP_STATE or len(self._experiment.objectives) > 1:
            return {}
        metric = self._experiment.metric
        all_trials = self._study.get_trials(deepcopy=False)
        for trial_id, asked in self._asked.items():
            scored = states[trial_id].scored if trial_id in states else {}
            if len(scored) == self._num_shown.get(trial_id, 0):
                continue
            trial = copy.copy(all_trials[asked.number])
            trial.state = OptunaState.PRUNED
            trial.datetime_complete = trial.datetime_start
            trial.intermediate_values = {
                step: row[metric] for step, row in scored.items() if math.isfinite(row[metric])
            }
            self._shown[asked.number], self._num_shown[trial_id] = trial, len(scored)
        return self._shown

    def _given_recipes(self) -> dict[int, dict[str, Any]]:
        """Number -> recipe of the proposals that no sampler makes."""
        first = [own_recipe(self._experiment)] if self._sweep.include_default else []
        if self._sweep.searcher.type == "grid":
            listed: list[dict[str, Any]] = list(combinations(self._space))
        else:
            points = self._sweep.points_to_evaluate
            listed = [own_recipe(self._experiment, point) for point in points]
        return dict(enumerate([*first, *listed]))

    def _ask(
        self, number: int, given: dict[str, Any] | None
    ) -> tuple[dict[str, Any], optuna.Trial | None]:
        if given is not None:
            if not inside(self._space, given):
                return given, None
            self._study.enqueue_trial(given)
        self._study.sampler = sampler(self._sweep, self._experiment.seed, number)
        asked = self._study.ask()
        return suggest(asked, self._space), asked

    def _replay(self, trials: list[TrialState]) -> None:
        """Ask and tell again what was asked and told, in the same order."""
        trials = [state for state in trials if state.origin is None]
        places = {state.trial_id: place for place, state in enumerate(trials)}
        events = [(state.proposed_at, False, state) for state in trials]
        events += [(state.ended_at, True, state) for state in trials if state.ended is not None]
        for _, has_ended, state in sorted(events, key=lambda event: event[:2]):
            if not has_ended:
                self._ask_again(state, places[state.trial_id])
            elif asked := self._asked.pop(state.trial_id, None):
                self._tell(asked, state, self._study)

    def _ask_again(self, state: TrialState, place: int) -> None:
        by_sampler = place not in self._given and self._sweep.searcher.type in KEEP_STATE
        recipe, asked = self._ask(place, None if by_sampler else state.recipe)
        if recipe != state.recipe and asked is not None:
            self._say(
                f"{state.trial_id}: the {self._sweep.searcher.type} sampler of Optuna "
                f"{optuna.__version__} proposes otherwise than when this trial was proposed; "
                "its recorded recipe is kept"
            )
            self._study.tell(asked, state=OptunaState.FAIL)
            _, asked = self._ask(place, state.recipe)
        if asked is not None:
            self._asked[state.trial_id] = asked

    def _tell(self, asked: optuna.Trial, state: TrialState, study: optuna.Study) -> None:
        experiment = self._experiment
        last = max(state.scored, default=0)
        attributes = {
            "trial": state.trial_id,
            "status": "infeasible" if state.untrained else state.ended,
            "steps": last,
            "seconds": state.costs.get(last, {}).get("train_seconds", 0.0),
            "folder": f"trials/{state.trial_id}",
        }
        for name, value in attributes.items():
            asked.set_user_attr(name, value)
        if state.message:
            asked.set_user_attr("message", state.message)
        if state.origin is not None:
            asked.set_user_attr("parent", f"{state.origin['parent']} at {state.origin['step']}")
        values = objective_values(experiment, state)
        bad = state.ended == "failed" or (
            values is not None and not all(map(math.isfinite, values))
        )
        if self._sweep.searcher.type != "cmaes":  # it warns that it cannot use them
            for name, excess in violations(experiment, state).items():
                asked.set_constraint(name, excess)
            if bad and not state.untrained:
                asked.set_constraint("failed", 1.0)
        if len(experiment.objectives) == 1:  # Optuna takes no reports for several
            for step, scores in sorted(state.scored.items()):
                if math.isfinite(scores[experiment.metric]):
                    asked.report(scores[experiment.metric], step)
        if state.ended == "finished" and values is not None and not bad:
            study.tell(asked, values)
        else:
            study.tell(asked, state=OptunaState.PRUNED)


def objective_values(experiment: ExperimentConfig, state: TrialState) -> list[float] | None:
    """What a trial reached at its last rung, objective by objective; None without a score."""
    if not state.scored:
        return None
    last = max(state.scored)
    found = {**state.predicted, **state.costs.get(last, {}), **state.scored[last]}
    return [float(found.get(name, math.nan)) for name in experiment.objectives]

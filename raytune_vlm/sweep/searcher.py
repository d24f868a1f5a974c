"""Optuna as a Ray Tune searcher that keeps no state the ledger does not have.

Proposal number k comes from a sampler seeded with `seed + k` that sees the trials told so far, so
a sweep that was killed and rebuilt from its ledger proposes what it would have proposed. Stopped
trials are told PRUNED with their intermediate values; failed ones PRUNED without any, which ranks
them worst (Optuna's TPE ignores FAILED trials and would propose the same again).
"""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState as OptunaState
from ray.tune.search import Searcher

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.sweep import (
    Choice,
    Distribution,
    HalvingScheduler,
    LogUniform,
    QUniform,
    RandInt,
    TpeSearcher,
)
from raytune_vlm.sweep.ledger import Ledger, TrialState


def optuna_distribution(distribution: Distribution) -> BaseDistribution:
    """Our distribution as Optuna's; `randint` excludes its upper end, as in Ray."""
    if isinstance(distribution, Choice):
        return CategoricalDistribution(distribution.values)
    if isinstance(distribution, RandInt):
        return IntDistribution(distribution.lower, distribution.upper - 1)
    return FloatDistribution(
        distribution.lower,
        distribution.upper,
        log=isinstance(distribution, LogUniform),
        step=distribution.q if isinstance(distribution, QUniform) else None,
    )


class OptunaSearcher(Searcher):
    """Proposes recipes and tells Optuna how they ended.

    Parameters
    ----------
    experiment
        The resolved experiment.
    ledger
        Every proposal is written here before Ray Tune learns of it.
    trials
        What the ledger says already (empty for a new sweep); trials that have not ended are
        proposed again first, with the same id.
    study_file
        SQLite file of the Optuna study; rebuilt from `trials`, so that it can always be deleted.
    board
        Handle that proxies need; goes into each trial's config.
    """

    def __init__(
        self,
        experiment: ExperimentConfig,
        ledger: Ledger,
        trials: dict[str, TrialState],
        study_file: Path,
        board: Any,
    ) -> None:
        super().__init__(metric=experiment.metric, mode=experiment.mode)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._experiment = experiment
        self._sweep = experiment.sweep
        self._ledger = ledger
        self._board = board
        self._space = {
            key: optuna_distribution(entry) for key, entry in self._sweep.search_space.items()
        }
        self._plain = {key: experiment_value(experiment, key) for key in self._space}
        self._states = trials
        self._interrupted = [state for state in trials.values() if state.ended is None]
        self._next = len(trials)
        self._asked: dict[str, optuna.Trial | None] = {}
        self._ids: dict[str, str] = {}
        study_file.unlink(missing_ok=True)
        self._study = optuna.create_study(
            storage=f"sqlite:///{study_file}",
            study_name=experiment.name,
            direction="maximize" if experiment.mode == "max" else "minimize",
            sampler=optuna.samplers.RandomSampler(seed=experiment.seed),
        )
        for state in trials.values():
            if state.ended is not None:
                self._add_ended(state)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next recipe, as a Ray Tune config; `FINISHED` when all have been proposed."""
        if self._interrupted:
            state = self._interrupted.pop(0)
            self._asked[state.trial_id] = self._ask(state.number, state.recipe)
        elif self._next >= self._sweep.num_trials:
            return Searcher.FINISHED
        else:
            state = self._propose(self._next)
            self._next += 1
        self._ids[trial_id] = state.trial_id
        return {
            "board": self._board,
            "trial_id": state.trial_id,
            "recipe": state.recipe,
            "reported": sorted(state.scored),
        }

    def _propose(self, number: int) -> TrialState:
        trial_id = f"t{number:04d}"
        asked: optuna.Trial | None
        if number == 0 and self._sweep.include_default:
            recipe = dict(self._plain)
            asked = self._ask(number, recipe) if self._inside(recipe) else None
        else:
            asked = self._ask(number, self._grid_point(number))
            assert asked is not None
            recipe = dict(asked.params)
        state = TrialState(trial_id, number, recipe)
        self._ledger.append("proposed", trial_id=trial_id, number=number, recipe=recipe)
        self._states[trial_id] = state
        self._asked[trial_id] = asked
        return state

    def _ask(self, number: int, fixed: dict[str, Any] | None) -> optuna.Trial | None:
        if fixed is not None:
            if not self._inside(fixed):
                return None
            self._study.enqueue_trial(fixed)
        elif isinstance(self._sweep.scheduler, HalvingScheduler):
            self._study.enqueue_trial(self._knowing_paused(number))
        self._study.sampler = self._sampler(number)
        return self._study.ask(self._space)

    def _knowing_paused(self, number: int) -> dict[str, Any]:
        """What the sampler proposes when paused trials count as PRUNED at their rung.

        In the study itself they are open, for Optuna does not let a trial go on that was told.
        """
        study = optuna.create_study(
            direction=self._study.direction.name.lower(), sampler=self._sampler(number)
        )
        for state in self._states.values():
            if self._inside(state.recipe):
                study.add_trial(self._frozen(state))
        return study.ask(self._space).params

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = self._experiment.seed * 100_003 + number
        searcher = self._sweep.searcher
        if not isinstance(searcher, TpeSearcher):
            return optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=seed,
                n_startup_trials=searcher.num_startup_trials,
                multivariate=True,
                constant_liar=True,
            )

    def _grid_point(self, number: int) -> dict[str, Any] | None:
        if self._sweep.searcher.type != "grid":
            return None
        place = number - int(self._sweep.include_default)
        values = [entry.corners() for entry in self._sweep.search_space.values()]
        points = list(itertools.product(*values))
        return dict(zip(self._space, points[place % len(points)], strict=True))

    def _inside(self, recipe: dict[str, Any]) -> bool:
        return all(_contains(self._space[key], value) for key, value in recipe.items())

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing here: the callback writes scores to the ledger, `tell` reads them there."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Told by Ray Tune that a trial is over; the callback notes how, then calls `tell`."""

    def tell(self, state: TrialState) -> None:
        """Tell Optuna how a trial ended; called after the ledger has it."""
        asked = self._asked.pop(state.trial_id, None)
        if asked is None:
            return
        for step, scores in sorted(state.scored.items()):
            asked.report(scores[self._experiment.metric], step)
        if state.ended == "finished":
            self._study.tell(asked, self._value(state))
        else:
            self._study.tell(asked, state=OptunaState.PRUNED)

    def _value(self, state: TrialState) -> float:
        return state.scored[max(state.scored)][self._experiment.metric]

    def _add_ended(self, state: TrialState) -> None:
        """Put a trial that ended in an earlier life of the sweep into the study."""
        if not self._inside(state.recipe):
            return
        self._study.add_trial(self._frozen(state))

    def _frozen(self, state: TrialState) -> optuna.trial.FrozenTrial:
        """A trial as Optuna keeps it: COMPLETE, PRUNED at its last rung, or running without any."""
        metric = self._experiment.metric
        finished, is_open = state.ended == "finished", state.ended is None and not state.scored
        pruned = OptunaState.RUNNING if is_open else OptunaState.PRUNED
        return optuna.trial.create_trial(
            state=OptunaState.COMPLETE if finished else pruned,
            value=self._value(state) if finished else None,
            params=state.recipe,
            distributions=self._space,
            intermediate_values={step: row[metric] for step, row in state.scored.items()},
        )

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles a snapshot of itself; the ledger is ours, so there is nothing to it."""
        return {}

    def our_id(self, tune_id: str) -> str:
        """Our trial id for Ray Tune's."""
        return self._ids[tune_id]

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


def experiment_value(experiment: ExperimentConfig, dotted: str) -> Any:
    """The experiment's own value of a dotted key."""
    value: Any = experiment
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return not isinstance(value, str) and bool(distribution._contains(value))

"""Optuna as a Ray Tune searcher that keeps no state the ledger does not have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.monitor import Say
from raytune_vlm.records import SweepFolder, TrialRecord, write_json
from raytune_vlm.sweep.constraints import Predictor, broken
from raytune_vlm.sweep.ledger import Ledger, TrialState, trial_name
from raytune_vlm.sweep.study import SweepStudy
from raytune_vlm.sweep.warm_start import WarmTrial

MOST_INFEASIBLE = 200
"""Proposals in a row that break a constraint, after which the search ends."""


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
    warm
        Trials of other sweeps.
    is_closed
        Whether no new trials shall be started.
    close
        Told why no more will come, before `num_trials` are reached.
    say
        Tells a person something.
    """

    def __init__(
        self,
        experiment: ExperimentConfig,
        ledger: Ledger,
        trials: dict[str, TrialState],
        study_file: Path,
        board: Any,
        *,
        warm: Iterable[WarmTrial] = (),
        is_closed: Callable[[], bool] = lambda: False,
        close: Callable[[str, str], None] = lambda kind, reason: None,
        say: Say = lambda message: None,
    ) -> None:
        super().__init__(metric=experiment.metric, mode=experiment.mode)
        self._experiment, self._ledger, self._board = experiment, ledger, board
        self._is_closed, self._close, self._say = is_closed, close, say
        self._folder = SweepFolder(study_file.parent)
        self.predict = Predictor(experiment)
        self._states = trials
        self._next = len(trials)
        own = [state for state in trials.values() if state.origin is None]
        self._num_own = len(own)
        """Proposals; clones are none."""
        self._num_untrained = sum(state.untrained for state in own)
        self._ids: dict[str, str] = {}
        self._study = SweepStudy(experiment, study_file, trials.values(), warm, say)
        self._interrupted = [state for state in trials.values() if state.ended is None]
        # Killed between a proposal and the verdict on it.
        self._interrupted = [state for state in self._interrupted if self._may_train(state)]

    @property
    def is_done(self) -> bool:
        """Whether no trial is left to propose."""
        return not self._interrupted and (self._num_left() <= 0 or self._is_closed())

    @property
    def has_waiting(self) -> bool:
        """Whether the next suggestion is a trial that there is already."""
        return bool(self._interrupted)

    def set_limits(self, experiment: ExperimentConfig) -> None:
        """`sweep.num_trials` was changed by hand."""
        self._experiment = experiment

    def add(self, state: TrialState) -> None:
        """A clone, which the ledger has already: it is suggested next."""
        self._interrupted.append(state)
        self._next += 1

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next recipe, as a Ray Tune config; `FINISHED` when all have been proposed."""
        state = self._interrupted.pop(0) if self._interrupted else self._next_feasible()
        if state is None:
            return Searcher.FINISHED
        self._ids[trial_id] = state.trial_id
        return {
            "board": self._board,
            "trial_id": state.trial_id,
            "recipe": state.recipe,
            "reported": sorted(state.scored),
            "origin": state.origin,
        }

    def _num_left(self) -> int:
        """How many more trials may be trained."""
        trained = self._num_own - self._num_untrained
        left = self._experiment.sweep.num_trials - trained
        given = self._study.num_given
        return left if given is None else min(left, given - self._num_own)

    def _next_feasible(self) -> TrialState | None:
        for _ in range(MOST_INFEASIBLE):
            if self._num_left() <= 0 or self._is_closed():
                return None
            state = self._propose()
            if self._may_train(state):
                return state
        self._close(
            "infeasible",
            f"the last {MOST_INFEASIBLE} proposals were all predicted to break a constraint",
        )
        return None

    def _propose(self) -> TrialState:
        number = self._next
        recipe = self._study.propose(number, self._states)
        state = TrialState(trial_name(number), number, recipe, predicted=self.predict(recipe))
        predicted = {"predicted": state.predicted} if state.predicted else {}
        self._ledger.append(
            "proposed", trial_id=state.trial_id, number=number, recipe=recipe, **predicted
        )
        self._states[state.trial_id] = state
        self._next += 1
        self._num_own += 1
        return state

    def _may_train(self, state: TrialState) -> bool:
        """Whether no constraint is predicted to break; else the trial ends here, untrained."""
        reason = broken(self._experiment, state.predicted, "predicted")
        if reason is None or state.scored:
            return True
        state.ended, state.untrained, state.message = "failed", True, f"infeasible: {reason}"
        self._num_untrained += state.origin is None
        self._ledger.append("infeasible", trial_id=state.trial_id, step=0, message=state.message)
        record = TrialRecord(
            trial_id=state.trial_id,
            number=state.number,
            recipe=state.recipe,
            status="failed",
            max_steps=self._experiment.train.max_steps,
            failure=state.message,
            trainable_parameters=int(state.predicted.get("trainable_parameters", 0)),
        )
        write_json(self._folder.trial(state.trial_id).record_file, record)
        self._study.tell(state)
        self._say(f"{state.trial_id} is not trained: {state.message}")
        return False

    def tell(self, state: TrialState) -> None:
        """Tell Optuna how a trial ended; called after the ledger has it."""
        self._study.tell(state)

    def drop_interrupted(
        self, is_dropped: Callable[[TrialState], bool] = lambda state: True
    ) -> list[TrialState]:
        """Of the trials that would be proposed again those that shall not be; now they are not."""
        dropped = [state for state in self._interrupted if is_dropped(state)]
        self._interrupted = [state for state in self._interrupted if not is_dropped(state)]
        return dropped

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Nothing here: the callback writes scores to the ledger, `tell` reads them there."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Told by Ray Tune that a trial is over; the callback notes how, then calls `tell`."""

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

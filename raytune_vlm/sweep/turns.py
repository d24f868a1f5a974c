"""Whose turn it is: which trials Ray Tune begins, goes on with, keeps waiting and ends.

A scheduler here is a rule (`scheduler.py`: successive halving; `population.py`: population based
training; or one of Ray's) under the hand of a person, who may stop, pause and pin single trials
while the sweep runs (`control.py`). What was asked for is in the trials' states, as the ledger has
it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.sweep.ledger import Ledger, TrialState


@dataclass(frozen=True)
class Action:
    """What a free executor does."""

    kind: Literal["promote", "start", "wait", "end"]
    """Go on with a paused trial; begin a new one; nothing for now; nothing ever again."""
    trial_id: str = ""
    """Which trial is promoted."""
    step: int = 0
    """The rung that it may train to."""


@dataclass(frozen=True)
class Rungs:
    """Where trials are paused, and who is."""

    rungs: tuple[int, ...]
    """Steps at which trials are paused, in order; the last one is the end of a trial."""

    def target(self, state: TrialState) -> int:
        """The rung that a trial is allowed to reach."""
        return state.promoted_to or self.rungs[0]

    def above(self, state: TrialState) -> int:
        """The rung that it is promoted to."""
        return next(rung for rung in self.rungs if rung > self.target(state))

    def is_paused(self, state: TrialState) -> bool:
        """Whether a trial waits at its rung."""
        target = self.target(state)
        if state.ended is not None or target >= self.rungs[-1]:
            return False
        return target in state.scored or (state.origin or {}).get("step") == target

    def is_running(self, state: TrialState) -> bool:
        """Whether a trial has, or waits for, an executor."""
        return state.ended is None and not state.held and not self.is_paused(state)


RungsT = TypeVar("RungsT", bound=Rungs)


class Open:
    """The trials of a sweep that have not ended, in its order.

    Ray Tune asks several times a second what is next: it costs as much after 1,000 trials as after
    ten. Trials are only ever added to `states`, and what has ended stays so.
    """

    def __init__(self, states: Mapping[str, TrialState]) -> None:
        self._states = states
        self._num_seen = 0
        self._open: list[TrialState] = []

    def __call__(self) -> list[TrialState]:
        new = itertools.islice(self._states.values(), self._num_seen, None)
        self._open = [state for state in (*self._open, *new) if state.ended is None]
        self._num_seen = len(self._states)
        return self._open


@dataclass(frozen=True)
class End:
    """What is known of a search's end, asked anew each time."""

    is_exhausted: Callable[[], bool] = lambda: False
    """Whether no new trial will come."""
    ends_trials: Callable[[], bool] = lambda: False
    """Whether no trial shall go on past its rung."""
    is_asked_for: Callable[[], bool] = lambda: False
    """Whether trials that are paused by hand are not waited for."""


NEVER = End()
"""Nothing is known of an end."""


class Turns(TrialScheduler):
    """A Ray Tune scheduler that goes by the trials' states; a rule is added by a subclass."""

    def __init__(self, states: Mapping[str, TrialState], end: End) -> None:
        super().__init__()
        self._states, self._end = states, end
        self._open = Open(states)
        self._trials: dict[str, Trial] = {}
        self._resumed: set[str] = set()

    def set_limits(self, experiment: ExperimentConfig) -> None:
        """Limits of the sweep were changed by hand."""

    def is_paused(self, state: TrialState) -> bool:
        """Whether the rule keeps a trial waiting."""
        return False

    def options(self, state: TrialState) -> dict[str, Any]:
        """What the rule tells the trial's proxy."""
        return {}

    def judge(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """What the rule says to a result at a rung."""
        raise NotImplementedError

    def promote(self, action: Action) -> None:
        """A paused trial goes on: note it."""
        raise NotImplementedError

    def next_by_rule(self) -> Action:
        """What the rule says is next."""
        raise NotImplementedError

    def trained(self) -> list[TrialState]:
        """The trials but for those that were never trained."""
        return [state for state in self._states.values() if not state.untrained]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A new trial, or one of an earlier life of the sweep, which may be paused."""
        state = self._states[trial.config["trial_id"]]
        self._trials[state.trial_id] = trial
        trial.config.update(self.options(state))
        if state.held or self.is_paused(state):
            # Ray Tune starts whatever is pending without asking.
            trial.set_status(Trial.PAUSED)
            # Its results are looked for at the end, also if it never goes on.
            trial.init_local_path()

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """What the rule says, unless a person said otherwise."""
        state = self._states[trial.config["trial_id"]]
        if "step" not in result:
            # A note; or a pause of an earlier life, in which it was paused at a rung instead.
            is_now = result.get("held") == trial.config.get("life", 0)
            return TrialScheduler.PAUSE if is_now else TrialScheduler.CONTINUE
        if result["step"] in state.scored:
            return TrialScheduler.CONTINUE  # reported again after a pause in the middle of it
        said = self.judge(tune_controller, trial, result)
        kept = state.pinned and said == TrialScheduler.STOP
        return TrialScheduler.CONTINUE if kept else said

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """A waiting trial that goes on, if it is its turn; those that are to end are stopped."""
        action = self.next_action()
        is_over = action.kind == "end"
        for state in self._open():
            trial = self._trials.get(state.trial_id) if is_over or state.leaves else None
            if trial is not None and trial.status == Trial.PAUSED:
                tune_controller.stop_trial(trial)
        if (resumed := self._next_resumed()) is not None:
            return self._continue(resumed)
        if action.kind != "promote":
            return None
        promoted = self._trials.get(action.trial_id)
        if promoted is None or promoted.status != Trial.PAUSED:
            return None  # after a resume not known yet, or its proxy is still being let go
        self.promote(action)
        return self._continue(promoted)

    def resume(self, trial_id: str) -> None:
        """A trial goes on that was paused by hand, as soon as Ray Tune has paused it."""
        self._resumed.add(trial_id)

    def _next_resumed(self) -> Trial | None:
        for trial_id in sorted(self._resumed):
            state, trial = self._states[trial_id], self._trials.get(trial_id)
            if state.held or state.ended is not None or self.is_paused(state):
                self._resumed.discard(trial_id)  # paused again, or its rule decides
            elif trial is not None and trial.status == Trial.PAUSED:
                self._resumed.discard(trial_id)
                return trial
        return None

    def _continue(self, trial: Trial) -> Trial:
        state = self._states[trial.config["trial_id"]]
        changed = {"reported": sorted(state.scored), "life": self.life(state.trial_id) + 1}
        trial.set_config({**trial.config, **self.options(state), **changed})
        return trial

    def life(self, trial_id: str) -> int:
        """How often a trial went on after a pause in this life of the sweep."""
        trial = self._trials.get(trial_id)
        return int(trial.config.get("life", 0)) if trial is not None else 0

    def next_action(self) -> Action:
        """What the ledger's trials ask for now; those that were never trained are none of them."""
        if self._end.ends_trials():
            is_running = any(not state.held and not self.is_paused(state) for state in self._open())
            return Action("wait" if is_running else "end")
        action = self.next_by_rule()
        if action.kind in ("start", "promote") and self._is_leaving():
            return Action("wait")
        if action.kind == "end" and self.awaited() and not self._end.is_asked_for():
            return Action("wait")
        return action

    def _is_leaving(self) -> bool:
        """Whether a trial that pauses still has its proxy: whoever goes on next shall take it over,
        or Ray Tune starts a process for it."""
        return any(
            trial.status == Trial.RUNNING and (state.held or self.is_paused(state))
            for state in self._open()
            if (trial := self._trials.get(state.trial_id)) is not None
        )

    def awaited(self) -> list[str]:
        """The trials that are paused by hand."""
        return [state.trial_id for state in self._open() if state.held]

    def is_waiting(self, trial_id: str) -> bool:
        """Whether a trial is paused in Ray Tune, so that nobody works on it."""
        trial = self._trials.get(trial_id)
        return trial is not None and trial.status == Trial.PAUSED

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing here: the callback notes the failure."""

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Nothing here: the callback notes the end."""

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing here: the callback notes the end."""

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles a snapshot of itself; the ledger is ours, so there is nothing to it."""
        return {}


class Pausing(Turns, Generic[RungsT]):
    """Every result at a rung pauses the trial; who goes on is asked when Ray Tune next looks for
    work, after the callback has written the result to the ledger.

    Parameters
    ----------
    rule
        What decides.
    states
        The sweep's trials; the callback and the searcher keep them as the ledger is.
    ledger
        Where promotions are written before a trial goes on.
    end
        What is known of the search's end.
    """

    def __init__(
        self, rule: RungsT, states: Mapping[str, TrialState], ledger: Ledger, end: End = NEVER
    ) -> None:
        super().__init__(states, end)
        self.rule, self._ledger = rule, ledger

    def is_paused(self, state: TrialState) -> bool:
        """Whether a trial waits at its rung."""
        return self.rule.is_paused(state)

    def options(self, state: TrialState) -> dict[str, Any]:
        """The rung that a trial may train to now."""
        return {"until": self.rule.target(state)}

    def judge(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Pause at the rung that the trial was allowed to reach; the end ends it by itself."""
        until = trial.config["until"]
        reached = result["step"] == until and until < self.rule.rungs[-1]
        return TrialScheduler.PAUSE if reached else TrialScheduler.CONTINUE

    def promote(self, action: Action) -> None:
        """Write a promotion to the ledger: the trial goes on to the next rung."""
        self._states[action.trial_id].promoted_to = action.step
        self._ledger.append("promoted", trial_id=action.trial_id, step=action.step)


class RayRule(Turns):
    """A scheduler of Ray's that stops trials or does not."""

    def __init__(
        self,
        scheduler: TrialScheduler,
        states: Mapping[str, TrialState],
        at_once: int,
        end: End,
    ) -> None:
        super().__init__(states, end)
        self._scheduler, self._at_once = scheduler, at_once

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Passed on."""
        self._scheduler.on_trial_add(tune_controller, trial)
        super().on_trial_add(tune_controller, trial)

    def judge(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """What Ray's rule says."""
        return self._scheduler.on_trial_result(tune_controller, trial, result)

    def next_by_rule(self) -> Action:
        """New trials while executors are free."""
        running = sum(not state.held for state in self._open())
        if running >= self._at_once:
            return Action("wait")
        if not self._end.is_exhausted():
            return Action("start")
        return Action("wait" if running else "end")

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Passed on."""
        self._scheduler.on_trial_error(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Passed on."""
        self._scheduler.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Passed on."""
        self._scheduler.on_trial_remove(tune_controller, trial)

    def debug_string(self) -> str:
        """For Ray Tune's console, which is off."""
        return self._scheduler.debug_string()


class Gate(Searcher):
    """Lets Ray Tune have a new trial only when it is its turn.

    Ray Tune starts whatever a searcher proposes; its own limit of concurrent trials counts paused
    ones. Trials that there are already pass, whatever they were doing: those of an earlier life of
    the sweep, and clones.
    """

    def __init__(self, searcher: Any, turns: Turns) -> None:
        super().__init__(metric=searcher.metric, mode=searcher.mode)
        self._searcher, self._turns = searcher, turns
        self.is_over = False
        """Whether Ray Tune was told that nothing more comes."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The searcher's proposal; None while there is no turn for one."""
        if not self._searcher.has_waiting:
            kind = self._turns.next_action().kind
            self.is_over = kind == "end"
            if kind != "start":
                return Searcher.FINISHED if self.is_over else None
        found: dict[str, Any] | str | None = self._searcher.suggest(trial_id)
        # Nothing left to propose: the next turn says whether that is the end.
        return None if found == Searcher.FINISHED else found

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Passed on."""
        self._searcher.on_trial_complete(trial_id, result, error)

    def __getstate__(self) -> dict[str, Any]:
        """As the scheduler's."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""

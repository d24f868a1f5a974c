"""Successive halving that pauses and promotes over the whole sweep.

A trial ends its job at every rung and is paused there. A free executor goes on with a paused trial
that is among the best of its rung, or else begins a new one (the promotion rule of L. Li et al.
2020, "A System for Massively Parallel Hyperparameter Tuning", algorithm 2); Ray's own ASHA is the
stopping rule instead: it decides once, when a trial arrives, and never looks back.

`decide` is a pure function of what the ledger says, so a sweep that was killed goes on with the
same decisions, and paused trials stay paused. It differs from the paper in two ways, both for small
sweeps: a rung has to hold `min_results` before the first promotion from it (by default new trials
go before promotions, since the number of trials is known), and when no result can arrive at a rung
any more, at least one of its trials is promoted, so that some trial is trained to the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.sweep import HalvingScheduler
from raytune_vlm.sweep.ledger import Ledger, TrialState


@dataclass(frozen=True)
class Rule:
    """What the decisions depend on besides the trials."""

    rungs: tuple[int, ...]
    """Steps at which trials are paused, in order; the last one is the end of a trial."""
    reduction_factor: float
    min_results: int
    """Results that the first rung has to hold before the first promotion from it; of the next rungs
    `reduction_factor` times fewer each."""
    num_trials: int
    num_executors: int
    metric: str
    mode: str

    @classmethod
    def of(cls, experiment: ExperimentConfig) -> Rule:
        """The rule of an experiment whose scheduler is `halving`."""
        sweep = experiment.sweep
        config = sweep.scheduler
        assert isinstance(config, HalvingScheduler)
        least = config.min_results
        if least is None:
            least = max(1, sweep.num_trials - sweep.at_once + 1)
        return cls(
            rungs=sweep.halving_rungs(experiment.train.max_steps),
            reduction_factor=config.reduction_factor,
            min_results=least,
            num_trials=sweep.num_trials,
            num_executors=sweep.at_once,
            metric=experiment.metric,
            mode=experiment.mode,
        )

    def target(self, state: TrialState) -> int:
        """The rung that a trial is allowed to reach."""
        return state.promoted_to or self.rungs[0]

    def is_paused(self, state: TrialState) -> bool:
        """Whether a trial waits at its rung."""
        target = self.target(state)
        return state.ended is None and target in state.scored and target < self.rungs[-1]

    def is_running(self, state: TrialState) -> bool:
        """Whether a trial has, or waits for, an executor."""
        return state.ended is None and not self.is_paused(state)


@dataclass(frozen=True)
class Action:
    """What a free executor does."""

    kind: Literal["promote", "start", "wait", "end"]
    """Go on with a paused trial; begin a new one; nothing for now; nothing ever again."""
    trial_id: str = ""
    """Which trial is promoted."""
    step: int = 0
    """The rung that it may train to."""


def decide(states: Collection[TrialState], rule: Rule) -> Action:
    """What to do next, from what the ledger says and from nothing else.

    Rungs are looked at from the top, so that a trial near its end is not kept waiting. A score that
    is not a number ranks last and is never promoted; among equal scores the earlier trial is first.
    """
    running = [state for state in states if rule.is_running(state)]
    if len(running) >= rule.num_executors:
        return Action("wait")
    is_complete = len(states) >= rule.num_trials
    promotable: list[Action] = []
    for place, (rung, above) in enumerate(pairwise(rule.rungs)):
        is_complete = is_complete and all(rule.target(state) != rung for state in running)
        chosen = _chosen(states, rule, place, is_complete)
        waiting = [state for state in chosen if rule.target(state) == rung and not state.ended]
        if waiting:
            promotable.append(Action("promote", waiting[0].trial_id, above))
            is_complete = False
    if promotable:
        return promotable[-1]
    if len(states) < rule.num_trials:
        return Action("start")
    return Action("wait") if running else Action("end")


def _chosen(
    states: Collection[TrialState], rule: Rule, place: int, is_complete: bool
) -> list[TrialState]:
    """The best 1 / reduction_factor of a rung, the best first; those gone on already are among
    them.

    A rung where no further result can arrive chooses one at least.
    """
    rung, sign = rule.rungs[place], 1 if rule.mode == "max" else -1
    there = [
        (sign * state.scored[rung][rule.metric], state) for state in states if rung in state.scored
    ]
    least = rule.min_results / rule.reduction_factor**place
    count = math.floor(len(there) / rule.reduction_factor) if len(there) >= least else 0
    if is_complete:
        count = max(1, math.floor(len(there) / rule.reduction_factor))
    numbers = [(value, state) for value, state in there if not math.isnan(value)]
    ranked = sorted(numbers, key=lambda entry: (-entry[0], entry[1].number))
    return [state for _, state in ranked[:count]]


class Halving(TrialScheduler):
    """`decide` as a Ray Tune scheduler.

    Every result at a rung pauses the trial; which one goes on is asked when Ray Tune next looks for
    work, after the callback has written the result to the ledger.

    Parameters
    ----------
    rule
        What decides.
    states
        The sweep's trials; the callback and the searcher keep them as the ledger is.
    ledger
        Where promotions are written before a trial goes on.
    is_exhausted
        Whether no new trial will come, before there are `rule.num_trials`.
    ends_trials
        Whether no trial shall go on past its rung.
    """

    def __init__(
        self,
        rule: Rule,
        states: Mapping[str, TrialState],
        ledger: Ledger,
        *,
        is_exhausted: Callable[[], bool] = lambda: False,
        ends_trials: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self.rule = rule
        self._is_exhausted, self._ends_trials = is_exhausted, ends_trials
        self._states, self._ledger = states, ledger
        self._trials: dict[str, Trial] = {}

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A new trial, or one of an earlier life of the sweep, which may be paused."""
        state = self._states[trial.config["trial_id"]]
        self._trials[state.trial_id] = trial
        trial.config["until"] = self.rule.target(state)
        if self.rule.is_paused(state):
            # Ray Tune starts whatever is pending without asking.
            trial.set_status(Trial.PAUSED)
            # Its results are looked for at the end, also if it never goes on.
            trial.init_local_path()

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Pause at the rung that the trial was allowed to reach; the end ends it by itself."""
        until = trial.config["until"]
        reached = result.get("step") == until and until < self.rule.rungs[-1]
        return TrialScheduler.PAUSE if reached else TrialScheduler.CONTINUE

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """The trial to promote, if it is a promotion's turn; at the end, stop those that wait."""
        action = self.next_action()
        if action.kind == "promote":
            state, trial = self._states[action.trial_id], self._trials.get(action.trial_id)
            if trial is None or trial.status != Trial.PAUSED:
                return None  # after a resume not known yet, or its proxy is still being let go
            state.promoted_to = action.step
            self._ledger.append("promoted", trial_id=state.trial_id, step=action.step)
            reported = sorted(state.scored)
            trial.set_config({**trial.config, "until": action.step, "reported": reported})
            return trial
        if action.kind == "end":
            for trial in self._trials.values():
                if trial.status == Trial.PAUSED:
                    tune_controller.stop_trial(trial)
        return None

    def next_action(self) -> Action:
        """What the ledger's trials ask for now; those that were never trained are none of them."""
        states = [state for state in self._states.values() if not state.untrained]
        if self._ends_trials():
            return Action("wait" if any(map(self.rule.is_running, states)) else "end")
        rule = replace(self.rule, num_trials=len(states)) if self._is_exhausted() else self.rule
        return decide(states, rule)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing here: the callback notes the failure."""

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Nothing here: the callback notes the end."""

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Nothing here: the callback notes the end."""

    def debug_string(self) -> str:
        """For Ray Tune's console, which is off."""
        return f"successive halving at {list(self.rule.rungs)}"

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles a snapshot of itself; the ledger is ours, so there is nothing to it."""
        return {}


class Gate(Searcher):
    """Lets Ray Tune have a new trial only when `decide` says so.

    Ray Tune starts whatever a searcher proposes; its own limit of concurrent trials counts paused
    ones. Trials of an earlier life of the sweep pass, whatever they were doing.
    """

    def __init__(self, searcher: Searcher, scheduler: Halving, num_known: int) -> None:
        super().__init__(metric=scheduler.rule.metric, mode=scheduler.rule.mode)
        self._searcher, self._scheduler = searcher, scheduler
        self._known_left = num_known

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The searcher's proposal; None while there is no turn for one."""
        if self._known_left:
            self._known_left -= 1
            return self._searcher.suggest(trial_id)
        kind = self._scheduler.next_action().kind
        if kind == "end":
            return Searcher.FINISHED
        return self._searcher.suggest(trial_id) if kind == "start" else None

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

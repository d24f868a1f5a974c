"""The search: Ray Tune over proxies, with Optuna proposing and a scheduler that pauses or stops."""

from __future__ import annotations

import math
import shutil
import signal
import tempfile
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.schedulers import (
    AshaScheduler,
    HalvingScheduler,
    MedianScheduler,
    PbtScheduler,
)
from raytune_vlm.records import TrialRecord, write_json
from raytune_vlm.report.formatting import recipe_value
from raytune_vlm.sweep.budget import planner_line
from raytune_vlm.sweep.closing import Closing, Limits, end_interrupted
from raytune_vlm.sweep.cluster import proxy_resources
from raytune_vlm.sweep.constraints import infeasible
from raytune_vlm.sweep.control import limits_by_hand, with_limits
from raytune_vlm.sweep.desk import Desk
from raytune_vlm.sweep.ledger import TrialState, events, num_ended
from raytune_vlm.sweep.population import Exploiting
from raytune_vlm.sweep.progress import Watcher
from raytune_vlm.sweep.proxy import Proxy
from raytune_vlm.sweep.runner import Session, interrupted
from raytune_vlm.sweep.scheduler import Halving, Rule
from raytune_vlm.sweep.searcher import OptunaSearcher
from raytune_vlm.sweep.turns import End, Gate, RayRule, Turns
from raytune_vlm.sweep.warm_start import warm_trials


def search(running: Session) -> None:
    """Run every trial that has not ended.

    Raises
    ------
    SweepInterrupted
        If it was stopped before all trials had ended.
    """
    states = running.states
    limits = limits_by_hand(events(running.folder.ledger_file))
    running.experiment = experiment = with_limits(running.experiment, limits)
    if num_left(running) <= 0 and all(state.ended is not None for state in states.values()):
        return
    closing = Closing(running)
    searcher = build_searcher(running, closing)
    if closing.ends_trials():
        end_interrupted(running, searcher.drop_interrupted(), "the sweep's budget was used up")
    for state in searcher.drop_interrupted(lambda state: state.leaves is not None):
        end_interrupted(running, [state], str(state.leaves), state.leaves)
        searcher.tell(state)
    turns = build_turns(running, searcher, closing)
    if not searcher.has_waiting and turns.next_action().kind == "end":
        return
    gate = Gate(searcher, turns)
    desk = Desk(running, searcher, turns, gate, closing)
    # What Ray Tune writes, nobody reads: the ledger has it all.
    scratch = tempfile.mkdtemp(prefix="raytune_vlm-")
    running.monitor.say(planner_line(experiment))
    running.monitor.say(
        f"sweep: {num_left(running)} trials of up to {experiment.train.max_steps} steps on "
        f"{_places(experiment)}, scored at {list(experiment.rungs)}"
    )
    tuner = tune.Tuner(
        tune.with_resources(Proxy, proxy_resources()),
        tune_config=tune.TuneConfig(
            search_alg=gate,
            scheduler=turns,
            num_samples=-1,  # the gate says when it is over
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=scratch,
            verbose=0,
            callbacks=[LedgerCallback(running, searcher, closing), desk],
            stop=Limits(closing, running, searcher.our_id),
            # Of proxies: those of executors are counted by the board.
            failure_config=tune.FailureConfig(max_failures=experiment.sweep.max_failures),
        ),
    )
    interrupting = signal.getsignal(signal.SIGINT)
    try:
        watcher = Watcher(
            running.monitor, running.board, experiment, states, lambda: num_planned(running)
        )
        with watcher:
            tuner.fit()
    finally:
        # Ray Tune leaves a handler of its own, which would swallow the first stop from here on.
        signal.signal(signal.SIGINT, interrupting)
        shutil.rmtree(scratch, ignore_errors=True)
    if any(state.ended is None for state in states.values()) or not searcher.is_done:
        raise interrupted(running.folder, num_ended(states), num_planned(running))
    desk.look()  # nobody shall wait for an answer that does not come


def num_planned(running: Session) -> int:
    """Trials of the sweep as it is planned now, with the clones that there are."""
    clones = sum(state.origin is not None for state in [*running.states.values()])
    return running.experiment.sweep.num_trials + clones


def num_left(running: Session) -> int:
    """Planned trials that have not ended."""
    return num_planned(running) - num_ended(running.states)


def build_turns(running: Session, searcher: OptunaSearcher, closing: Closing) -> Turns:
    """The sweep's scheduler."""
    experiment, states = running.experiment, running.states
    end = End(lambda: searcher.is_done, closing.ends_trials, closing.is_asked_for)
    if isinstance(experiment.sweep.scheduler, HalvingScheduler):
        return Halving(Rule.of(experiment), states, running.ledger, end)
    if isinstance(experiment.sweep.scheduler, PbtScheduler):
        return Exploiting(running, searcher, end)
    scheduler = build_scheduler(experiment, states)
    return RayRule(scheduler, states, experiment.sweep.at_once, end)


def _places(experiment: ExperimentConfig) -> str:
    sweep = experiment.sweep
    slots = f" of {sweep.slots} slots ({sweep.packing})" if sweep.slots != 1 else ""
    return f"{sweep.num_executors} executors{slots}"


def build_searcher(running: Session, closing: Closing) -> OptunaSearcher:
    """The searcher, told of the trials of this sweep and of others that it starts from."""
    experiment = running.experiment
    say = running.monitor.say
    warm = warm_trials(
        experiment,
        running.data.manifest.digest,
        running.ledger,
        running.folder.ledger_file,
        say,
    )
    for note in experiment.sweep.notes():
        say(f"sweep: {note}")
    return OptunaSearcher(
        experiment,
        running.ledger,
        running.states,
        running.folder.study_file,
        running.board,
        warm=warm,
        is_closed=closing.is_closed,
        close=closing.close,
        say=say,
    )


@dataclass(frozen=True)
class _Replayed:
    """Stands for a trial of an earlier life of the sweep when a scheduler is rebuilt."""

    trial_id: str


class MedianRule(MedianStoppingRule):
    """Ray's rule, with the results of an earlier life of a trial counted as its own."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        if not isinstance(trial, _Replayed):
            earlier = self._results.pop(_Replayed(trial.config["trial_id"]), None)
            if earlier is not None:
                self._results[trial] = earlier

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: Ray's own counts the last result twice, and fails where it has no score."""


def build_scheduler(experiment: ExperimentConfig, states: dict[str, TrialState]) -> TrialScheduler:
    """A rule of Ray's, told everything that the ledger says (Ray's own snapshot forgets rungs)."""
    config, metric, mode = experiment.sweep.scheduler, experiment.metric, experiment.mode
    if isinstance(config, AshaScheduler):
        scheduler: TrialScheduler = AsyncHyperBandScheduler(
            time_attr="step",
            metric=metric,
            mode=mode,
            max_t=experiment.train.max_steps,
            grace_period=config.grace_period,
            reduction_factor=config.reduction_factor,
        )
    elif isinstance(config, MedianScheduler):
        scheduler = MedianRule(
            time_attr="step",
            metric=metric,
            mode=mode,
            grace_period=config.grace_period,
            min_samples_required=config.min_samples_required,
            # It would pause a trial for others to catch up; executors are never idle for long.
            min_time_slice=math.inf,
        )
    else:
        return FIFOScheduler()
    for state in states.values():
        trial: Any = _Replayed(state.trial_id)
        controller: Any = None
        scheduler.on_trial_add(controller, trial)
        for step, scores in sorted(state.scored.items()):
            scheduler.on_trial_result(controller, trial, {"step": step, metric: scores[metric]})
    return scheduler


class LedgerCallback(tune.Callback):
    """Writes what happens to the ledger, stops executors of stopped trials, tells Optuna."""

    def __init__(self, running: Session, searcher: OptunaSearcher, closing: Closing) -> None:
        self._running = running
        self._searcher = searcher
        self._closing = closing
        self._experiment = running.experiment

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles a snapshot of itself; the ledger is ours, so there is nothing to it."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id = trial.config["trial_id"]
        self._running.ledger.append("started", trial_id=trial_id)
        self._closing.started(self._running.states[trial_id])
        recipe = self._running.states[trial_id].recipe
        values = ", ".join(f"{key}={recipe_value(value)}" for key, value in recipe.items())
        self._running.monitor.say(f"{trial_id} started: {values}")

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        trial_id = trial.config["trial_id"]
        state = self._running.states[trial_id]
        for note in result.get("notes", ()):
            self._running.ledger.append("noted", trial_id=trial_id, message=note)
            self._running.monitor.say(f"{trial_id}: {note}")
        if "failed" in result:
            state.message = f"{result['failed']}: {result['message']}"
        if "step" not in result:
            return
        step = int(result["step"])
        scores = {name: float(result[name]) for name in self._experiment.evaluation.metrics}
        if step in state.scored:
            return
        state.scored[step] = scores
        costs = state.costs[step] = self._closing.costs(trial_id, result)
        self._running.ledger.append(
            "scored", trial_id=trial_id, step=step, scores=scores, costs=costs
        )
        if step == trial.config.get("until") and step < self._experiment.train.max_steps:
            self._running.ledger.append("paused", trial_id=trial_id, step=step)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        self._running.monitor.say(f"{trial_id} step {step}: {shown}")
        self._closing.scored(state, step)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        trial_id, note = trial.config["trial_id"], "its proxy died; another one is started"
        self._running.ledger.append("noted", trial_id=trial_id, message=note)
        self._running.monitor.say(f"{trial_id}: {note}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._end(trial.config["trial_id"])
        # Ray Tune keeps every trial, with means and windows of each number in its results.
        kept = trial.run_metadata
        kept.last_result.pop("config", None)
        kept.metric_analysis, kept.metric_n_steps = {}, {}

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        state = self._running.states[trial.config["trial_id"]]
        state.message = state.message or "infrastructure: the trial's proxy died"
        self._end(state.trial_id)

    def _end(self, trial_id: str) -> None:
        state = self._running.states[trial_id]
        if state.ended is not None:
            return
        ray.get(self._running.board.stop.remote(trial_id))
        last = max(state.scored, default=0)
        if state.message is not None:
            state.ended = "failed"
        else:
            complete = last >= self._experiment.train.max_steps
            state.ended = "finished" if complete else "stopped"
            if not complete:
                state.message = state.leaves
        above = infeasible(self._experiment, state)
        verdict = {"infeasible": above} if above else {}
        self._running.ledger.append(
            state.ended, trial_id=trial_id, step=last, message=state.message, **verdict
        )
        trial = self._running.folder.trial(trial_id)
        if not trial.record_file.exists():  # no executor had it yet
            record = TrialRecord(
                trial_id,
                state.number,
                state.recipe,
                state.ended,
                max_steps=self._experiment.train.max_steps,
                failure=state.message if state.ended == "failed" else None,
                origin=state.origin,
            )
            write_json(trial.record_file, record)
        self._searcher.tell(state)
        if above:
            self._running.monitor.say(f"{trial_id} cannot win: {above}")
        self._closing.ended(state)
        if state.ended != "finished":
            self._running.monitor.say(
                f"{trial_id} {state.ended} at step {last}"
                + (f": {state.message}" if state.message else "")
            )

"""When a search ends before `num_trials`: its budget is used up, or nothing is left to decide."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import ray
from ray import tune

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.evaluate.matrix import read_matrix
from raytune_vlm.evaluate.metrics import METRICS
from raytune_vlm.evaluate.statistics import indistinguishable
from raytune_vlm.records import write_json
from raytune_vlm.sweep.budget import Budget, expected_steps
from raytune_vlm.sweep.constraints import broken, infeasible
from raytune_vlm.sweep.control import ending_of
from raytune_vlm.sweep.ledger import TrialState, events
from raytune_vlm.sweep.runner import Session


class Closing:
    """Watches what a search has used up and what it has found.

    A search that was closed stays closed when it is resumed: the ledger says so.
    """

    def __init__(self, running: Session) -> None:
        self._running = running
        rows = events(running.folder.ledger_file)
        closed = [kind for row in rows if (kind := ending_of(row)) is not None]
        self._kind: str | None = closed[-1] if closed else None
        self._compared = {r["trial_id"]: r["same"] for r in rows if r["event"] == "compared"}
        """Ended trial -> the contenders then, in order."""
        self._budget = Budget(self._experiment, rows)
        self._earlier: dict[str, float] = {}
        """Trial -> seconds of training before its present job."""
        self._started: dict[str, float] = {}
        self._planned = False
        ended = [state for state in running.states.values() if state.ended_at]
        if ended:  # killed between a trial's end and what follows from it
            self.ended(max(ended, key=lambda state: state.ended_at))

    @property
    def _experiment(self) -> ExperimentConfig:
        return self._running.experiment

    def set_limits(self, experiment: ExperimentConfig) -> None:
        """Limits of the sweep were changed by hand."""
        self._budget.experiment = experiment

    def is_closed(self) -> bool:
        """Whether no new trials shall be started; says why when that begins."""
        if self._kind is None and (reason := self._budget.used_up()):
            self.close("budget", reason)
        return self._kind is not None

    def ends_trials(self) -> bool:
        """Whether running trials shall end at their next rung."""
        return self.is_closed() and self._kind == "budget"

    def is_asked_for(self) -> bool:
        """Whether the end is near enough that trials paused by hand are not waited for."""
        return self.is_closed() and self._kind in ("budget", "drained")

    @property
    def kind(self) -> str | None:
        """Which end has begun, if any."""
        return self._kind

    def close(self, kind: str, reason: str) -> None:
        """No new trials from now on."""
        self._kind = kind
        ended = " and running ones end at their next rung" if kind == "budget" else ""
        self._running.ledger.append("closed", kind=kind, message=reason)
        self._running.monitor.say(f"sweep: no new trials{ended}: {reason}")

    def costs(self, trial_id: str, result: dict[str, Any]) -> dict[str, float]:
        """The costs in a report, with the time that the trial took in earlier jobs."""
        costs = dict(result.get("costs", {}))
        if "train_seconds" in costs:
            costs["train_seconds"] += self._earlier.get(trial_id, 0.0)
        return costs

    def started(self, state: TrialState) -> None:
        """A trial starts, or goes on after a pause or a resume."""
        if state.costs:
            last = state.costs[max(state.costs)]
            self._earlier[state.trial_id] = last.get("train_seconds", 0.0)
        if not state.scored and state.origin is None:
            self._started[state.trial_id] = time.monotonic()

    def scored(self, state: TrialState, step: int) -> None:
        """A trial reached a rung; the first time it is said what is left."""
        began = self._started.get(state.trial_id)
        if self._planned or began is None:
            return
        self._planned = True
        each = (time.monotonic() - began) / step
        states = self._running.states.values()
        done = sum(max(entry.scored, default=0) for entry in states)
        whole = self._experiment.sweep.num_trials * expected_steps(self._experiment)
        left = self._budget.left(each, max(0.0, whole - done))
        self._running.monitor.say(
            f"planner: {each:.3g} s a step with scoring at the first rung: {left}"
        )

    def ended(self, state: TrialState) -> None:
        """A trial has ended: are those that cannot be told from the best still the same?

        A trial that failed says nothing of that.
        """
        stable = self._experiment.sweep.stop_when_stable
        if stable is None or self._kind is not None or state.ended == "failed":
            return
        if state.trial_id not in self._compared:
            same = contenders(self._running)
            self._compared[state.trial_id] = same
            self._running.ledger.append("compared", trial_id=state.trial_id, same=same)
        last = [*self._compared.values()][-stable.trials - 1 :]
        same = last[-1]
        if same and len(last) > stable.trials and all(entry == same for entry in last):
            self.close(
                "stable",
                f"over the last {stable.trials} ended trials the {len(same)} that cannot be told "
                f"from the best stayed the same: {', '.join(same)}",
            )


def contenders(running: Session) -> list[str]:
    """The trials that cannot be told from the best one on `select`, by number.

    As when the winner is chosen, trials still in training count with what they have reached, and
    scores on a part of `select` only as long as there is none on more of it.
    """
    experiment = running.experiment
    metric, sign = experiment.metric, 1 if experiment.mode == "max" else -1
    scores = [
        (experiment.select_share(step), sign * values[metric], state.trial_id, step)
        for state in running.states.values()
        if state.ended != "failed" and infeasible(experiment, state) is None
        for step, values in sorted(state.scored.items())
        if math.isfinite(values[metric])
    ]
    most = max((share for share, *_ in scores), default=1.0)
    best: dict[str, tuple[float, int]] = {}
    for share, value, trial_id, step in scores:
        if share == most and (trial_id not in best or value > best[trial_id][0]):
            best[trial_id] = (value, step)
    if not best:
        return []
    ids = list(best)
    files = [
        running.folder.trial(name).evaluation("select", best[name][1]) / "predictions.parquet"
        for name in ids
    ]
    values, weights, groups, _ = read_matrix(files, metric)
    places = indistinguishable(
        values,
        weights,
        groups,
        winner=max(range(len(ids)), key=lambda place: best[ids[place]][0]),
        mode="max" if experiment.mode == "max" else "min",
        confidence=experiment.evaluation.confidence,
        num_bootstrap=experiment.evaluation.num_bootstrap,
        seed=experiment.seed,
        combine=METRICS[metric].combine,
    )
    return sorted(ids[place] for place in places)


class Limits(tune.Stopper):
    """Stops a trial at a rung when the budget is used up, or when it is above a measured limit."""

    def __init__(self, closing: Closing, running: Session, ids: Any) -> None:
        self._closing, self._running, self._ids = closing, running, ids

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        costs = self._closing.costs(self._ids(trial_id), result)
        above = broken(self._running.experiment, costs, "measured")
        return above is not None or self._closing.ends_trials()

    def stop_all(self) -> bool:
        """Never: running trials reach their next rung."""
        return False

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles a snapshot of itself; the ledger is ours, so there is nothing to it."""
        return {}


def end_interrupted(
    running: Session, trials: list[TrialState], message: str, note: str | None = None
) -> None:
    """End trials that an earlier life of the sweep left running; `note` is for the ledger."""
    for state in trials:
        state.ended, state.message = "stopped", note
        last = max(state.scored, default=0)
        running.ledger.append("stopped", trial_id=state.trial_id, step=last, message=note)
        trial = running.folder.trial(state.trial_id)
        if trial.record_file.exists():
            write_json(trial.record_file, replace(trial.record(), status="stopped"))
        ray.get(running.board.stop.remote(state.trial_id))
        running.monitor.say(f"{state.trial_id} stopped at step {last}: {message}")

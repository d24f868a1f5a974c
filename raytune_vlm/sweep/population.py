"""Population based training: at every rung the worst trials are replaced by clones of the best.

Jaderberg et al. 2017 (arXiv 1711.09846), with truncation selection: of a population the worst
`quantile` are replaced, each by a clone of one of the best `quantile` ("exploit"), whose learning
rate is the parent's times one of `factors` ("explore"). A clone goes on from its parent's whole
checkpoint: adapter, optimizer, random state and place in the data are the parent's, so that two
clones differ by the changed values alone; no two of a rung are the same while there are others.

It is synchronous: every trial is paused at a rung until all have come so far, so that what is
decided does not depend on who was faster. The decision is a pure function of what the ledger says,
and is one event there, `exploited`, written before anything is done.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.schedulers import PbtScheduler
from raytune_vlm.errors import CheckpointError
from raytune_vlm.report.formatting import recipe_value
from raytune_vlm.sweep.constraints import infeasible
from raytune_vlm.sweep.ledger import TrialState, apply_exploits, events, trial_name
from raytune_vlm.sweep.turns import Action, End, Pausing, Rungs

if TYPE_CHECKING:
    from raytune_vlm.sweep.runner import Session
    from raytune_vlm.sweep.searcher import OptunaSearcher


@dataclass(frozen=True)
class Population(Rungs):
    """What the decisions depend on besides the trials."""

    num_trials: int
    """Trials that the searcher proposes; nothing is compared before all have begun."""
    at_once: int
    metric: str
    mode: str
    seed: int
    config: PbtScheduler
    ranges: Mapping[str, tuple[float, float]]
    """Perturbed key -> its least and largest value."""
    is_feasible: Callable[[TrialState], bool] = lambda state: True
    """Whether a trial keeps the constraints, so that it may be a parent."""
    waits_for_held: bool = True
    """Whether a trial that is paused by hand is waited for."""

    @classmethod
    def of(cls, experiment: ExperimentConfig) -> Population:
        """The population of an experiment whose scheduler is `pbt`."""
        sweep, config = experiment.sweep, experiment.sweep.scheduler
        assert isinstance(config, PbtScheduler)
        spaces: dict[str, Any] = {key: sweep.search_space[key] for key in config.perturbed}
        return cls(
            rungs=sweep.scheduler_rungs(experiment.train.max_steps),
            num_trials=sweep.num_trials,
            at_once=sweep.at_once,
            metric=experiment.metric,
            mode=experiment.mode,
            seed=experiment.seed,
            config=config,
            ranges={key: (space.lower, space.upper) for key, space in spaces.items()},
            is_feasible=lambda state: infeasible(experiment, state) is None,
        )

    def due(self, states: Collection[TrialState], decided: int) -> int | None:
        """The rung after `decided` (the last that was compared), if all have come so far."""
        rung = next((rung for rung in self.rungs[:-1] if rung > decided), None)
        if rung is None or sum(state.origin is None for state in states) < self.num_trials:
            return None
        there = self._members(states, rung)
        is_awaited = any(
            rung not in state.scored
            and state.ended is None
            and (self.waits_for_held or not state.held)
            for state in there
        )
        is_alive = any(rung in state.scored and state.ended is None for state in there)
        return rung if is_alive and not is_awaited else None

    def decide(self, states: Collection[TrialState], decided: int) -> Action:
        """What a free executor does next.

        Trials go on past the rungs up to `decided`: those that are behind the others first, which
        are clones that a person made, then by number.
        """
        running = [state for state in states if self.is_running(state)]
        if len(running) >= self.at_once:
            return Action("wait")
        waiting = [
            state
            for state in states
            if self.is_paused(state)
            and not state.held
            and state.replaced_by is None
            and self.target(state) <= decided
        ]
        if waiting:
            first = min(waiting, key=lambda state: (self.target(state), state.number))
            return Action("promote", first.trial_id, self.above(first))
        if sum(state.origin is None for state in states) < self.num_trials:
            return Action("start")
        return Action("wait" if running or self.due(states, decided) is not None else "end")

    def exploits(
        self,
        states: Collection[TrialState],
        rung: int,
        number: int,
        is_whole: Callable[[TrialState], bool] = lambda state: True,
    ) -> list[dict[str, Any]]:
        """Who is replaced at a rung, and by which clone, as the ledger has it.

        Trials that failed or ended before it, that have no number for a score, or that break a
        constraint are all replaced, and count as the worst. Of the others a pinned one is not, nor
        is a parent. Among equal scores the earlier trial is the better. Without a parent nobody is
        replaced.

        Parameters
        ----------
        number
            Of the first clone.
        is_whole
            Whether the checkpoint of a parent is there.
        """
        there = self._members(states, rung)
        ranked = self._ranked(there, rung)
        count = self.config.num_replaced(len(there))
        best = ranked[:count]
        known = {state.trial_id for state in ranked}
        lost = [state for state in there if state.trial_id not in known]
        lost = [state for state in lost if state.ended is not None or not state.pinned]
        worst = [state for state in reversed(ranked[count:]) if not state.pinned]
        replaced = [*lost, *worst[: max(0, count - len(lost))]]
        options = [
            (parent, recipe)
            for parent in best
            if is_whole(parent)
            for recipe in self._perturbed(parent.recipe)
        ]
        if not options:
            return []
        random.Random(f"{self.seed}/{rung}").shuffle(options)
        return [
            {"replaces": state.trial_id, "clone": _clone(parent, recipe, rung, number + place)}
            for place, (state, (parent, recipe)) in enumerate(
                zip(replaced, itertools.cycle(options), strict=False)
            )
        ]

    def _members(self, states: Collection[TrialState], rung: int) -> list[TrialState]:
        """The population that is compared at a rung, by number."""
        found = [
            state
            for state in states
            if state.replaced_by is None and (state.origin is None or state.origin["step"] < rung)
        ]
        return sorted(found, key=lambda state: state.number)

    def _ranked(self, there: Collection[TrialState], rung: int) -> list[TrialState]:
        """Those that may go on, the best first."""
        sign = 1 if self.mode == "max" else -1
        able = [
            state
            for state in there
            if state.ended is None
            and not math.isnan(state.scored.get(rung, {}).get(self.metric, math.nan))
            and self.is_feasible(state)
        ]
        return sorted(
            able, key=lambda state: (-sign * state.scored[rung][self.metric], state.number)
        )

    def _perturbed(self, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Every recipe of a clone: each key times each factor, but for what changes nothing."""
        listed = []
        for key, (lower, upper) in self.ranges.items():
            near = [float(f"{recipe[key] * factor:.6g}") for factor in self.config.factors]
            values = dict.fromkeys(min(max(value, lower), upper) for value in near)
            listed.append([value for value in values if value != recipe[key]])
        return [
            {**recipe, **dict(zip(self.ranges, values, strict=True))}
            for values in itertools.product(*listed)
        ]


def _clone(parent: TrialState, recipe: dict[str, Any], rung: int, number: int) -> dict[str, Any]:
    return {
        "trial_id": trial_name(number),
        "number": number,
        "recipe": recipe,
        "origin": {"parent": parent.trial_id, "step": rung, "recipe": parent.recipe},
        "promoted_to": rung,
        "predicted": parent.predicted,
    }


class Exploiting(Pausing[Population]):
    """`Population` as a Ray Tune scheduler: it also makes the clones.

    Raises
    ------
    CheckpointError
        If what an earlier life of the sweep decided cannot be done any more.
    """

    def __init__(self, running: Session, searcher: OptunaSearcher, end: End) -> None:
        super().__init__(Population.of(running.experiment), running.states, running.ledger, end)
        self._running, self._searcher = running, searcher
        rows = [r for r in events(running.folder.ledger_file) if r["event"] == "exploited"]
        self.decided = max((int(row["step"]) for row in rows), default=0)
        """The last rung at which the population was compared."""
        for state in running.states.values():
            self._furnish(state)  # killed before this was done

    def set_limits(self, experiment: ExperimentConfig) -> None:
        """`sweep.num_trials` was changed by hand."""
        self.rule = Population.of(experiment)

    def next_by_rule(self) -> Action:
        """What the population says."""
        states = self.trained()
        return self._rule(states).decide(states, self.decided)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """As for every rule, once the population was compared where that is due."""
        states = self.trained()
        rung = self._rule(states).due(states, self.decided)
        if rung is not None and not self._end.ends_trials():
            self._exploit(states, rung)
        return super().choose_trial_to_run(tune_controller)

    def _rule(self, states: Collection[TrialState]) -> Population:
        """The rule; without new trials as if those that there are had been planned."""
        rule = self.rule
        if self._end.is_exhausted():
            rule = replace(rule, num_trials=0)
        return replace(rule, waits_for_held=not self._end.is_asked_for())

    def _exploit(self, states: Collection[TrialState], rung: int) -> None:
        """Decide, write it to the ledger, then do it."""
        known, monitor = self._running.states, self._running.monitor
        found = self._rule(states).exploits(states, rung, len(known), self._is_whole(rung))
        row = {"step": rung, "exploits": found}
        seq = self._running.ledger.append("exploited", **row)
        apply_exploits(known, {"seq": seq, **row})
        self.decided = rung
        if not found:
            monitor.say(f"population at step {rung}: no trial is replaced")
        for entry in found:
            clone = known[entry["clone"]["trial_id"]]
            self._furnish(clone)
            self._searcher.add(clone)
            changed = ", ".join(
                f"{key}={recipe_value(clone.recipe[key])}" for key in self.rule.ranges
            )
            monitor.say(
                f"population at step {rung}: {entry['replaces']} is replaced by {clone.trial_id}, "
                f"a clone of {entry['clone']['origin']['parent']} with {changed}"
            )

    def _is_whole(self, rung: int) -> Callable[[TrialState], bool]:
        from raytune_vlm.train.checkpoint import verify

        def is_whole(state: TrialState) -> bool:
            try:
                verify(self._running.folder.trial(state.trial_id).checkpoint(rung))
            except CheckpointError as error:
                self._running.monitor.say(f"{state.trial_id} is no parent: {error.message}")
                return False
            return True

        return is_whole

    def _furnish(self, state: TrialState) -> None:
        """Give a clone that was not trained yet its parent's checkpoint."""
        origin = state.origin
        if origin is None or state.ended is not None or state.promoted_to != origin["step"]:
            return
        step, folder = origin["step"], self._running.folder
        target = folder.trial(state.trial_id).checkpoint(step)
        if not target.exists():
            from raytune_vlm.train.checkpoint import adopt

            own = self._running.experiment.with_recipe(state.recipe)
            adopt(folder.trial(origin["parent"]).checkpoint(step), target, own)

    def debug_string(self) -> str:
        """For Ray Tune's console, which is off."""
        return f"population based training at {list(self.rule.rungs)}"

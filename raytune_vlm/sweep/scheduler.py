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

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.schedulers import HalvingScheduler
from raytune_vlm.sweep.ledger import TrialState
from raytune_vlm.sweep.turns import Action, Pausing, Rungs


@dataclass(frozen=True)
class Rule(Rungs):
    """What the decisions depend on besides the trials."""

    reduction_factor: float
    min_results: int
    """Results that the first rung has to hold before the first promotion from it; of the next rungs
    `reduction_factor` times fewer each."""
    num_trials: int
    at_once: int
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
            rungs=sweep.scheduler_rungs(experiment.train.max_steps),
            reduction_factor=config.reduction_factor,
            min_results=least,
            num_trials=sweep.num_trials,
            at_once=sweep.at_once,
            metric=experiment.metric,
            mode=experiment.mode,
        )


def decide(states: Collection[TrialState], rule: Rule) -> Action:
    """What to do next, from what the ledger says and from nothing else.

    Rungs are looked at from the top, so that a trial near its end is not kept waiting. A score that
    is not a number ranks last and is never promoted; among equal scores the earlier trial is first.

    By hand: a pinned trial goes on before all others, whatever its score. One that is paused keeps
    its place among the best of its rung, but is not promoted.
    """
    # No more than matter, and the newest first: where executors are busy, it is mostly they.
    newest = (state for state in reversed([*states]) if rule.is_running(state))
    running = list(itertools.islice(newest, rule.at_once))
    if len(running) >= rule.at_once:
        return Action("wait")
    for state in states:
        if state.pinned and not state.held and rule.is_paused(state):
            return Action("promote", state.trial_id, rule.above(state))
    is_complete = len(states) >= rule.num_trials
    promotable: list[Action] = []
    for place, (rung, above) in enumerate(itertools.pairwise(rule.rungs)):
        is_complete = is_complete and all(rule.target(state) != rung for state in running)
        chosen = _chosen(states, rule, place, is_complete)
        waiting = [
            state
            for state in chosen
            if rule.target(state) == rung and not state.ended and not state.held
        ]
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
    if count == 0:
        return []
    numbers = [(value, state) for value, state in there if not math.isnan(value)]
    ranked = sorted(numbers, key=lambda entry: (-entry[0], entry[1].number))
    return [state for _, state in ranked[:count]]


class Halving(Pausing[Rule]):
    """`decide` as a Ray Tune scheduler."""

    def set_limits(self, experiment: ExperimentConfig) -> None:
        """`sweep.num_trials` was changed by hand."""
        self.rule = Rule.of(experiment)

    def next_by_rule(self) -> Action:
        """What `decide` says; without new trials as if all there are had been planned."""
        states = self.trained()
        num_clones = sum(state.origin is not None for state in states)
        number = self.rule.num_trials + num_clones
        if self._end.is_exhausted():
            number = len(states)
        return decide(states, replace(self.rule, num_trials=number))

    def debug_string(self) -> str:
        """For Ray Tune's console, which is off."""
        return f"successive halving at {list(self.rule.rungs)}"

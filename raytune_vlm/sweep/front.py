"""The Pareto front of a sweep with several objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.sweep.constraints import infeasible
from raytune_vlm.sweep.ledger import TrialState


def pareto_front(points: Sequence[Mapping[str, float]], modes: Mapping[str, str]) -> list[int]:
    """The places of the points that no other one beats, best in the first objective first.

    A point is beaten by one that is at least as good in every objective and better in one; equal
    points are both in the front. A point with a value that is not a number is not.
    """
    signs = {name: 1 if mode == "max" else -1 for name, mode in modes.items()}
    rows = [[sign * point.get(name, math.nan) for name, sign in signs.items()] for point in points]
    valid = [place for place, row in enumerate(rows) if all(map(math.isfinite, row))]
    front = [
        place
        for place in valid
        if not any(
            rows[other] != rows[place]
            and all(a >= b for a, b in zip(rows[other], rows[place], strict=True))
            for other in valid
        )
    ]
    return sorted(front, key=lambda place: [-value for value in rows[place]])


def front_of(
    experiment: ExperimentConfig, states: Mapping[str, TrialState]
) -> list[dict[str, Any]]:
    """The front over the trials that may win, each at its best rung of the first objective;
    empty with one objective. Rows hold `trial_id`, `step` and a value for each objective."""
    objectives = experiment.objectives
    if len(objectives) == 1:
        return []
    sign = 1 if experiment.mode == "max" else -1
    rows: list[dict[str, Any]] = []
    for state in states.values():
        if state.ended == "failed" or not state.scored or infeasible(experiment, state):
            continue
        step = max(state.scored, key=lambda at: (sign * state.scored[at][experiment.metric], -at))
        known = {**state.predicted, **state.costs.get(step, {}), **state.scored[step]}
        values = {name: known.get(name, math.nan) for name in objectives}
        rows.append({"trial_id": state.trial_id, "step": step, **values})
    return [rows[place] for place in pareto_front(rows, objectives)]


def besides(experiment: ExperimentConfig, states: Mapping[str, TrialState]) -> dict[str, Any]:
    """What `SweepResult` says besides the winner: objectives, front, trials that may not win."""
    reasons = {
        trial_id: state.message if state.untrained else infeasible(experiment, state)
        for trial_id, state in states.items()
    }
    return {
        "objectives": experiment.objectives if len(experiment.objectives) > 1 else {},
        "front": front_of(experiment, states),
        "infeasible": {trial_id: reason for trial_id, reason in reasons.items() if reason},
    }

"""Trials of earlier sweeps, for the searcher to learn from (`sweep.warm_start`).

They are read from the ledger and `experiment.json` of a sweep folder, which are JSON: nothing of
it is run. What was taken is written to the ledger of the new sweep, so that it resumes without
those folders.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState as OptunaState
from pydantic import ValidationError

from raytune_vlm.config.distributions import active_keys
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.search_space import searchable_keys
from raytune_vlm.errors import CheckpointError, ConfigError
from raytune_vlm.monitor import Say
from raytune_vlm.records import SweepFolder
from raytune_vlm.sweep.constraints import excess
from raytune_vlm.sweep.head import experiment_in, read_head
from raytune_vlm.sweep.ledger import Ledger, TrialState, events, replay


@dataclass(frozen=True)
class WarmTrial:
    """A trial of another sweep, as the study of this one shall see it."""

    sweep: str
    trial_id: str
    recipe: dict[str, Any]
    finished: bool
    scored: dict[int, float]
    """Step -> the deciding metric."""
    values: list[float]
    """The objectives at the last step."""
    constraints: dict[str, float]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> WarmTrial:
        """From a row of the ledger, where steps are text."""
        scored = {int(step): score for step, score in value["scored"].items()}
        return cls(**{**value, "scored": scored})

    def frozen(
        self, known: Mapping[str, BaseDistribution], objectives: Mapping[str, str]
    ) -> optuna.trial.FrozenTrial:
        """The trial for Optuna, marked as one of another sweep."""
        alone = len(objectives) == 1
        return optuna.trial.create_trial(
            state=OptunaState.COMPLETE if self.finished else OptunaState.PRUNED,
            values=self.values if self.finished else None,
            params=self.recipe,
            distributions={key: known[key] for key in self.recipe},
            intermediate_values=self.scored if alone else None,
            user_attrs={
                "trial": self.trial_id,
                "sweep": self.sweep,
                "status": "finished" if self.finished else "stopped",
                "steps": max(self.scored),
            },
            constraints=self.constraints,
        )


def warm_trials(
    experiment: ExperimentConfig, data_digest: str, ledger: Ledger, ledger_file: Path, say: Say
) -> list[WarmTrial]:
    """What earlier sweeps tell: from this sweep's ledger, or from their folders if it is new.

    Raises
    ------
    ConfigError
        If a folder holds no sweep, or one that cannot be compared with this one.
    """
    if not experiment.sweep.warm_start:
        return []
    for row in events(ledger_file):
        if row["event"] == "warm_started":
            return [WarmTrial.from_json(entry) for entry in row["trials"]]
    found: list[WarmTrial] = []
    for place in experiment.sweep.warm_start:
        taken, left_out = read_sweep(experiment, data_digest, Path(place))
        found += taken
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        say(
            f"warm start: {len(taken)} trials of {place}"
            + (f"; {sum(left_out.values())} left out: {reasons}" if left_out else "")
        )
    ledger.append("warm_started", trials=[asdict(entry) for entry in found])
    return found


def check_warm_start(experiment: ExperimentConfig, data_digest: str | None = None) -> None:
    """Raise ConfigError for a sweep that this one cannot start from, or that teaches it nothing.

    Asked before anything starts, and again when the digest of the data is known.
    """
    for place in experiment.sweep.warm_start:
        taken, left_out = read_sweep(experiment, data_digest, Path(place))
        if not taken:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            raise ConfigError(
                f"sweep.warm_start: no trial of {place} fits this sweep: {reasons or 'it has none'}"
            )


def read_sweep(
    experiment: ExperimentConfig, data_digest: str | None, root: Path
) -> tuple[list[WarmTrial], Counter[str]]:
    """The trials of a sweep folder that fit, and why how many others do not.

    `data_digest`: of this sweep's data; None where that is not known yet.

    Raises
    ------
    ConfigError
        If it holds no sweep of this version, a damaged one, or one on another metric, or on other
        data or another base model without `sweep.warm_start_across_data`.
    """
    folder = SweepFolder(root)
    try:
        data, other = read_head(folder, "data")["data"], experiment_in(folder)
        states = replay(folder.ledger_file)
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"sweep.warm_start: {error.message}") from None
    _check_fits(experiment, other, root, data, data_digest or data)
    taken: list[WarmTrial] = []
    left_out: Counter[str] = Counter()
    for state in states.values():
        fitted = _fitted(experiment, other, state)
        if isinstance(fitted, str):
            left_out[fitted] += 1
        else:
            taken.append(fitted)
    return taken, left_out


def _check_fits(
    experiment: ExperimentConfig, other: ExperimentConfig, root: Path, data: str, own_data: str
) -> None:
    if other.metric != experiment.metric:
        raise ConfigError(
            f"sweep.warm_start: {root} was decided by {other.metric}, this sweep is by "
            f"{experiment.metric}: scores of different metrics cannot be compared"
        )
    if experiment.sweep.warm_start_across_data:
        return
    names = [(e.model.name, e.model.revision) for e in (other, experiment)]
    for what, before, now in (("base model", *map(_model, names)), ("data", data, own_data)):
        if before != now:
            raise ConfigError(
                f"sweep.warm_start: {root} has another {what} ({before}, here {now}); "
                "sweep.warm_start_across_data=true takes it all the same"
            )


def _model(name: tuple[str, str | None]) -> str:
    return name[0] if name[1] is None else f"{name[0]}@{name[1]}"


def _fitted(
    experiment: ExperimentConfig, other: ExperimentConfig, state: TrialState
) -> WarmTrial | str:
    """The trial as one of this sweep, or why it is none."""
    steps = experiment.train.max_steps
    scored = {
        step: scores[experiment.metric]
        for step, scores in sorted(state.scored.items())
        if step <= steps and math.isfinite(scores.get(experiment.metric, math.nan))
    }
    if state.ended is None:
        return "not ended"
    if state.origin is not None:
        return "made as a clone, whose recipe alone does not give its score"
    if state.ended == "failed" or not scored:
        return "without a score"
    try:
        space, recipe = experiment.sweep.search_space, other.with_recipe(state.recipe)
    except (ValidationError, KeyError, TypeError):
        return "with a recipe that its own experiment does not allow"
    active = active_keys(space, {key: attrgetter(key)(recipe) for key in space})
    for key in searchable_keys():
        value = attrgetter(key)(recipe)
        if key in active and not space[key].contains(value):
            return f"with another {key} than this space has"
        if key not in active and value != attrgetter(key)(experiment):
            return f"with another {key} than the experiment"
    last = max(scored)
    costs = {**state.predicted, **state.costs.get(last, {})}
    known = {**costs, **state.scored[last]}
    values = [float(known.get(name, math.nan)) for name in experiment.objectives]
    above = excess(experiment, costs)
    if not all(map(math.isfinite, values)):
        return "without one of the objectives"
    if len(above) < len(experiment.sweep.constraints.limits()):
        return "without a cost that is limited here"
    name = other.name
    return WarmTrial(name, state.trial_id, active, last == steps, scored, values, above)

"""Limits on what a trial may cost: predicted before it starts, measured while it runs."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

from raytune_vlm.config.distributions import branches
from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.config.objectives import LIMIT_KEYS
from raytune_vlm.errors import ConfigError
from raytune_vlm.sweep.ledger import TrialState

MOST_CORNERS = 64
"""Corners of a space of which it is asked whether any of them keeps the constraints."""

PREDICTED = ("trainable_parameters", "peak_memory_gb")
"""Costs that are known before a trial starts."""


def violations(experiment: ExperimentConfig, state: TrialState) -> dict[str, float]:
    """Limited cost -> by which share of the limit a trial is above it, negative where below.

    What was measured at the last rung counts, else what was predicted; a cost of which neither is
    known is left out.
    """
    known = {**state.predicted, **state.costs.get(max(state.costs, default=0), {})}
    return excess(experiment, known)


def excess(experiment: ExperimentConfig, costs: dict[str, float]) -> dict[str, float]:
    """The same of given costs."""
    limits = experiment.sweep.constraints.limits()
    return {name: costs[name] / limit - 1 for name, limit in limits.items() if name in costs}


def broken(experiment: ExperimentConfig, costs: dict[str, float], how: str) -> str | None:
    """Which limits costs are above, in words; None if none."""
    limits = experiment.sweep.constraints.limits()
    parts = [
        f"{how} {name} {_shown(name, costs[name])} > "
        f"{LIMIT_KEYS[name]}={_shown(name, limits[name])}"
        for name, share in excess(experiment, costs).items()
        if share > 0
    ]
    return ", ".join(parts) or None


def infeasible(experiment: ExperimentConfig, state: TrialState) -> str | None:
    """Which limits a trial breaks, in words; None if it may win."""
    measured = state.costs.get(max(state.costs, default=0), {})
    how = "measured" if measured else "predicted"
    return broken(experiment, {**state.predicted, **measured}, how)


def _shown(name: str, value: float) -> str:
    return f"{value:,.0f}" if name == "trainable_parameters" else f"{value:.3g}"


class Predictor:
    """Predicts what recipes cost; the same adapter and batch shape are predicted once."""

    def __init__(self, experiment: ExperimentConfig) -> None:
        self._experiment = experiment
        limits, wanted = experiment.sweep.constraints.limits(), experiment.objectives
        self._memory = "peak_memory_gb" in limits or "peak_memory_gb" in wanted
        self._needed = self._memory or any(name in limits or name in wanted for name in PREDICTED)
        self._known: dict[str, dict[str, float]] = {}
        self.obstacle = ""
        """Why memory could not be predicted, if so."""

    def __call__(self, recipe: dict[str, Any]) -> dict[str, float]:
        """Cost -> prediction; empty if nothing of it is limited or an objective.

        Raises
        ------
        ModelError
            If the recipe's adapter does not fit the model.
        """
        if not self._needed:
            return {}
        changed = self._experiment.with_recipe(recipe)
        train = changed.train
        shape = (train.batch_size, train.micro_batch_size, train.micro_batch_tokens, train.backend)
        passes = (train.activation_checkpointing, train.distillation.is_on)
        key = f"{changed.lora.model_dump_json()} {shape} {passes}"
        if key not in self._known:
            self._known[key] = self._predict(changed)
        return self._known[key]

    def _predict(self, changed: ExperimentConfig) -> dict[str, float]:
        # Imports torch and transformers.
        from raytune_vlm.train.prediction import predict, predict_trainable

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what libraries say of each other
            if not self._memory:
                return {"trainable_parameters": float(predict_trainable(changed))}
            prediction = predict(changed)
        costs = {"trainable_parameters": float(sum(prediction.trainable.values()))}
        if prediction.total is not None:
            costs["peak_memory_gb"] = prediction.total / 1e9
        self.obstacle = prediction.obstacle
        return costs


def check_constraints(experiment: ExperimentConfig, predictor: Predictor) -> None:
    """Raise ConfigError if every corner of the search space is predicted to break a constraint.

    Asked of up to `MOST_CORNERS` corners; where there are more, and none of those is feasible,
    the search decides.
    """
    limits = experiment.sweep.constraints.limits()
    if not any(name in limits for name in PREDICTED):
        return
    least: dict[str, float] = {}
    for number, recipe in enumerate(_corners(experiment)):
        if number == MOST_CORNERS:
            return
        costs = predictor(recipe)
        if broken(experiment, costs, "predicted") is None:
            return
        least = {name: min(least.get(name, math.inf), cost) for name, cost in costs.items()}
    reason = broken(experiment, least, "at least") or "each corner breaks one of them"
    raise ConfigError(f"sweep.constraints: no trial of the search space can keep them: {reason}")


def _corners(experiment: ExperimentConfig) -> Iterator[dict[str, Any]]:
    """Recipes of the corners, of the keys that a prediction depends on; the smallest first."""
    space = experiment.sweep.search_space
    matter = [key for key in space if key.startswith("lora.") or "batch" in key]
    for given, keys in branches(space):
        listed = {key: [given[key]] if key in given else space[key].corners() for key in keys}
        listed = {key: values for key, values in listed.items() if key in matter or key in given}
        for values in itertools.product(*listed.values()):
            yield dict(zip(listed, values, strict=True))

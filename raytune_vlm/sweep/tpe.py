"""Optuna's TPE for long sweeps: the same proposals, at less of a cost for each trial so far.

Optuna's own works out for each proposal anew which keys all trials have in common, how each trial
ranks and what its recipe is in TPE's own numbers. That does not change once a trial is told, so it
is kept here. The estimators, their samples and the choice among these are Optuna's.

J. Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"; ranks as in `TPESampler`:
finished trials by value, then pruned ones, the furthest first, then those that break a constraint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

CHECKED_VERSIONS = ("5.0.0",)
"""Of Optuna, whose proposals these are; with any other one its own code makes them."""

MOST_GOOD = 25
"""Trials that count as good at most; else a tenth of those that were told (`gamma` there)."""

RUNNING, NOT_SEEN = 3.0, 4.0
"""Groups of trials besides those that were told: 0 finished, 1 pruned, 2 above a constraint."""


class _Told:
    """What TPE needs of the trials of a study, a row each, by number."""

    def __init__(self, declared: Mapping[str, BaseDistribution]) -> None:
        self._declared = declared
        self._trials: list[FrozenTrial | None] = []
        self.ranks = np.empty((0, 3))
        """Group and two numbers, the smaller the better."""
        self.recipes = np.empty((0, len(declared)))
        """The values of the keys in TPE's own numbers; NaN where a trial has not all keys."""

    def update(
        self,
        trials: list[FrozenTrial],
        direction: StudyDirection,
        params_of: Callable[[FrozenTrial], dict[str, Any]],
    ) -> None:
        """Look at those trials that were told anything since: they are other objects then."""
        num_new = len(trials) - len(self._trials)
        self._trials += [None] * num_new
        self.ranks = np.concatenate([self.ranks, np.empty((num_new, 3))])
        self.recipes = np.concatenate([self.recipes, np.empty((num_new, len(self._declared)))])
        for number, (trial, before) in enumerate(zip(trials, self._trials, strict=True)):
            if trial is before:
                continue
            params = params_of(trial)
            self._trials[number] = trial
            self.ranks[number] = _rank(trial, direction)
            self.recipes[number] = math.nan
            if self._declared.keys() <= params.keys():
                values = [e.to_internal_repr(params[key]) for key, e in self._declared.items()]
                self.recipes[number] = values


_TOLD: WeakKeyDictionary[optuna.Study, _Told] = WeakKeyDictionary()


class TpeOfDeclared(TPESampler):
    """TPE over all declared keys at once, as with `multivariate` and `constant_liar`."""

    def __init__(self, declared: Mapping[str, BaseDistribution], **options: Any) -> None:
        super().__init__(multivariate=True, constant_liar=True, **options)
        declared = dict(sorted(declared.items()))
        self._declared = {key: entry for key, entry in declared.items() if not entry.single()}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._declared

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        is_checked = optuna.__version__ in CHECKED_VERSIONS and len(study.directions) == 1
        if not is_checked or search_space != self._declared:
            return super()._sample(study, trial, search_space)
        told = _TOLD.setdefault(study, _Told(self._declared))
        told.update(
            study.get_trials(deepcopy=False),
            study.direction,
            lambda other: self._get_params(other, study),
        )
        groups = told.ranks[:, 0].copy()
        groups[trial.number] = NOT_SEEN
        seen = np.flatnonzero(groups < NOT_SEEN)
        num_told = np.count_nonzero(groups < RUNNING)
        is_good = np.zeros(len(seen), dtype=bool)
        order = np.lexsort(told.ranks[seen].T[::-1])
        is_good[order[: min(math.ceil(0.1 * num_told), MOST_GOOD)]] = True
        good, others = (
            self._estimator(told.recipes[seen[which]], search_space)
            for which in (is_good, ~is_good)
        )
        samples = good.sample(self._rng.rng, self._n_ei_candidates)
        chosen = self._compare(samples, self._compute_acquisition_func(samples, good, others))
        return {key: entry.to_external_repr(chosen[key]) for key, entry in search_space.items()}

    def _estimator(self, recipes: np.ndarray, search_space: dict[str, BaseDistribution]) -> Any:
        """Optuna's estimator of the density of recipes; those without all keys are left out."""
        whole = recipes[~np.isnan(recipes).any(axis=1)]
        observed = dict(zip(search_space, whole.T, strict=True))
        return self._parzen_estimator_cls(observed, search_space, self._parzen_estimator_parameters)


def _rank(trial: FrozenTrial, direction: StudyDirection) -> tuple[float, float, float]:
    """See `_Told.ranks`; equal ones are in the order of their numbers."""
    sign = -1.0 if direction == StudyDirection.MAXIMIZE else 1.0
    if trial.state == TrialState.RUNNING:
        return RUNNING, 0.0, 0.0
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return NOT_SEEN, 0.0, 0.0
    excess = sum(value for value in trial.constraints.values() if value > 0)
    if excess > 0:
        return 2.0, excess, 0.0
    if trial.state == TrialState.COMPLETE:
        assert trial.value is not None
        return 0.0, sign * trial.value, 0.0
    if not trial.intermediate_values:
        return 1.0, 1.0, 0.0
    step, value = max(trial.intermediate_values.items())
    return 1.0, -float(step), math.inf if math.isnan(value) else sign * value

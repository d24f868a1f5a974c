"""Optuna's samplers: one entry a searcher.

A sampler is made anew for every proposal, seeded with the proposal's number, so that it keeps
nothing between two of them: what it knows are the trials of the study, in their order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)

from raytune_vlm.config.distributions import (
    Choice,
    Distribution,
    LogUniform,
    QUniform,
    RandInt,
    Space,
    ordered,
)
from raytune_vlm.config.sweep import SweepConfig


class _TpeOfDeclared(TPESampler):
    """TPE over all declared keys at once.

    Optuna's own looks for the keys that all trials of the study have in common, for each proposal
    anew: with 1,000 trials that takes longer than the proposal.
    """

    def __init__(self, declared: Mapping[str, BaseDistribution], **options: Any) -> None:
        super().__init__(multivariate=True, **options)
        self._declared = dict(sorted(declared.items()))

    def infer_relative_search_space(
        self, study: optuna.Study, trial: optuna.trial.FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {key: entry for key, entry in self._declared.items() if not entry.single()}


def _tpe(sweep: SweepConfig, seed: int, number: int) -> BaseSampler:
    config: Any = sweep.searcher
    options: dict[str, Any] = {
        "seed": seed * 100_003 + number,
        "n_startup_trials": config.num_startup_trials,
        "n_ei_candidates": config.num_candidates,
        "constant_liar": True,
    }
    if any(entry.when for entry in sweep.search_space.values()):
        return TPESampler(multivariate=True, group=True, **options)
    declared = {key: optuna_distribution(entry) for key, entry in sweep.search_space.items()}
    return _TpeOfDeclared(declared, **options)


def _gp(sweep: SweepConfig, seed: int, number: int) -> BaseSampler:
    config: Any = sweep.searcher
    return GPSampler(
        seed=seed * 100_003 + number,
        n_startup_trials=config.num_startup_trials,
        warn_independent_sampling=False,
    )


def _cmaes(sweep: SweepConfig, seed: int, number: int) -> BaseSampler:
    config: Any = sweep.searcher
    return CmaEsSampler(
        seed=seed * 100_003 + number,
        n_startup_trials=config.num_startup_trials,
        popsize=config.population_size,
        consider_pruned_trials=config.learn_from_stopped,
        warn_independent_sampling=False,
    )


def _nsga2(sweep: SweepConfig, seed: int, number: int) -> BaseSampler:
    config: Any = sweep.searcher
    return NSGAIISampler(
        seed=seed * 100_003 + number,
        population_size=config.population_size,
        mutation_prob=config.mutation_probability,
        crossover_prob=config.crossover_probability,
    )


def _qmc(sweep: SweepConfig, seed: int, number: int) -> BaseSampler:
    config: Any = sweep.searcher
    return QMCSampler(
        qmc_type=config.sequence,
        scramble=True,
        seed=seed,  # of the sequence, which all proposals share
        independent_sampler=RandomSampler(seed=seed * 100_003 + number),
        warn_independent_sampling=False,
    )


def _random(sweep: SweepConfig, seed: int, number: int) -> BaseSampler:
    return RandomSampler(seed=seed * 100_003 + number)


SAMPLERS: dict[str, Callable[[SweepConfig, int, int], BaseSampler]] = {
    "tpe": _tpe,
    "gp": _gp,
    "cmaes": _cmaes,
    "nsga2": _nsga2,
    "qmc": _qmc,
    "random": _random,
    "grid": _random,  # its points are given; see `study.py`
}
"""`sweep.searcher.type` -> sampler of one proposal, from the sweep, its seed and the number."""

KEEP_STATE = ("cmaes", "nsga2", "qmc")
"""Samplers that note something in the study when they are asked: a study is rebuilt by asking them
again. For the others it is enough that the recorded trials are in it."""


def sampler(sweep: SweepConfig, seed: int, number: int) -> BaseSampler:
    """The sampler of proposal `number`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return SAMPLERS[sweep.searcher.type](sweep, seed, number)


def optuna_distribution(distribution: Distribution) -> BaseDistribution:
    """Our distribution as Optuna's; `randint` excludes its upper end, as in Ray."""
    if isinstance(distribution, Choice):
        return CategoricalDistribution(distribution.values)
    if isinstance(distribution, RandInt):
        return IntDistribution(distribution.lower, distribution.upper - 1)
    return FloatDistribution(
        distribution.lower,
        distribution.upper,
        log=isinstance(distribution, LogUniform),
        step=distribution.q if isinstance(distribution, QUniform) else None,
    )


def suggest(trial: optuna.Trial, space: Space) -> dict[str, Any]:
    """Ask a trial for every key that is active, a key after those that its conditions name."""
    recipe: dict[str, Any] = {}
    for key, entry in ordered(space).items():
        if not entry.is_active(recipe):
            continue
        if isinstance(entry, Choice):
            recipe[key] = trial.suggest_categorical(key, entry.values)
        elif isinstance(entry, RandInt):
            recipe[key] = trial.suggest_int(key, entry.lower, entry.upper - 1)
        else:
            step = entry.q if isinstance(entry, QUniform) else None
            log = isinstance(entry, LogUniform)
            recipe[key] = trial.suggest_float(key, entry.lower, entry.upper, step=step, log=log)
    return {key: recipe[key] for key in space if key in recipe}


def inside(space: Space, recipe: Mapping[str, Any]) -> bool:
    """Whether every value of a recipe can be drawn, so that Optuna can be told of it."""
    return all(space[key].contains(value) for key, value in recipe.items())

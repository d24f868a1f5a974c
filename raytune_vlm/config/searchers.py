"""Who proposes the next recipe: one section a sampler, and what each of them cannot do."""

from typing import Annotated, Literal

from pydantic import Field

from raytune_vlm.config.section import Section


class TpeSearcher(Section):
    """Tree-structured Parzen estimator (Bergstra et al. 2011), by Optuna."""

    type: Literal["tpe"]
    num_startup_trials: int = Field(default=5, ge=1)
    """Random trials before the model is used."""
    num_candidates: int = Field(default=24, ge=1, le=10_000)
    """Points drawn from the model of the good trials, of which the most promising is proposed."""


class GpSearcher(Section):
    """Gaussian process and expected improvement, by Optuna. Learns from finished trials only."""

    type: Literal["gp"]
    num_startup_trials: int = Field(default=5, ge=1)
    """Random trials before the model is used."""


class CmaesSearcher(Section):
    """Covariance matrix adaptation (Hansen 2016), by Optuna: two or more numbers, no choices."""

    type: Literal["cmaes"]
    num_startup_trials: int = Field(default=1, ge=1)
    """Random trials before the model is used."""
    population_size: int | None = Field(default=None, ge=4, le=1000)
    """Trials of a generation; None: 4 + 3 ln(number of keys)."""
    learn_from_stopped: bool = True
    """Let a stopped trial count with its last score; else only finished ones do."""


class Nsga2Searcher(Section):
    """Genetic search for a Pareto front (Deb et al. 2002), by Optuna. Learns from finished trials
    only."""

    type: Literal["nsga2"]
    population_size: int = Field(default=8, ge=2, le=1000)
    """Trials of a generation; the first one is random."""
    mutation_probability: float | None = Field(default=None, ge=0, le=1)
    """Share of a child's keys that are drawn anew; None: one key of each child."""
    crossover_probability: float = Field(default=0.9, ge=0, le=1)
    """Share of children that have two parents."""


class QmcSearcher(Section):
    """Points that fill the space evenly (a scrambled Sobol or Halton sequence), by Optuna."""

    type: Literal["qmc"]
    sequence: Literal["sobol", "halton"] = "sobol"
    """Which sequence."""


class RandomSearcher(Section):
    """Independent random points."""

    type: Literal["random"]


class GridSearcher(Section):
    """Every combination of a space made of `grid` and `choice` only."""

    type: Literal["grid"]


SearcherConfig = Annotated[
    TpeSearcher
    | GpSearcher
    | CmaesSearcher
    | Nsga2Searcher
    | QmcSearcher
    | RandomSearcher
    | GridSearcher,
    Field(discriminator="type"),
]

CONDITIONAL = ("tpe", "random", "grid")
"""Searchers that can propose recipes with different keys."""

LEARNING = ("tpe", "gp")
"""Searchers to which trials of other sweeps tell anything."""

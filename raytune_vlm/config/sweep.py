"""`sweep`: what is searched, by whom, how long."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune_vlm.config.distributions import (
    Choice,
    Distribution,
    Grid,
    LogUniform,
    Scalar,
    Uniform,
    num_combinations,
    ordered,
)
from raytune_vlm.config.objectives import Budget, ConstraintsConfig, Objective, StableConfig
from raytune_vlm.config.schedulers import HalvingScheduler, PbtScheduler, SchedulerConfig
from raytune_vlm.config.searchers import CONDITIONAL, LEARNING, SearcherConfig, TpeSearcher
from raytune_vlm.errors import did_you_mean

MOST_SLOTS = 256
"""Slots that an executor may have."""


class SweepConfig(Budget):
    """A search over recipes."""

    metric: str | None = None
    """Metric variant on `select` that decides; None takes the first of `evaluation.metrics`."""
    objectives: tuple[Objective, ...] = ()
    """Two or more to be optimised at once instead of `metric`. The first is a metric variant and
    picks the winner; the Pareto front is shown beside it."""
    constraints: ConstraintsConfig = ConstraintsConfig()
    num_trials: int = Field(default=16, ge=1)
    """How many recipes are tried."""
    num_executors: int = Field(default=1, ge=1)
    """Resident executors, each with a base model of its own."""
    slots: Annotated[int, Field(ge=1, le=MOST_SLOTS)] | Literal["auto"] = 1
    """Trials that an executor trains at once on its one base model, which is in memory once. `auto`
    (with packing=fast): measured when the sweep starts, twice as many at a time, until a doubling
    gains less than 5 % or would take more than 90 % of a GPU's memory."""
    packing: Literal["exact", "fast"] = "exact"
    """With several slots. `exact`: they take turns, bit-equal to trials by themselves. `fast`: the
    rows of all go through the base together, in steps and when they are scored, equal to rounding;
    DoRA, `lora.modules_to_save` and scopes beyond the text still take turns."""
    include_default: bool = True
    """Make the experiment's own recipe the first trial, so that the winner has to beat it."""
    searcher: SearcherConfig = TpeSearcher(type="tpe")
    """Who proposes the next recipe."""
    scheduler: SchedulerConfig = HalvingScheduler(type="halving")
    """Who stops trials early, or replaces them."""
    num_replicates: int = Field(default=0, ge=0)
    """Train the winner's recipe again with so many other seeds, to show how much of its score is
    the luck of the seed; replicates cannot win."""
    replicate_top: int = Field(default=1, ge=1)
    """Do so with the best so many recipes, not the winner's alone, to see whether the winner is
    still the best of them by the mean over seeds."""
    max_failures: int = Field(default=2, ge=0)
    """How often a trial is started again after a worker died or hung, counted anew from every rung
    that it reaches; nodes that announce their end are not counted."""
    max_wait_s: float = Field(default=600, ge=1, le=7 * 86400)
    """Seconds to wait for the workers of an executor, because a node is missing or others hold it,
    before it is given up; without any executor the run ends with status 3 and can be resumed."""
    search_space: dict[str, Distribution] = Field(default_factory=dict)
    """Dotted key of the experiment -> distribution."""
    points_to_evaluate: tuple[dict[str, Scalar], ...] = ()
    """Recipes to try first, after the default one: dotted key of the search space -> value. A key
    that is not given keeps the experiment's own value."""
    warm_start: tuple[str, ...] = ()
    """Folders of earlier sweeps whose ended trials the searcher learns from."""
    warm_start_across_data: bool = False
    """Let `warm_start` take sweeps on other data or another base model too."""
    stop_when_stable: StableConfig | None = None
    """End the search before `num_trials` once its outcome no longer changes; None: never."""

    @property
    def at_once(self) -> int:
        """Trials that are in training at a time, at most."""
        return self.num_executors * (1 if self.slots == "auto" else self.slots)

    @model_validator(mode="after")
    def _packing_has_slots(self) -> "SweepConfig":
        if self.packing == "fast" and self.slots == 1:
            raise ValueError("packing=fast has no effect with slots=1: raise slots")
        if self.packing == "exact" and self.slots == "auto":
            raise ValueError(
                "slots=auto needs packing=fast: slots that take turns are as fast as one"
            )
        return self

    @model_validator(mode="after")
    def _grid_fits(self) -> "SweepConfig":
        grids = [key for key, entry in self.search_space.items() if isinstance(entry, Grid)]
        if self.searcher.type != "grid":
            if grids:
                raise ValueError(
                    f"search_space.{grids[0]}: type grid needs searcher.type=grid, which is "
                    f"'{self.searcher.type}'; use type choice"
                )
            return self
        for key, entry in self.search_space.items():
            if not isinstance(entry, Choice):
                raise ValueError(
                    f"search_space.{key}: searcher.type=grid needs a search_space of grid and "
                    f"choice only, got {entry.type}"
                )
        count = num_combinations(self.search_space)
        sizes = [len(entry.corners()) for entry in self.search_space.values()]
        shape = f" ({' x '.join(map(str, sizes))})" if count == math.prod(sizes) else ""
        own = " and the experiment's own recipe (include_default)" if self.include_default else ""
        if count + self.include_default > self.num_trials:
            raise ValueError(
                f"num_trials={self.num_trials} is less than the grid's {count} combinations"
                f"{shape}{own}; raise num_trials or shorten the lists"
            )
        return self

    @model_validator(mode="after")
    def _replicates_are_made(self) -> "SweepConfig":
        if self.replicate_top > 1 and self.num_replicates == 0:
            raise ValueError(
                f"replicate_top={self.replicate_top} has no effect: num_replicates=0 trains no "
                "recipe again"
            )
        if self.replicate_top > self.num_trials:
            raise ValueError(
                f"replicate_top={self.replicate_top} is more than num_trials={self.num_trials}"
            )
        return self

    @model_validator(mode="after")
    def _population_fits(self) -> "SweepConfig":
        scheduler = self.scheduler
        if not isinstance(scheduler, PbtScheduler):
            return self
        if scheduler.num_replaced(self.num_trials) == 0:
            least = math.ceil(1 / scheduler.quantile)
            raise ValueError(
                f"scheduler.quantile={scheduler.quantile:g} of num_trials={self.num_trials} is no "
                f"whole trial, so none would ever be replaced: num_trials must be at least {least}"
            )
        if self.num_replicates:
            raise ValueError(
                f"num_replicates={self.num_replicates} and scheduler.type=pbt exclude each other: "
                "what it finds is a schedule, and the winner's last recipe trained from the "
                "beginning is another thing"
            )
        if self.stop_when_stable:
            raise ValueError(
                "stop_when_stable has no effect with scheduler.type=pbt: its trials all begin "
                "before the first of them ends"
            )
        for key in scheduler.perturbed if self.search_space else ():
            entry = self.search_space.get(key)
            if entry is None:
                raise ValueError(
                    f"scheduler.perturbed: {key!r} is not a key of the search space, so its range "
                    f"is not known{did_you_mean(key, self.search_space)}"
                )
            if not isinstance(entry, Uniform | LogUniform) or entry.lower <= 0 or entry.when:
                raise ValueError(
                    f"scheduler.perturbed: search_space.{key} must be of type uniform or "
                    f"loguniform, above 0 and without conditions, got {entry.type} "
                    f"{entry.describe()}{' with when' if entry.when else ''}"
                )
        return self

    @model_validator(mode="after")
    def _searcher_fits(self) -> "SweepConfig":
        kind = self.searcher.type
        conditional = [key for key, entry in self.search_space.items() if entry.when]
        if conditional and kind not in CONDITIONAL:
            raise ValueError(
                f"search_space.{conditional[0]}.when: searcher.type={kind} cannot search a space "
                f"with conditions; use one of {', '.join(CONDITIONAL)}"
            )
        if kind == "cmaes" and self.search_space:
            for key, entry in self.search_space.items():
                if isinstance(entry, Choice):
                    raise ValueError(
                        f"search_space.{key}: searcher.type=cmaes searches numbers only, got type "
                        "choice; use a range, or searcher.type=tpe"
                    )
            if len(self.search_space) < 2:
                raise ValueError(
                    "searcher.type=cmaes needs at least 2 keys in search_space, got "
                    f"{len(self.search_space)}; use searcher.type=gp or tpe"
                )
        if kind == "cmaes" and self.objectives:
            raise ValueError("searcher.type=cmaes has one objective only; use tpe, gp or nsga2")
        if kind == "cmaes" and self.constraints.limits():
            raise ValueError(
                "searcher.type=cmaes does not learn from constraints; use tpe, gp or nsga2"
            )
        return self

    @model_validator(mode="after")
    def _conditions_hold_together(self) -> "SweepConfig":
        ordered(self.search_space)
        return self

    @model_validator(mode="after")
    def _objectives_differ(self) -> "SweepConfig":
        names = [objective.metric for objective in self.objectives]
        if len(names) == 1:
            raise ValueError(f"objectives: one alone is written as metric: {names[0]}")
        if len(set(names)) != len(names):
            raise ValueError(f"objectives must differ, got {names}")
        if names and self.metric is not None:
            raise ValueError(
                f"metric={self.metric} and objectives exclude each other: the first objective "
                "picks the winner"
            )
        return self

    @model_validator(mode="after")
    def _first_trials_fit(self) -> "SweepConfig":
        points = self.points_to_evaluate
        if points and self.searcher.type == "grid":
            raise ValueError("points_to_evaluate has no effect with searcher.type=grid: it tries "
                             "every point")  # fmt: skip
        if points and len(points) + self.include_default > self.num_trials:
            own = " after the experiment's own recipe" if self.include_default else ""
            raise ValueError(
                f"points_to_evaluate: {len(points)} points{own} do not fit into "
                f"num_trials={self.num_trials}"
            )
        if self.stop_when_stable and self.stop_when_stable.trials >= self.num_trials:
            raise ValueError(
                f"stop_when_stable.trials={self.stop_when_stable.trials} must be below "
                f"num_trials={self.num_trials}, or it has no effect"
            )
        return self

    @model_validator(mode="after")
    def _warm_start_is_used(self) -> "SweepConfig":
        if self.warm_start and self.searcher.type not in LEARNING:
            raise ValueError(
                f"warm_start has no effect with searcher.type={self.searcher.type}; use one of "
                f"{', '.join(LEARNING)}"
            )
        if self.warm_start_across_data and not self.warm_start:
            raise ValueError("warm_start_across_data=true has no effect without warm_start")
        return self

    def notes(self) -> list[str]:
        """What a person should know of this combination, though nothing is wrong with it."""
        found = []
        kind = self.searcher.type
        if kind == "nsga2" and not self.objectives:
            found.append("searcher.type=nsga2 is made for several objectives; there is one")
        finished_only = kind in ("gp", "nsga2")
        if finished_only and self.search_space and self.scheduler.type != "fifo":
            found.append(
                f"searcher.type={kind} learns from finished trials only: those that "
                f"{self.scheduler.type} stops teach it nothing"
            )
        halving = self.scheduler if isinstance(self.scheduler, HalvingScheduler) else None
        if (
            self.stop_when_stable
            and halving
            and self.num_trials - self.at_once < (halving.min_results or self.num_trials)
        ):
            found.append(
                "stop_when_stable saves nothing: with scheduler.type=halving no trial ends before "
                f"all num_trials={self.num_trials} have begun; lower scheduler.min_results"
            )
        return found

    @model_validator(mode="after")
    def _one_alpha(self) -> "SweepConfig":
        if {"lora.alpha", "lora.alpha_ratio"} <= set(self.search_space):
            raise ValueError(
                "search_space.lora.alpha and search_space.lora.alpha_ratio exclude each other: "
                "alpha_ratio is only used when alpha is unset"
            )
        return self

    def rungs(self, max_steps: int, every: int | None) -> tuple[int, ...]:
        """The steps at which a trial of `max_steps` is scored, in order."""
        steps = set(self.scheduler_rungs(max_steps))
        if every:
            steps.update(range(every, max_steps, every))
        return tuple(sorted(steps))

    def scheduler_rungs(self, max_steps: int) -> tuple[int, ...]:
        """The steps at which the scheduler compares trials, and the end, in order."""
        return tuple(sorted({max_steps, *self.scheduler.compared_at(max_steps)}))


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        dotted = f"{prefix}{key}"
        flat.update(flatten(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value})
    return flat

"""`sweep`: what is searched, by whom, how long."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raytune_vlm.config.section import Section

Scalar = bool | int | float | str


class Choice(Section):
    """One of the listed values."""

    type: Literal["choice"]
    values: tuple[Scalar, ...] = Field(min_length=1)
    """The values, each valid for the key on its own."""

    @model_validator(mode="after")
    def _distinct(self) -> "Choice":
        if len({(type(value), value) for value in self.values}) != len(self.values):
            raise ValueError(f"values must be distinct, got {list(self.values)}")
        return self

    def corners(self) -> list[Scalar]:
        """The values at which the experiment must be valid."""
        return list(self.values)


class Grid(Choice):
    """Every one of the listed values, for `searcher.type: grid`."""

    type: Literal["grid"]  # type: ignore[assignment]


class _Interval(Section):
    lower: float
    """Smallest value."""
    upper: float
    """Largest value (excluded for `randint`, as in Ray)."""

    @model_validator(mode="after")
    def _ordered(self) -> "_Interval":
        if not self.lower < self.upper:
            raise ValueError(f"lower < upper must hold, got lower={self.lower}, upper={self.upper}")
        return self

    def corners(self) -> list[Scalar]:
        """The end points and a point between, at which the experiment must be valid.

        The one between is no round number, so that a real interval for a whole-number key is found.
        """
        return [self.lower, self.lower + 0.618 * (self.upper - self.lower), self.upper]


class Uniform(_Interval):
    """A real number, every value equally likely."""

    type: Literal["uniform"]


class LogUniform(_Interval):
    """A positive real number, every order of magnitude equally likely."""

    type: Literal["loguniform"]

    @model_validator(mode="after")
    def _positive(self) -> "LogUniform":
        if self.lower <= 0:
            raise ValueError(f"lower must be above 0 for loguniform, got {self.lower}")
        return self


class QUniform(_Interval):
    """A real number on the grid lower, lower + q, ..., upper."""

    type: Literal["quniform"]
    q: float = Field(gt=0)
    """Distance of the grid's points."""

    @model_validator(mode="after")
    def _whole(self) -> "QUniform":
        steps = (self.upper - self.lower) / self.q
        if not math.isclose(steps, round(steps), abs_tol=1e-9):
            raise ValueError(f"upper - lower must be a multiple of q={self.q}")
        return self

    def corners(self) -> list[Scalar]:
        """The end points and the first point after `lower`."""
        return [self.lower, self.lower + self.q, self.upper]


class RandInt(_Interval):
    """A whole number from `lower` to `upper` - 1, as in Ray."""

    type: Literal["randint"]
    lower: int
    """Smallest value."""
    upper: int
    """One more than the largest value."""

    def corners(self) -> list[Scalar]:
        """The smallest value, the next one (one of the two is odd) and the largest."""
        return sorted({self.lower, min(self.lower + 1, self.upper - 1), self.upper - 1})


Distribution = Annotated[
    Choice | Grid | Uniform | LogUniform | QUniform | RandInt, Field(discriminator="type")
]


class TpeSearcher(Section):
    """Tree-structured Parzen estimator (Bergstra et al. 2011), by Optuna."""

    type: Literal["tpe"]
    num_startup_trials: int = Field(default=5, ge=1)
    """Random trials before the model is used."""


class RandomSearcher(Section):
    """Independent random points."""

    type: Literal["random"]


class GridSearcher(Section):
    """Every combination of a space made of `grid` and `choice` only."""

    type: Literal["grid"]


class _Rungs(Section):
    grace_period: int = Field(default=50, ge=1)
    """First rung, in optimizer steps."""
    reduction_factor: float = Field(default=3, gt=1)
    """The best 1 / reduction_factor of a rung go on; rungs are this factor apart."""


class HalvingScheduler(_Rungs):
    """Successive halving that pauses at every rung and promotes over the whole sweep (Li et al.
    2020)."""

    type: Literal["halving"]
    min_results: int | None = Field(default=None, ge=1)
    """Results that the first rung must hold before the first promotion from it, the next rungs
    reduction_factor times fewer each; 1: promote as soon as possible. None: those of all trials but
    the ones that the other executors still train, so that new trials go first."""


class AshaScheduler(_Rungs):
    """Ray's asynchronous successive halving: it stops a trial at a rung or never (not Li et al.'s
    promotions)."""

    type: Literal["asha"]


class MedianScheduler(Section):
    """Ray's median rule: a trial whose best score is below the median of the others' means stops
    (Golovin et al. 2017)."""

    type: Literal["median"]
    grace_period: int = Field(default=50, ge=1)
    """No trial is stopped before this step."""
    min_samples_required: int = Field(default=3, ge=1)
    """Other trials that must have come as far before one is stopped."""


class FifoScheduler(Section):
    """No early stopping."""

    type: Literal["fifo"]


class SweepConfig(Section):
    """A search over recipes."""

    metric: str | None = None
    """Metric variant on `select` that decides; None takes the first of `evaluation.metrics`."""
    num_trials: int = Field(default=16, ge=1)
    """How many recipes are tried."""
    num_executors: int = Field(default=1, ge=1)
    """Resident executors, each training one trial at a time."""
    include_default: bool = True
    """Make the experiment's own recipe the first trial, so that the winner has to beat it."""
    searcher: Annotated[
        TpeSearcher | RandomSearcher | GridSearcher, Field(discriminator="type")
    ] = TpeSearcher(type="tpe")
    """Who proposes the next recipe."""
    scheduler: Annotated[
        HalvingScheduler | AshaScheduler | MedianScheduler | FifoScheduler,
        Field(discriminator="type"),
    ] = HalvingScheduler(type="halving")
    """Who stops a trial early."""
    num_replicates: int = Field(default=0, ge=0)
    """Train the winner's recipe again with so many other seeds, to show how much of its score is
    the luck of the seed; replicates cannot win."""
    max_failures: int = Field(default=2, ge=0)
    """How often a trial is started again after a worker died, before the sweep gives up."""
    search_space: dict[str, Distribution] = Field(default_factory=dict)
    """Dotted key of the experiment -> distribution."""

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
        sizes = []
        for key, entry in self.search_space.items():
            if not isinstance(entry, Choice):
                raise ValueError(
                    f"search_space.{key}: searcher.type=grid needs a search_space of grid and "
                    f"choice only, got {entry.type}"
                )
            sizes.append(len(entry.values))
        combinations = math.prod(sizes)
        own = " and the experiment's own recipe (include_default)" if self.include_default else ""
        if combinations + self.include_default > self.num_trials:
            raise ValueError(
                f"num_trials={self.num_trials} is less than the grid's {combinations} combinations "
                f"({' x '.join(map(str, sizes))}){own}; raise num_trials or shorten the lists"
            )
        return self

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
        steps = set(self.halving_rungs(max_steps))
        if every:
            steps.update(range(every, max_steps, every))
        return tuple(sorted(steps))

    def halving_rungs(self, max_steps: int) -> tuple[int, ...]:
        """The steps at which the scheduler compares trials, and the end, in order."""
        steps = {max_steps}
        if isinstance(self.scheduler, _Rungs):
            rung = float(self.scheduler.grace_period)
            while rung < max_steps:
                steps.add(math.ceil(rung))
                rung *= self.scheduler.reduction_factor
        return tuple(sorted(steps))


def flatten(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        dotted = f"{prefix}{key}"
        flat.update(flatten(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value})
    return flat

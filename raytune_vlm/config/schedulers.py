"""`sweep.scheduler`: who stops, pauses or replaces trials."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from raytune_vlm.config.section import Section

Perturbable = Literal[
    "train.learning_rate",
    "train.learning_rate_by_scope.text",
    "train.learning_rate_by_scope.projector",
    "train.learning_rate_by_scope.vision",
    "train.weight_decay",
    "train.max_grad_norm",
]
"""What may change in the middle of a trial: neither the adapter's tensors nor the order of the
samples depend on it."""


class _Rungs(Section):
    grace_period: int = Field(default=50, ge=1)
    """First rung, in optimizer steps."""
    reduction_factor: float = Field(default=3, gt=1)
    """The best 1 / reduction_factor of a rung go on; rungs are this factor apart."""

    def compared_at(self, max_steps: int) -> set[int]:
        """The steps before the end at which trials are compared."""
        steps, rung = set(), float(self.grace_period)
        while rung < max_steps:
            steps.add(math.ceil(rung))
            rung *= self.reduction_factor
        return steps


class HalvingScheduler(_Rungs):
    """Successive halving that pauses at every rung and promotes over the whole sweep (Li et al.
    2020)."""

    type: Literal["halving"]
    min_results: int | None = Field(default=None, ge=1)
    """Results that the first rung must hold before the first promotion from it, the next rungs
    reduction_factor times fewer each; 1: promote as soon as possible. None: those of all trials but
    the ones that the other executors still train, so that new trials go first. With
    `seeds`, results of recipes."""
    seeds: int = Field(default=1, ge=1)
    """Train each recipe with so many seeds, the experiment's own and those above it, as trials of
    their own: the best recipes of a rung by the mean over their seeds go on, all seeds of a recipe
    together, and the searcher is told the mean. `num_trials` counts trials: so many times fewer
    recipes."""


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

    def compared_at(self, max_steps: int) -> set[int]:
        """None of its own: it compares wherever trials are scored."""
        return set()


class FifoScheduler(Section):
    """No early stopping."""

    type: Literal["fifo"]

    def compared_at(self, max_steps: int) -> set[int]:
        """None: it compares nothing."""
        return set()


class PbtScheduler(Section):
    """Population based training (Jaderberg et al. 2017): at every rung the worst trials are
    replaced by clones of the best, with another learning rate."""

    type: Literal["pbt"]
    interval: int = Field(default=50, ge=1)
    """Steps between two rungs; at each of them all trials wait for each other."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the trials that is replaced at a rung; as many of the best are the parents."""
    factors: tuple[Annotated[float, Field(gt=0)], ...] = (0.8, 1.25)
    """A clone has its parent's value times one of these, within the range of the search space."""
    perturbed: tuple[Perturbable, ...] = Field(default=("train.learning_rate",), min_length=1)
    """Keys of the search space that clones change, each with a range above 0."""

    @model_validator(mode="after")
    def _goes_both_ways(self) -> "PbtScheduler":
        if not (self.factors and min(self.factors) < 1 < max(self.factors)):
            raise ValueError(
                f"factors={list(self.factors)} must hold one below 1 and one above 1, or values "
                "would gather at one end of their range"
            )
        if 1 in self.factors or len(set(self.factors)) < len(self.factors):
            raise ValueError(f"factors={list(self.factors)} must differ from 1 and each other")
        if len(set(self.perturbed)) < len(self.perturbed):
            raise ValueError(f"perturbed={list(self.perturbed)} names a key twice")
        return self

    def compared_at(self, max_steps: int) -> set[int]:
        """The steps before the end at which trials are compared."""
        return set(range(self.interval, max_steps, self.interval))

    def num_replaced(self, num_trials: int) -> int:
        """How many of so many trials are replaced at a rung."""
        return math.floor(self.quantile * num_trials + 1e-9)  # 0.29 * 100 is 28.999...


SchedulerConfig = Annotated[
    HalvingScheduler | AshaScheduler | MedianScheduler | FifoScheduler | PbtScheduler,
    Field(discriminator="type"),
]

"""What is wanted of a recipe besides its score: several objectives, limits, a budget."""

from typing import Literal

from pydantic import Field, model_validator

from raytune_vlm.config.section import Section

COSTS = ("trainable_parameters", "train_seconds", "peak_memory_gb")
"""What a trial costs, which may be an objective besides metric variants; less is better."""


class Objective(Section):
    """One of several things to be optimised at once."""

    metric: str
    """A metric variant of `evaluation.metrics`, or `trainable_parameters`, `train_seconds`,
    `peak_memory_gb`."""
    mode: Literal["max", "min"] | None = None
    """Which way is better; None takes the metric's own, and another one is refused."""


class ConstraintsConfig(Section):
    """Limits that the winner has to keep. What can be predicted is asked before a trial starts."""

    max_memory_gb: float | None = Field(default=None, gt=0)
    """Memory of one worker at its peak, in 10^9 bytes: predicted, and on a GPU also measured where
    trials do not share it (`sweep.slots`)."""
    max_trainable_parameters: int | None = Field(default=None, ge=1)
    """Trained parameters: predicted exactly."""
    max_train_seconds: float | None = Field(default=None, gt=0)
    """Training time of a trial without its scoring: measured at every rung, where a trial that is
    above it is stopped."""

    def limits(self) -> dict[str, float]:
        """Cost -> the most that is allowed, of those that are limited."""
        given = {
            "peak_memory_gb": self.max_memory_gb,
            "trainable_parameters": self.max_trainable_parameters,
            "train_seconds": self.max_train_seconds,
        }
        return {name: value for name, value in given.items() if value is not None}


LIMIT_KEYS = {
    "peak_memory_gb": "max_memory_gb",
    "trainable_parameters": "max_trainable_parameters",
    "train_seconds": "max_train_seconds",
}
"""Cost -> the key under `sweep.constraints` that limits it."""


class StableConfig(Section):
    """When a search has nothing left to decide."""

    trials: int = Field(ge=1)
    """Ended trials over which the set of those that cannot be told from the best stays the same."""


class Budget(Section):
    """What a search may use up."""

    max_gpu_hours: float | None = Field(default=None, gt=0)
    """GPU-hours held by the executors, over all resumes; then no new trials, and running ones end
    at their next rung."""
    max_wall_time_s: float | None = Field(default=None, gt=0)
    """Seconds that the search may run, over all resumes; ends like `max_gpu_hours`."""
    max_cost: float | None = Field(default=None, gt=0)
    """Money that the executors may cost, over all resumes; ends like `max_gpu_hours`."""
    cost_per_gpu_hour: float | None = Field(default=None, gt=0)
    """Price of one GPU for an hour, in the currency of `max_cost`."""
    cost_per_cpu_hour: float | None = Field(default=None, gt=0)
    """Price of one CPU core for an hour, in the currency of `max_cost`."""

    @model_validator(mode="after")
    def _cost_has_a_price(self) -> "Budget":
        if self.max_cost is not None and not (self.cost_per_gpu_hour or self.cost_per_cpu_hour):
            raise ValueError(
                f"max_cost={self.max_cost} needs a price: set cost_per_gpu_hour or "
                "cost_per_cpu_hour"
            )
        return self

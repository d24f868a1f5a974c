"""Learning-rate schedules as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from raytune_vlm.config.train import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of optimizer step `step` (from 0).

    Linear warm-up over `warmup_steps`, then constant, linear to zero, or half a cosine to zero
    (Loshchilov & Hutter 2017, without restarts) at `max_steps`.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))

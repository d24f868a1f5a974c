"""Learning-rate schedules as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from raytune_vlm.config.train import TrainConfig


def learning_rate(config: TrainConfig, step: int, peak: float | None = None) -> float:
    """The learning rate of optimizer step `step` (from 0); `peak` replaces `train.learning_rate`.

    Linear warm-up over the warm-up, then constant, linear to zero, half a cosine to zero
    (Loshchilov & Hutter 2017, without restarts), or constant and linear to zero over the last
    `decay_share` of the steps (Hu et al. 2024), at `max_steps`.
    """
    peak = config.learning_rate if peak is None else peak
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.max_steps - config.warmup)
    if config.schedule == "constant":
        return peak
    if config.schedule == "linear":
        return peak * (1 - done)
    if config.schedule == "wsd":
        return peak * min(1.0, (config.max_steps - step) / (config.decay_share * config.max_steps))
    return peak * 0.5 * (1 + math.cos(math.pi * done))

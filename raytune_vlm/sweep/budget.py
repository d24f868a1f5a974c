"""What a search may use up, counted from the ledger, over all its lives."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.report.formatting import duration


def held_seconds(events: Sequence[Mapping[str, Any]], now: float) -> float:
    """Seconds in which executors were held: from the first event to now, without the gaps between
    the end of one life of the sweep and the next `resumed`; a clock that was set back takes none
    away."""
    times = [(event["event"], float(event["time"])) for event in events] + [("now", now)]
    pairs = itertools.pairwise(times)
    return sum(max(0.0, later[1] - earlier[1]) for earlier, later in pairs if later[0] != "resumed")


class Budget:
    """How much of `sweep.max_gpu_hours`, `max_wall_time_s` and `max_cost` is used up.

    Parameters
    ----------
    events
        The ledger as it was when this life of the sweep began.
    """

    def __init__(self, experiment: ExperimentConfig, events: Sequence[dict[str, Any]]) -> None:
        self.experiment = experiment
        """With the limits that are in force."""
        self._began = time.monotonic()
        last = float(events[-1]["time"]) if events else 0.0
        self._before = held_seconds(events, last) if events else 0.0

    def seconds(self) -> float:
        """Seconds used up."""
        return self._before + time.monotonic() - self._began

    def used_up(self) -> str | None:
        """Which limit is reached, in words; None if none is."""
        sweep, seconds = self.experiment.sweep, self.seconds()
        gpu_hours = seconds / 3600 * num_gpus(self.experiment)
        for name, used in (
            ("max_gpu_hours", gpu_hours),
            ("max_wall_time_s", seconds),
            ("max_cost", cost(self.experiment, seconds)),
        ):
            limit = getattr(sweep, name)
            if limit is not None and used >= limit:
                shown = f"{used:.3g}" if used < 1000 else f"{used:,.0f}"
                return f"sweep.{name}={limit:.12g} is used up ({shown})"
        return None

    def left(self, seconds_per_step: float, steps: float) -> str:
        """Time and money for so many more steps, in words."""
        seconds = steps * seconds_per_step / self.experiment.sweep.num_executors
        return f"about {duration(seconds)}{_money(self.experiment, seconds)} left"


def num_gpus(experiment: ExperimentConfig) -> float:
    """GPUs that the executors hold."""
    train = experiment.train
    return experiment.sweep.num_executors * train.num_workers * train.gpus_per_worker


def cost(experiment: ExperimentConfig, seconds: float) -> float:
    """What the executors cost in so many seconds."""
    sweep, train = experiment.sweep, experiment.train
    cpus = sweep.num_executors * train.num_workers * train.cpus_per_worker
    prices = num_gpus(experiment) * (sweep.cost_per_gpu_hour or 0)
    prices += cpus * (sweep.cost_per_cpu_hour or 0)
    return seconds / 3600 * prices


def _money(experiment: ExperimentConfig, seconds: float) -> str:
    amount = cost(experiment, seconds)
    return f", {amount:.3g} in money" if amount else ""


def expected_steps(experiment: ExperimentConfig) -> float:
    """Steps of a trial on average, if of each rung of the scheduler 1 / reduction_factor go on."""
    scheduler, most = experiment.sweep.scheduler, experiment.train.max_steps
    factor = getattr(scheduler, "reduction_factor", None)
    if factor is None:
        return float(most)
    steps, share, done, rung = 0.0, 1.0, 0, float(getattr(scheduler, "grace_period", most))
    while rung < most:
        steps += share * (math.ceil(rung) - done)
        share, done, rung = share / factor, math.ceil(rung), rung * factor
    return steps + share * (most - done)


def planner_line(experiment: ExperimentConfig) -> str:
    """What the sweep will do at most and on average, known before anything is measured."""
    sweep, most = experiment.sweep, experiment.train.max_steps
    at_once = min(sweep.at_once, sweep.num_trials)
    whole = sweep.num_trials * most
    line = (
        f"planner: {sweep.num_trials} trials, {at_once} at once; {whole:,} steps in all without "
        "early stopping"
    )
    factor = getattr(sweep.scheduler, "reduction_factor", None)
    if factor is not None and sweep.search_space:
        stopped = round(sweep.num_trials * expected_steps(experiment))
        line += (
            f", about {stopped:,} with it ({most * sweep.num_trials / stopped:.1f} times less, if "
            f"1/{factor:g} of each rung go on)"
        )
    limits = [
        f"sweep.{name}={value:.12g}"
        for name in ("max_gpu_hours", "max_wall_time_s", "max_cost")
        if (value := getattr(sweep, name)) is not None
    ]
    return line + (f"; ends at {' or '.join(limits)}" if limits else "")

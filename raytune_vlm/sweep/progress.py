"""Polls the board and shows trials, steps and the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.monitor import Monitor
from raytune_vlm.report.formatting import duration
from raytune_vlm.sweep.beside import Beside
from raytune_vlm.sweep.ledger import TrialState, num_ended

POLL_S = 1.0


class Watcher(Beside):
    """A thread that shows where the executors are; a context manager."""

    def __init__(
        self,
        monitor: Monitor,
        board: Any,
        experiment: ExperimentConfig,
        states: dict[str, TrialState],
        num_trials: Callable[[], int],
    ) -> None:
        super().__init__("watcher")
        self._monitor, self._board, self._states = monitor, board, states
        self._experiment, self._num_trials = experiment, num_trials
        self._began = time.monotonic()
        self._first = self._steps({})

    def _run(self) -> None:
        while not self._over.wait(POLL_S):
            status = ray.get(self._board.status.remote())
            ended = num_ended(self._states)
            now = "; ".join(where(entry) for _, entry in sorted(status.items()))
            left = self._time_left(status, ended)
            self._monitor.progress("trials", ended, self._num_trials(), f"{left} {now}".strip())

    def _steps(self, status: dict[str, dict[str, Any]]) -> int:
        """Steps accounted for: an ended trial counts whole, since it needs no more time."""
        ended = num_ended(self._states)
        running = sum(int(entry.get("step") or 0) for entry in status.values())
        return ended * self._experiment.train.max_steps + running

    def _time_left(self, status: dict[str, dict[str, Any]], ended: int) -> str:
        done = self._steps(status) - self._first
        total = self._num_trials() * self._experiment.train.max_steps - self._first
        if ended < 1 or done <= 0:
            return ""
        elapsed = time.monotonic() - self._began
        return f"about {duration(elapsed * (total - done) / done)} left"


def where(entry: dict[str, Any]) -> str:
    """What one executor does now, as it told the board."""
    step, most = entry.get("step"), entry.get("max_steps")
    place = f" {step}/{most}" if most else f" step {step}"
    if entry.get("asked"):
        place += f", {entry['answered']}/{entry['asked']} prompts"
        if entry.get("seconds_left") is not None:
            place += f", {duration(entry['seconds_left'])} left"
    if entry.get("tokens_per_second"):
        place += f" {entry['tokens_per_second']:,.0f} tokens/s"
    return f"{entry.get('trial_id')} {entry.get('stage')}{place}"

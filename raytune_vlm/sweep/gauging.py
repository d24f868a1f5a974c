"""Sets the gauges of a sweep while it runs; a thread of the driver."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from raytune_vlm.sweep.beside import Beside
from raytune_vlm.sweep.budget import cost, num_gpus
from raytune_vlm.sweep.gauges import SweepGauges
from raytune_vlm.sweep.ledger_tail import LedgerTail
from raytune_vlm.sweep.tally import Figure, Tally, data_figures, executor_figures

if TYPE_CHECKING:
    from raytune_vlm.sweep.runner import Session

EVERY_S = 4.0
"""Pause between two looks."""


class Gauging(Beside):
    """Looks at the ledger and the board every few seconds; a context manager."""

    def __init__(self, running: Session) -> None:
        super().__init__("gauges")
        self._running = running
        self._tail = LedgerTail(running.folder.ledger_file)
        self._tally = Tally(running.experiment, running.folder)
        self._gauges = SweepGauges(running.experiment.name)
        self._began = time.monotonic()
        self._first: float | None = None
        """Share that was done when this life began."""

    def _run(self) -> None:
        while not self._over.wait(EVERY_S):
            try:
                status = ray.get(self._running.board.status.remote())
            except RayActorError:
                return  # the board died: the run ends, `Attendance` says so
            for event in self._tail.new():
                self._tally.add(event)
            self._gauges.set(self._figures(status))

    def _figures(self, status: dict[str, dict[str, Any]]) -> Iterator[Figure]:
        yield from self._tally.figures()
        yield from data_figures(self._running.data.manifest)
        yield from executor_figures(status)
        yield from self._time_figures(status)

    def _time_figures(self, status: dict[str, dict[str, Any]]) -> Iterator[Figure]:
        """Progress, time and cost."""
        experiment = self._running.experiment
        sweep, most = experiment.sweep, experiment.train.max_steps
        # A replicate and an evaluation tell steps too, when all trials have ended.
        running = sum(int(entry.get("step") or 0) for entry in status.values())
        done = self._tally.num_ended() + running / most
        progress = min(1.0, done / sweep.num_trials)
        if self._first is None:
            self._first = progress
        yield "progress", {}, progress
        seconds = self._tally.held_seconds(time.time())
        yield "held_seconds", {}, seconds
        yield "cost", {}, cost(experiment, seconds)
        if progress > self._first:
            pace = (time.monotonic() - self._began) / (progress - self._first)
            left = pace * (1 - progress)
            yield "seconds_left", {}, left
            yield "cost_left", {}, cost(experiment, left)
        for name, used in (
            ("max_gpu_hours", seconds / 3600 * num_gpus(experiment)),
            ("max_wall_time_s", seconds),
            ("max_cost", cost(experiment, seconds)),
        ):
            limit = getattr(sweep, name)
            if limit is not None:
                yield "budget_used", {"limit": name}, used / limit

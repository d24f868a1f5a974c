"""Who is there: the driver's look at executors and nodes, and the end of a run that lacks some.

Ray Train waits without limit for the resources of a worker group. Here an executor that gave no
sign of life for `sweep.max_wait_s` is given up, and its trial goes to another one; without another
one the run ends with one line that names what is missing.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import ray
from ray.exceptions import RayActorError

from raytune_vlm.config.experiment import ExperimentConfig
from raytune_vlm.monitor import Monitor
from raytune_vlm.prepare.holders import holders
from raytune_vlm.sweep.beside import Beside
from raytune_vlm.sweep.gauges import SweepGauges
from raytune_vlm.sweep.waiting import Waiting

POLL_S = 1.0


class Attendance(Beside):
    """A thread of the driver; a context manager. `missing` says why it ended the run, if it did."""

    def __init__(self, board: Any, experiment: ExperimentConfig, monitor: Monitor) -> None:
        super().__init__("attendance")
        self.missing: str | None = None
        self._board, self._experiment, self._monitor = board, experiment, monitor
        self._gauges = SweepGauges(experiment.name)
        self._waiting = Waiting(monitor)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._say()

    def _say(self) -> None:
        for note in ray.get(self._board.notes.remote()):
            self._monitor.say(note)

    def _run(self) -> None:
        while not self._over.wait(POLL_S):
            try:
                self._say()
                counts = ray.get(self._board.counts.remote())
                self._gauges.set((name, {}, count) for name, count in counts.items())
                self.missing = ray.get(self._board.halted.remote()) or self._absent()
            except RayActorError:
                self.missing = "the board died"
            if self.missing is not None:
                # What Ctrl-C does: Ray Tune ends in order, and who waits for a report wakes up.
                os.kill(os.getpid(), signal.SIGINT)
                return

    def _absent(self) -> str | None:
        """What is missing, if the last executor has gone; others are given up here."""
        absent = ray.get(self._board.absent.remote())
        self._waiting.look(max(absent.values(), default=0.0))
        for executor, seconds in absent.items():
            if seconds < self._experiment.sweep.max_wait_s:
                continue
            line = describe_missing(executor, seconds, self._experiment, ray.nodes())
            line = f"{line}; {holders()}"
            if not ray.get(self._board.give_up_waiting.remote(executor)):
                return line
            self._monitor.say(f"WARNING: {line}; its trial goes to another executor")
        return None


def describe_missing(
    executor: str, seconds: float, experiment: ExperimentConfig, nodes: list[dict[str, Any]]
) -> str:
    """One line: who is missing, what was asked for, what is there, which nodes live and died."""
    train = experiment.train
    asked = f"{train.num_workers} x {train.cpus_per_worker:g} CPU"
    if train.gpus_per_worker:
        asked += f" + {train.gpus_per_worker:g} GPU"
    alive = [node for node in nodes if node["Alive"]]
    there = {
        kind: sum(node["Resources"].get(kind, 0.0) for node in alive) for kind in ("CPU", "GPU")
    }
    dead = ", ".join(_name(node) for node in nodes if not node["Alive"]) or "none"
    return (
        f"{executor} has had no workers for {seconds:.0f} s: it asks for {asked}; there are "
        f"{there['CPU']:g} CPU and {there['GPU']:g} GPU on {len(alive)} nodes "
        f"(alive: {', '.join(map(_name, alive))}; dead: {dead})"
    )


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeID'][:8]} at {node['NodeManagerAddress']}"

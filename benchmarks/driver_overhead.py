"""What a sweep's driver costs per trial, from the first hundred of 1,000 trials to the last.

    python benchmarks/driver_overhead.py [--trials 1000] [--scheduler asha] [--searcher tpe]
                                         [--profile FILE]

The real search: Optuna proposing, the ledger, the study and its mirror, the scheduler, the board,
Ray Tune and its proxies. Only the executors are false: actors that answer every rung at once with a
score computed from the recipe. Printed for each hundred of trials: CPU seconds of the driver per
trial (all of its threads; what the machine does besides hardly matters to them) and whose they are,
wall seconds, and the driver's resident memory.
"""

from __future__ import annotations

import cProfile
import functools
import itertools
import json
import math
import os
import pstats
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import psutil
import ray
from ray.tune.execution.tune_controller import TuneController

from raytune_vlm.config import ExperimentConfig
from raytune_vlm.monitor import Monitor
from raytune_vlm.records import SweepFolder
from raytune_vlm.sweep.board import IDLE, start_board
from raytune_vlm.sweep.closing import Limits
from raytune_vlm.sweep.cluster import ray_session
from raytune_vlm.sweep.desk import Desk
from raytune_vlm.sweep.ledger import Ledger, TrialState, num_ended
from raytune_vlm.sweep.mirror import Mirror
from raytune_vlm.sweep.runner import Session
from raytune_vlm.sweep.scheduler import Halving
from raytune_vlm.sweep.search import LedgerCallback, search
from raytune_vlm.sweep.study import SweepStudy
from raytune_vlm.sweep.turns import Gate, RayRule

METRIC, STEPS = "nted@donut", 36
WARM_UP_S = 30.0
"""An executor's first trial takes so long: until each proxy has its process. A trial shorter than
the start of a process takes the proxy of another one, and Ray Tune drops the process that it was
starting, trial after trial."""
SCHEDULERS = {
    "asha": {"type": "asha", "grace_period": 9, "reduction_factor": 2},
    "halving": {"type": "halving", "grace_period": 9, "reduction_factor": 2},
    "fifo": {"type": "fifo"},
}
SPACE = {
    "lora.rank": {"type": "choice", "values": [2, 4, 8, 16]},
    "train.learning_rate": {"type": "loguniform", "lower": 5e-4, "upper": 4e-2},
    "lora.dropout": {"type": "uniform", "lower": 0.0, "upper": 0.2},
}


def experiment_of(trials: int, scheduler: str, searcher: str) -> ExperimentConfig:
    """A sweep of so many trials on two executors."""
    return ExperimentConfig.model_validate(
        {
            "name": "overhead",
            "model": {"name": "demo"},
            "data": {"sources": [{"type": "messages", "path": "train.jsonl"}]},
            "train": {"max_steps": STEPS, "warmup_steps": 0},
            "evaluation": {"metrics": [METRIC]},
            "sweep": {
                "num_trials": trials,
                "num_executors": 2,
                "searcher": {"type": searcher},
                "scheduler": SCHEDULERS[scheduler],
                "search_space": SPACE,
            },
        }
    )


@ray.remote(num_cpus=0)
class FalseExecutor:
    """Takes jobs from the board and reports a score at every rung, at once."""

    def work(self, board: Any, name: str, rungs: tuple[int, ...]) -> None:
        """Until the board is closed."""
        is_first = True
        while True:
            job = ray.get(board.take.remote(name, 20.0))
            if job is None:
                return
            if job == IDLE:
                continue
            if is_first:
                time.sleep(WARM_UP_S)
                is_first = False
            rate = job.recipe.get("train.learning_rate", 1e-3)
            last = 1 - abs(math.log10(rate) + 2) / 4
            for rung in (rung for rung in rungs if rung not in job.reported):
                report = {"step": rung, METRIC: last * rung / STEPS, "done": rung == STEPS}
                ray.get(board.report.remote(job.job_id, report))
                stop = ray.get(board.push.remote(name, job.job_id, {"step": rung}))
                if rung == job.until or stop:
                    break
            ray.get(board.finish.remote(name, job.job_id))


SHARES: dict[str, list[tuple[type, tuple[str, ...]]]] = {
    "tune": [(TuneController, ("step",))],
    "ours": [
        (LedgerCallback, ("on_trial_start", "on_trial_result", "on_trial_complete")),
        (Desk, ("on_step_begin",)),
        (Limits, ("__call__",)),
        (Gate, ("suggest",)),
        (RayRule, ("choose_trial_to_run", "on_trial_add", "on_trial_result")),
        (Halving, ("choose_trial_to_run", "on_trial_add", "on_trial_result")),
    ],
    "proposing": [(SweepStudy, ("_ask",))],
    "dashboard_file": [(Mirror, ("add",))],
}
"""Whose the time of the driver's main thread is: Ray Tune's loop, our part in it, Optuna's sampler,
the study as a file for optuna-dashboard (Optuna's too). What one calls is counted there only."""


class Shares:
    """Counts the CPU seconds of the main thread by SHARES."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(SHARES, 0.0)
        self._inside: list[str] = []
        self._since = 0.0
        for name, entries in SHARES.items():
            for kind, methods in entries:
                for method in methods:
                    setattr(kind, method, self._counted(name, getattr(kind, method)))

    def _switch(self) -> None:
        now = time.thread_time()
        if self._inside:
            self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def counted(*given: Any, **named: Any) -> Any:
            self._switch()
            self._inside.append(name)
            try:
                return method(*given, **named)
            finally:
                self._switch()
                self._inside.pop()

        return counted


class Samples(threading.Thread):
    """Notes the driver's times and memory whenever another part of the trials has ended."""

    def __init__(
        self, states: dict[str, TrialState], trials: int, every: int, shares: Shares
    ) -> None:
        super().__init__(daemon=True)
        self._states, self._trials, self._every = states, trials, every
        self._shares = shares
        self.rows = [self._row(0)]
        self._over = threading.Event()

    def _row(self, ended: int) -> dict[str, float]:
        memory = psutil.Process().memory_info().rss / 1e6
        return {
            "trials": ended,
            "cpu": time.process_time(),
            "wall": time.monotonic(),
            "memory_mb": memory,
            **self._shares.seconds,
        }

    def run(self) -> None:
        while not self._over.wait(0.05):
            ended = num_ended(self._states)
            if ended >= self.rows[-1]["trials"] + self._every:
                self.rows.append(self._row(ended))

    def close(self) -> None:
        """The last trials, if they are no whole part; then what came after them; and no more."""
        self._over.set()
        self.join()
        ended = num_ended(self._states)
        if ended > self.rows[-1]["trials"]:
            self.rows.append(self._row(ended))
        self.rows.append(self._row(ended))


def measure(experiment: ExperimentConfig, work: Path, every: int) -> list[dict[str, float]]:
    """Run the sweep; a row for each `every` trials."""
    folder = SweepFolder(work / experiment.name)
    folder.root.mkdir()
    states: dict[str, TrialState] = {}
    names = [f"executor-{number}" for number in range(experiment.sweep.num_executors)]
    data: Any = SimpleNamespace(manifest=SimpleNamespace(digest="none"))
    with ray_session(experiment), (work / "log").open("w") as log:
        from rich.console import Console

        board = start_board(names, 0)
        ledger, began = Ledger(folder.ledger_file), time.monotonic()
        monitor = Monitor(Console(file=log))
        running = Session(experiment, folder, monitor, data, board, ledger, states, began)
        executors = [FalseExecutor.remote() for _ in names]
        ended = [
            executor.work.remote(board, name, experiment.rungs)
            for executor, name in zip(executors, names, strict=True)
        ]
        samples = Samples(states, experiment.sweep.num_trials, every, Shares())
        samples.start()
        search(running)
        samples.close()
        ray.get(board.close.remote())
        ray.get(ended)
        actors = ray._private.state.actors().values()
        # The second is what `tune.with_resources` makes of the first.
        proxies = sum(actor["ActorClassName"] in ("Proxy", "ResourceTrainable") for actor in actors)
        print(f"{len(states)} trials, {proxies} processes started for proxies")
    return samples.rows


@click.command()
@click.option("--trials", default=1000, show_default=True)
@click.option("--every", default=100, show_default=True)
@click.option("--scheduler", type=click.Choice(list(SCHEDULERS)), default="asha", show_default=True)
@click.option("--searcher", default="tpe", show_default=True)
@click.option("--profile", "profile_file", type=click.Path(path_type=Path), help="cProfile here.")
def main(trials: int, every: int, scheduler: str, searcher: str, profile_file: Path | None) -> None:
    """Print a line for each hundred trials, and the last hundred against the first."""
    experiment = experiment_of(trials, scheduler, searcher)
    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory(prefix="raytune_vlm-benchmark-") as name:
        if profile_file is None:
            rows = measure(experiment, Path(name), every)
        else:
            rows = profiler.runcall(measure, experiment, Path(name), every)
            profiler.dump_stats(profile_file)
            pstats.Stats(profiler).sort_stats("cumulative").print_stats(60)
    parts = []
    *rows, over = rows
    for before, after in itertools.pairwise(rows):
        count = after["trials"] - before["trials"]
        each = {
            name: round(1000 * (after[name] - before[name]) / count, 1)
            for name in ("cpu", *SHARES, "wall")
        }
        parts.append({"trials": after["trials"], **each, "memory_mb": round(after["memory_mb"], 1)})
        print(json.dumps(parts[-1]))
    # The first part holds the start of Ray Tune and of the proxies.
    ratio = parts[-1]["cpu"] / parts[min(1, len(parts) - 1)]["cpu"]
    grown = parts[-1]["memory_mb"] - parts[0]["memory_mb"]
    # After the last trial Ray Tune writes its snapshot of all of them.
    end = {"trials": over["trials"], "end_s": round(over["cpu"] - rows[-1]["cpu"], 2)}
    print(json.dumps({**end, "memory_mb": round(over["memory_mb"], 1)}))
    figures = {"scheduler": scheduler, "searcher": searcher, "load": os.getloadavg()[0]}
    print(json.dumps({**figures, "ratio_last_to_second": round(ratio, 2), "grown_mb": grown}))


if __name__ == "__main__":
    main()

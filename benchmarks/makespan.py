"""Makespan of equal LoRA trials without early stopping: resident executors against three others.

    python benchmarks/makespan.py [--trials 16] [--steps 24] [--repetitions 3] [--at-once 1]
    python benchmarks/makespan.py --way pixels --way packed --way stopping      # the parts of ours

Every way trains the same recipes for the same steps on the same batches of the demo's data, saves
the adapter and scores it on the same samples of `select`, `--at-once` trials at a time:

- `resident`: our search with its executors, their start included; always run.
- `nested`: a Ray Tune function that launches a `TorchTrainer` per trial.
- `function`: a Ray Tune function with `reuse_actors=True` that loads model and data per trial.
- `trainer`: a process per trial with TRL's `SFTTrainer` if TRL is installed, else with
  transformers' `Trainer`; always one after the other.

Of ours, and only where they are named by `--way`, so that the parts can be told apart:

- `pixels`: `resident` without features: what is left against `function` is the start of trials.
- `packed`: `resident` with four slots, packed.
- `stopping`: `packed` with early stopping, at a quarter and at half of the steps; the losses of the
  trials that were stopped are compared with nothing.

The ways are interleaved, in one Ray session. Seconds are of wall clock; Ray's own start and the
preparation of the data are in none of them.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from ray import tune
from sweep_plain import Inputs, Plain, demo_experiment

from raytune_vlm.config import ExperimentConfig
from raytune_vlm.monitor import Monitor
from raytune_vlm.prepare.prepare import PreparedData
from raytune_vlm.records import SweepFolder, read_json_lines
from raytune_vlm.sweep import preparing, runner
from raytune_vlm.sweep.cluster import ray_session
from raytune_vlm.sweep.search import search

LOWEST, HIGHEST = 1e-3, 8e-3
PACKED = {"sweep.slots": 4, "sweep.packing": "fast"}


def recipes(trials: int) -> list[dict[str, Any]]:
    """Equal work: one rank, a learning rate of its own for each trial."""
    return [
        {"lora.rank": 8, "train.learning_rate": float(f"{rate:.6g}")}
        for rate in np.geomspace(LOWEST, HIGHEST, trials)
    ]


@dataclass
class Bench:
    """What the ways share."""

    work: Path
    experiment: ExperimentConfig
    data: PreparedData
    monitor: Monitor
    at_once: int
    recipes: list[dict[str, Any]]
    runs: int = 0

    @property
    def inputs(self) -> str:
        """Where a process finds base model and data."""
        return str(self.work / "inputs.json")

    def folder(self, way: str) -> Path:
        """A new one."""
        self.runs += 1
        found = self.work / f"{way}-{self.runs}"
        found.mkdir()
        return found


Result = tuple[float, list[float | None]]
"""Seconds, and the last loss of each trial that was not stopped early."""


def train_whole(inputs: str, recipe: dict[str, Any], folder: str) -> dict[str, float]:
    """A trial of the ways that are not ours: load, train, save, score."""
    plain = Plain(Inputs.read(inputs))
    run = plain.begin(recipe)
    while run.steps_done < run.config.max_steps:
        metrics = run.step()
    run.save(Path(folder) / "last")
    result = {"loss": metrics.loss, "score": plain.score(run.model)}
    run.close()
    return result


def resident(bench: Bench, changes: dict[str, Any] | None = None) -> Result:
    """Our search; the recipes are given, so that they are those of the other ways."""
    folder = SweepFolder(bench.folder("resident"))
    experiment = bench.experiment.with_recipe(changes or {})
    began = time.monotonic()
    with runner.session(experiment, folder, bench.data, bench.monitor) as running:
        search(running)
        seconds = time.monotonic() - began
    last = [read_json_lines(folder.trial(name).metrics_file)[-1] for name in folder.trial_ids()]
    whole = experiment.train.max_steps
    return seconds, [line["loss"] if line["step"] == whole else None for line in last]


def stopping(bench: Bench) -> Result:
    """Packed, with losers stopped."""
    scheduler = {"type": "asha", "grace_period": bench.experiment.train.max_steps // 4}
    return resident(bench, {**PACKED, "sweep.scheduler": {**scheduler, "reduction_factor": 2}})


def tuned(
    bench: Bench, way: str, trial: Callable[[dict[str, Any]], None], **options: Any
) -> Result:
    """A Ray Tune sweep of the recipes."""
    folder = bench.folder(way)
    space = {"number": tune.grid_search(list(range(len(bench.recipes)))), "folder": str(folder)}
    began = time.monotonic()
    tune.Tuner(
        tune.with_resources(trial, {"cpu": 0.01}),
        param_space={**space, "inputs": bench.inputs, "recipes": bench.recipes},
        tune_config=tune.TuneConfig(max_concurrent_trials=bench.at_once, **options),
        run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
    ).fit()
    seconds = time.monotonic() - began
    files = sorted(folder.glob("*.json"), key=lambda file: int(file.stem))
    return seconds, [json.loads(file.read_text())["loss"] for file in files]


def function(bench: Bench) -> Result:
    """Tune functions that load model and data."""

    def trial(config: dict[str, Any]) -> None:
        folder = Path(config["folder"])
        number = config["number"]
        recipe = config["recipes"][number]
        result = train_whole(config["inputs"], recipe, str(folder / f"saved-{number}"))
        (folder / f"{number}.json").write_text(json.dumps(result))
        tune.report(result)

    return tuned(bench, "function", trial, reuse_actors=True)


def nested(bench: Bench) -> Result:
    """Tune functions that launch a trainer."""

    def loop(config: dict[str, Any]) -> None:
        folder = Path(config["folder"])
        number = config["number"]
        recipe = config["recipes"][number]
        result = train_whole(config["inputs"], recipe, str(folder / f"saved-{number}"))
        (folder / f"{number}.json").write_text(json.dumps(result))

    def trial(config: dict[str, Any]) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        TorchTrainer(
            loop,
            train_loop_config=config,
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(
                name=f"train-{config['number']}", storage_path=f"{config['folder']}/train"
            ),
        ).fit()

    return tuned(bench, "nested", trial)


def trainer(bench: Bench) -> Result:
    """Processes one after the other."""
    folder, losses = bench.folder("trainer"), []
    script = str(Path(__file__).with_name("makespan_trainer.py"))
    began = time.monotonic()
    for number, recipe in enumerate(bench.recipes):
        file = folder / f"{number}.json"
        file.write_text(json.dumps(recipe))
        command = [sys.executable, script, bench.inputs, str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"the trainer failed: {done.stderr[-2000:]}")
        losses.append(json.loads(done.stdout.splitlines()[-1])["loss"])
    return time.monotonic() - began, losses


WAYS: dict[str, Callable[[Bench], Result]] = {
    "resident": resident,
    "pixels": lambda bench: resident(bench, {"train.feature_cache_gb": 0.0}),
    "packed": lambda bench: resident(bench, PACKED),
    "stopping": stopping,
    "nested": nested,
    "function": function,
    "trainer": trainer,
}


@click.command()
@click.option("--trials", default=16, show_default=True)
@click.option("--steps", default=24, show_default=True)
@click.option("--repetitions", default=3, show_default=True)
@click.option("--at-once", default=1, show_default=True)
@click.option(
    "--way",
    "named",
    multiple=True,
    type=click.Choice(list(WAYS)),
    default=["nested", "function", "trainer"],
    show_default=True,
)
def main(trials: int, steps: int, repetitions: int, at_once: int, named: tuple[str, ...]) -> None:
    """Run the ways in turn; print seconds, medians and ratios to ours."""
    ways = {way: run for way, run in WAYS.items() if way in ("resident", *named)}
    work = Path(tempfile.mkdtemp(prefix="raytune_vlm-benchmark-"))
    points = recipes(trials)
    experiment = demo_experiment(
        work,
        [
            f"train.max_steps={steps}",
            "train.warmup_steps=2",
            f"sweep.num_trials={trials}",
            f"sweep.num_executors={at_once}",
            "sweep.include_default=false",
            "sweep.scheduler={type: fifo}",
            "sweep.searcher={type: random}",
            f"sweep.points_to_evaluate={json.dumps(points)}",
            "sweep.search_space={lora.rank: {type: choice, values: [8]}, train.learning_rate: "
            f"{{type: loguniform, lower: {LOWEST}, upper: {HIGHEST}}}}}",
        ],
    )
    found: dict[str, list[float]] = {way: [] for way in ways}
    losses: dict[str, list[float | None]] = {}
    with Monitor() as monitor, ray_session(experiment):
        data = preparing.prepare_data(experiment, preparing.plan_of(experiment), monitor)
        Inputs.of(experiment, data).write(work / "inputs.json")
        bench = Bench(work, experiment, data, monitor, at_once, points)
        for repetition in range(repetitions):
            for way, run in ways.items():
                seconds, losses[way] = run(bench)
                found[way].append(seconds)
                print(json.dumps({"repetition": repetition, "way": way, "s": seconds}), flush=True)
    medians = {way: statistics.median(values) for way, values in found.items()}
    ratios = {way: median / medians["resident"] for way, median in medians.items()}
    apart = {
        way: max(
            abs(a - b)
            for a, b in zip(values, losses["resident"], strict=True)
            if a is not None and b is not None
        )
        for way, values in losses.items()
    }
    figures = {"seconds": found, "medians": medians, "ratio_to_resident": ratios}
    load = {"load": os.getloadavg()[0]}
    print(json.dumps({**load, **figures, "largest_difference_of_last_loss": apart}, indent=1))


if __name__ == "__main__":
    main()

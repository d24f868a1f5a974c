"""Start latency of a trial: resident executor against a TorchTrainer launched inside each trial.

    python benchmarks/trial_start.py [--repetitions 3] [--output FILE.json]

Both ways train the shipped demo model on the demo's data in one Ray session on one machine,
interleaved. Latency runs from handing over the recipe (for the nested way: from `Tuner.fit`) to
the start of the first optimizer step. The nested way is what Ray Tune's guides show: a function
trainable that starts a `TorchTrainer`, whose worker imports torch and transformers, loads the base
model, puts the adapter on and steps.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import ray
from ray import tune

from raytune_vlm.config.loader import load_experiment
from raytune_vlm.demo.data import write_demo_data
from raytune_vlm.monitor import Monitor
from raytune_vlm.records import SweepFolder, read_json_lines
from raytune_vlm.sweep import preparing, runner
from raytune_vlm.sweep.cluster import ray_session
from raytune_vlm.sweep.jobs import Job
from raytune_vlm.sweep.worker import ExecutorSetup

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "demo.yaml"


def resident(running: runner.Session, number: int) -> float:
    """Seconds from submitting a trial to the start of its first step on the resident executor."""
    trial_id = f"t{number:04d}"
    job = Job(trial_id, "trial", trial_id, {"lora.rank": 4})
    began = time.time()
    ray.get(running.board.submit.remote(job))
    ray.get(running.board.next_report.remote(trial_id))
    first = read_json_lines(running.folder.trial(trial_id).metrics_file)[0]
    return float(first["time"] - first["seconds"]) - began


def nested_loop(config: dict[str, Any]) -> None:
    """A nested trainer's worker: everything from imports to one step."""
    from raytune_vlm.collate.pixels import PixelMaker
    from raytune_vlm.models.loading import load_base
    from raytune_vlm.prepare.store import open_split
    from raytune_vlm.train.run import Run, TrainingData
    from raytune_vlm.train.world import World

    setup: ExecutorSetup = config["setup"]
    world = World.current()
    base = load_base(setup.experiment.model, world.device)
    maker = PixelMaker(
        base.processor.image_processor,
        base.family,
        base.image_backend,
        setup.experiment.data.image_limits,
    )
    data = setup.data
    split = open_split(data.store, setup.index_file, "train", maker.decode)
    where = TrainingData(data.digest, data.store, setup.index_file, data.tier)
    run = Run(base, split, setup.experiment, world, where)
    first = run.step()
    Path(config["mark"]).write_text(str(first.time - first.seconds))


def nested(setup: ExecutorSetup, scratch: Path, number: int) -> float:
    """Seconds from `Tuner.fit` to the start of the first step of a trainer started in the trial."""
    mark = scratch / f"nested-{number}"

    def trial(config: dict[str, Any]) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        TorchTrainer(
            nested_loop,
            train_loop_config={"setup": setup, "mark": str(mark)},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name=f"nested-{number}", storage_path=str(scratch / "train")),
        ).fit()

    began = time.time()
    tune.Tuner(
        tune.with_resources(trial, {"cpu": 0.01}),
        run_config=tune.RunConfig(storage_path=str(scratch / "tune"), verbose=0),
    ).fit()
    return float(mark.read_text()) - began


@click.command()
@click.option("--repetitions", default=3, show_default=True)
@click.option("--output", type=click.Path(path_type=Path))
def main(repetitions: int, output: Path | None) -> None:
    """Measure both ways in turn and print the medians and their ratio."""
    scratch = Path(tempfile.mkdtemp(prefix="raytune_vlm-benchmark-"))
    write_demo_data(scratch / "data")
    experiment = preparing.located(
        load_experiment(
            EXPERIMENT,
            [
                f"data.root={scratch / 'data'}",
                f"storage_path={scratch}",
                "sweep.num_executors=1",
                "train.max_steps=2",
                "train.warmup_steps=1",
                "data.max_select_samples=4",
                "sweep.scheduler={type: fifo}",
            ],
        )
    )
    times: dict[str, list[float]] = {"nested": [], "resident": []}
    with Monitor() as monitor, ray_session(experiment):
        data = preparing.prepare_data(experiment, preparing.plan_of(experiment), monitor)
        folder = SweepFolder(scratch / "benchmark")
        folder.root.mkdir()
        setup = ExecutorSetup(
            name="nested",
            experiment=experiment,
            folder=str(folder.root),
            data=data.manifest,
            index_file=str(data.index_file),
            board=None,
            scratch=str(scratch),
        )
        with runner.session(experiment, folder, data, monitor) as running:
            monitor.say(f"first trial, executor's start included: {resident(running, 0):.2f} s")
            for number in range(repetitions):
                times["nested"].append(nested(setup, scratch, number))
                for place in range(3):
                    times["resident"].append(resident(running, 1 + 3 * number + place))
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["nested"] / medians["resident"]
    print(json.dumps({"seconds": times, "medians": medians, "ratio": ratio}, indent=1))
    if output is not None:
        output.write_text(json.dumps({"seconds": times, "medians": medians, "ratio": ratio}))


if __name__ == "__main__":
    main()

"""Start of a trial: resident executor against a TorchTrainer launched inside each Tune trial.

    python benchmarks/sweep_start.py [--repetitions 3]

Both ways train the shipped demo model on the demo's data in one Ray session on one machine,
interleaved. Latency runs from the moment at which a proxy (the nested way: the Tune function) has
its recipe, to the start of the first optimizer step; CPU seconds are those of all processes (Ray's
daemons and those that have ended included) from the same moment to the end of that step. The nested
way is what Ray Tune's guides show: a function trainable that starts a `TorchTrainer`, whose worker
imports torch and transformers, loads the base model, puts the adapter on and steps.

This process only watches: the driver is a child of it, so that its CPU time is counted too.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from data_path_cpu import TreeCpu

PLACES = 3
"""Trials of the resident executor for each nested one."""


def begin(marks: Path, name: str, step_file: Path) -> None:
    """Tell the watching process that a trial begins, and which file its first step will write."""
    mark = marks / f".{name}"
    mark.write_text(json.dumps({"name": name, "step_file": str(step_file), "time": time.time()}))
    mark.rename(marks / name)


def resident(running: Any, marks: Path, number: int) -> None:
    """A trial on the resident executor."""
    import ray

    from raytune_vlm.sweep.jobs import Job

    trial_id = f"t{number:04d}"
    begin(marks, f"resident-{number:03d}", running.folder.trial(trial_id).metrics_file)
    ray.get(running.board.submit.remote(Job(trial_id, "trial", trial_id, {"lora.rank": 4})))
    ray.get(running.board.next_report.remote(trial_id))


def nested_loop(config: dict[str, Any]) -> None:
    """A nested trainer's worker: everything from imports to one step."""
    from sweep_plain import Inputs, Plain

    run = Plain(Inputs.read(config["inputs"])).begin({"lora.rank": 4})
    first = run.step()
    row = {"time": first.time, "seconds": first.seconds}
    Path(config["step_file"]).write_text(json.dumps(row) + "\n")


def nested(work: Path, marks: Path, number: int) -> None:
    """A Tune trial that starts a trainer."""
    from ray import tune

    name = f"nested-{number:03d}"
    step_file = work / f"{name}.jsonl"

    def trial(config: dict[str, Any]) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        begin(marks, name, step_file)
        TorchTrainer(
            nested_loop,
            train_loop_config={"inputs": str(work / "inputs.json"), "step_file": str(step_file)},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name=name, storage_path=str(work / "train")),
        ).fit()

    tune.Tuner(
        tune.with_resources(trial, {"cpu": 0.01}),
        run_config=tune.RunConfig(storage_path=str(work / "tune"), verbose=0),
    ).fit()


def drive(work: Path, repetitions: int) -> None:
    """The driver's process: both ways in turn."""
    from sweep_plain import Inputs, demo_experiment

    from raytune_vlm.monitor import Monitor
    from raytune_vlm.records import SweepFolder
    from raytune_vlm.sweep import preparing, runner
    from raytune_vlm.sweep.cluster import ray_session

    marks = work / "marks"
    experiment = demo_experiment(
        work,
        [
            "sweep.num_executors=1",
            "train.max_steps=2",
            "train.warmup_steps=1",
            "sweep.scheduler={type: fifo}",
        ],
    )
    with Monitor() as monitor, ray_session(experiment):
        data = preparing.prepare_data(experiment, preparing.plan_of(experiment), monitor)
        Inputs.of(experiment, data).write(work / "inputs.json")
        folder = SweepFolder(work / "benchmark")
        folder.root.mkdir()
        with runner.session(experiment, folder, data, monitor) as running:
            resident(running, marks, 0)  # the executor's own start
            for number in range(repetitions):
                nested(work, marks, number)
                for place in range(PLACES):
                    resident(running, marks, 1 + PLACES * number + place)


def watch(driver: subprocess.Popen[bytes], marks: Path, tree: TreeCpu) -> list[dict[str, Any]]:
    """Latency and CPU seconds of every trial that the driver begins."""
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    while driver.poll() is None:
        for mark in sorted(marks.glob("[!.]*")):
            if mark.name in seen:
                continue
            before = tree.seconds()
            seen.add(mark.name)
            begun = json.loads(mark.read_text())
            step_file = Path(begun["step_file"])
            while driver.poll() is None:
                if step_file.exists() and (rows := step_file.read_text()).endswith("\n"):
                    first = json.loads(rows.splitlines()[0])
                    latency = first["time"] - first["seconds"] - begun["time"]
                    cpu = tree.seconds() - before
                    found.append({"name": begun["name"], "seconds": latency, "cpu_seconds": cpu})
                    print(json.dumps(found[-1]), flush=True)
                    break
                time.sleep(0.005)
        time.sleep(0.005)
    return found


@click.command()
@click.option("--repetitions", default=3, show_default=True)
@click.option("--driver", "driver_folder", type=click.Path(path_type=Path), hidden=True)
def main(repetitions: int, driver_folder: Path | None) -> None:
    """Measure both ways in turn and print the medians and their ratios."""
    if driver_folder is not None:
        drive(driver_folder, repetitions)
        return
    with tempfile.TemporaryDirectory(prefix="raytune_vlm-benchmark-") as name:
        work, tree = Path(name), TreeCpu()
        (work / "marks").mkdir()
        command = [sys.executable, __file__, "--driver", name, "--repetitions", str(repetitions)]
        with subprocess.Popen(command) as driver:
            found = watch(driver, work / "marks", tree)
        if driver.returncode:
            raise click.ClickException(f"the driver ended with status {driver.returncode}")
    figures: dict[str, Any] = {"load": os.getloadavg()[0]}
    for way in ("nested", "resident"):
        rows = [row for row in found if row["name"].startswith(way)]
        if way == "resident":
            figures["first"] = rows.pop(0)
        for key in ("seconds", "cpu_seconds"):
            values = [row[key] for row in rows]
            figures[f"{way}_{key}"] = {
                "median": statistics.median(values),
                "from": min(values),
                "to": max(values),
                "runs": len(values),
            }
    for key in ("seconds", "cpu_seconds"):
        medians = [figures[f"{way}_{key}"]["median"] for way in ("nested", "resident")]
        figures[f"ratio_{key}"] = medians[0] / medians[1]
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

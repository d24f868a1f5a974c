"""The plain Ray Tune sweep that `driver_kills.py` starts, kills and starts again.

    python benchmarks/driver_kills_tune.py TASK.json

A function trainable with ASHA and Optuna's TPE, which saves and reports a checkpoint as often as
our sweep does. Started a second time, it goes on by `Tuner.restore`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from optuna.samplers import TPESampler
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch
from sweep_plain import Inputs, Plain


def trial(config: dict[str, Any]) -> None:
    """Load, go on from the trial's checkpoint, train, report."""
    plain = Plain(Inputs.read(config["inputs"]))
    run = plain.begin(config["recipe"])
    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            run.restore(Path(folder) / "run")
    score = 0.0
    while run.steps_done < config["rungs"][-1]:
        step = run.step().step
        row = {"trial": tune.get_context().get_trial_id(), "step": step, "time": time.time()}
        with Path(config["log"]).open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        if step % config["checkpoint_every"] and step not in config["rungs"]:
            continue
        if step in config["rungs"]:
            score = plain.score(run.model)
        with tempfile.TemporaryDirectory() as name:
            run.save(Path(name) / "run")
            tune.report(
                {"step": step, "score": score}, checkpoint=tune.Checkpoint.from_directory(name)
            )


def tuner(task: dict[str, Any]) -> tune.Tuner:
    """The sweep, or what can be restored of it."""
    trainable = tune.with_resources(trial, {"cpu": 1})
    place = Path(task["folder"]) / "tune"
    if any(place.glob("experiment_state-*.json")):  # else it was killed before the first
        return tune.Tuner.restore(str(place), trainable, resume_errored=True)
    recipe = {
        "lora.rank": tune.choice([2, 4, 8, 16]),
        "train.learning_rate": tune.loguniform(5e-4, 4e-2),
    }
    given = {key: task[key] for key in ("inputs", "rungs", "checkpoint_every", "log")}
    sampler = TPESampler(seed=0, n_startup_trials=task["num_startup_trials"])
    return tune.Tuner(
        trainable,
        param_space={"recipe": recipe, **given},
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            search_alg=OptunaSearch(sampler=sampler),
            scheduler=AsyncHyperBandScheduler(
                time_attr="step",
                max_t=task["rungs"][-1],
                grace_period=task["rungs"][0],
                reduction_factor=task["reduction_factor"],
            ),
            num_samples=task["num_trials"],
            max_concurrent_trials=1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=task["folder"], verbose=0),
    )


def main(file: Path) -> None:
    """Run the sweep to its end and write what came of it."""
    task = json.loads(file.read_text())
    ray.init(address="local", num_cpus=3, logging_level="ERROR", log_to_driver=False)
    results = tuner(task).fit()
    trials = {
        result.metrics["trial_id"]: {
            "recipe": result.config["recipe"],
            "step": result.metrics["step"],
            "score": result.metrics["score"],
        }
        for result in results
        if result.metrics and result.config
    }
    Path(task["result"]).write_text(json.dumps(trials))
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

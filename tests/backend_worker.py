"""The runs of `test_backends.py`: by one worker in its own process, or by two that it starts.

python -m torch.distributed.run --nproc-per-node 2 backend_worker.py JOBS.json

JOBS.json holds a model, a prepared split and for each backend a list of runs, which one resident
base does one after the other, as in an executor. A run has `train` and `lora` sections, the step to
stop at, a checkpoint to begin from and one to write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from made import experiment

from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.evaluation import EvaluationConfig
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.evaluate.generate import Together, generate
from raytune_vlm.models.loading import Base, load_base
from raytune_vlm.prepare.blank import blank_sample
from raytune_vlm.prepare.store import PreparedSplit, open_split
from raytune_vlm.train.backends import BACKENDS, deepspeed
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World


def carry_out(jobs: dict[str, Any], runs: list[dict[str, Any]], world: World) -> dict[str, Any]:
    """Load a base, do runs with it one after the other; what came of each, by its name."""
    base = load_base(ModelConfig(name=jobs["model"]))
    maker = PixelMaker(base.processor.image_processor, base.family, None, ImageLimits())
    store = Path(jobs["store"])
    split, prompts = (
        open_split(store, store / "index.arrow", name, maker.decode) for name in ("train", "report")
    )
    train = experiment(train=runs[0]["train"]).train
    BACKENDS[train.backend].place(base, world, train)
    return {run["name"]: one_run(base, split, prompts, run, world) for run in runs}


def one_run(
    base: Base, split: PreparedSplit, prompts: PreparedSplit, job: dict[str, Any], world: World
) -> dict[str, Any]:
    """Train, save, answer, audit."""
    config = experiment(lora=job["lora"], train=job["train"])
    run = Run(base, split, config, world, TrainingData("d"))
    try:
        if "start" in job:
            run.restore(Path(job["start"]))
        steps = [run.step() for _ in range(run.steps_done, job["until"])]
        run.save(Path(job["save"]))
        together = None
        if BACKENDS[config.train.backend].is_sharded(config.train):
            together = Together(lambda count: max(world.gather(count)), blank_sample(base, prompts))
        rows = list(range(len(prompts.lengths)))[world.rank :: world.size]
        settings = EvaluationConfig(max_new_tokens=3, batch_size=2)
        answers = generate(run.model, base, prompts, rows, settings, together=together)
        run.audit_end(Path(job["save"]))
    finally:
        run.close()
    return {
        "losses": [metrics.loss for metrics in steps],
        "norms": [metrics.grad_norm for metrics in steps],
        "answers": {
            entry.sample_id: entry.text for part in world.gather(answers) for entry in part
        },
        "audit": {
            name: check["passed"] for name, check in run.auditor.checks.items() if "passed" in check
        },
    }


def main(file: Path) -> None:
    """Do the jobs of a file; rank 0 writes what came of a backend's runs beside it."""
    torch.set_num_threads(1)
    deepspeed.WHOLE_BELOW = 0  # the tiny model has nothing larger
    dist.init_process_group("gloo")
    jobs = json.loads(file.read_text())
    world = World(dist.get_rank(), dist.get_world_size())
    for name, runs in jobs["runs"].items():
        found = carry_out(jobs, runs, world)
        if world.rank == 0:
            (file.parent / f"{name}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

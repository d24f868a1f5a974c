"""The runs of `test_backends.py`: by one worker in its own process, or by some that it starts.

python ranks.py 2 backend_worker.py JOBS.json

JOBS.json holds a model, a prepared split and for each setting of a backend a list of runs, which
one resident base does one after the other, as in an executor. A run has `train` and `lora`
sections, the step to stop at, perhaps a checkpoint to begin from, and checkpoints to write.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from made import experiment
from torch.distributed.tensor import DTensor

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
    train = experiment(lora=runs[0]["lora"], train=runs[0]["train"]).train
    BACKENDS[train.backend].place(base, world, train)
    found, left = {}, []
    for run in runs:
        found[run["name"]] = one_run(base, split, prompts, run, world)
        # The first trial may set up what the others use.
        if run in (*runs[1:2], runs[-1]):
            left.append(left_behind(base))
    return {**found, "left": left}


def left_behind(base: Base) -> dict[str, Any]:
    """What a trial could leave behind: hooks, process groups, engines, changed weights."""
    gc.collect()
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    modules = list(base.model.modules())
    names = [type(entry).__name__ for entry in gc.get_objects()]
    weights = 0.0
    for parameter in base.model.parameters():
        part = getattr(parameter, "ds_tensor", parameter).detach()
        weights += float((part.to_local() if isinstance(part, DTensor) else part).double().sum())
    return {
        "hooks": sum(len(getattr(module, kind)) for module in modules for kind in kinds),
        "groups": len(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else 0,
        "engines": names.count("DeepSpeedEngine"),
        "optimizers": names.count("DeepSpeedZeroOptimizer") + names.count("AdamW"),
        "adapters": sum("lora" in type(module).__module__ for module in modules),
        "weights": weights,
    }


def one_run(
    base: Base, split: PreparedSplit, prompts: PreparedSplit, job: dict[str, Any], world: World
) -> dict[str, Any]:
    """Train, save, answer, audit."""
    config = experiment(lora=job["lora"], train=job["train"])
    run = Run(base, split, config, world, TrainingData("d"))
    saves = {int(step): Path(folder) for step, folder in job["saves"].items()}
    steps, images, answers = [], [], []
    try:
        if "start" in job:
            run.restore(Path(job["start"]))
        while run.steps_done < job["until"]:
            fault = job.get("faults", {}).get(str(run.steps_done + 1))
            steps.append(step(run, fault, is_first=world.rank == 0))
            images.append(int(split.num_images[list(run.delivered)].sum()))
            if run.steps_done in saves:
                run.save(saves[run.steps_done])
        if job.get("answers"):
            answers = answered(run, base, prompts, world)
        run.audit_end(saves[job["until"]])
    finally:
        run.close()
    by_rank = torch.tensor(world.gather(images))
    return {
        "losses": [metrics.loss for metrics in steps],
        "norms": [metrics.grad_norm for metrics in steps],
        "micro_batch": steps[-1].micro_batch_size,
        "skipped": [metrics.step for metrics in steps if metrics.skipped],
        "text_only": [int((by_rank == 0).all(0).sum()), int((by_rank == 0).any(0).sum())],
        "answers": {
            entry.sample_id: entry.text for part in world.gather(answers) for entry in part
        },
        "audit": {
            name: check["passed"] for name, check in run.auditor.checks.items() if "passed" in check
        },
    }


def step(run: Run, fault: str | None, *, is_first: bool) -> Any:
    """An optimizer step, in which something goes wrong on the first rank.

    `memory`: it does not suffice for the first forward pass. `weight`: one of the adapter is not a
    number. `gradient`: one of the adapter is not, which the loss does not tell.
    """
    if fault is None or not is_first:
        return run.step()
    weight = [p for p in run.model.parameters() if p.requires_grad][-1]
    kept = weight.detach().clone()
    handle: Any = None

    def fail(*_: object) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("of a test")

    if fault == "weight":
        weight.data.fill_(torch.nan)
    elif fault == "gradient":
        handle = weight.register_hook(lambda gradient: gradient * torch.nan)
    else:
        handle = run.model.register_forward_pre_hook(fail)
    metrics = run.step()
    if fault == "weight":
        weight.data.copy_(kept)
    if handle is not None:
        handle.remove()
    return metrics


def answered(run: Run, base: Base, prompts: PreparedSplit, world: World) -> list[Any]:
    """This rank's answers."""
    train, together = run.config, None
    if BACKENDS[train.backend].is_sharded(train):
        together = Together(lambda count: max(world.gather(count)), blank_sample(base, prompts))
    rows = list(range(len(prompts.lengths)))[world.rank :: world.size]
    settings = EvaluationConfig(max_new_tokens=3, batch_size=2)
    return generate(run.model, base, prompts, rows, settings, together=together)


def main(file: Path) -> None:
    """Do the jobs of a file; rank 0 writes what came of a setting's runs beside it."""
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

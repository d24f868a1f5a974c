"""The two workers of `test_step.py`, of which the second runs out of memory.

python ranks.py 2 step_worker.py JOBS.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from made import experiment

from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.models.loading import load_base
from raytune_vlm.prepare.store import open_split
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World


@contextmanager
def short_of_memory(model: torch.nn.Module, rows: int) -> Iterator[None]:
    """Let forward passes of more than so many rows run out of memory, inside the model."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]

    def refuse(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if model.training and len(inputs[0]) > rows:
            raise torch.OutOfMemoryError(f"{len(inputs[0])} rows\nand a second line")

    hook = head.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def train(jobs: dict[str, Any], world: World, save: Path, short: bool = False, **own: Any) -> Any:
    """Three steps; the losses."""
    base = load_base(ModelConfig(name=jobs["model"]))
    maker = PixelMaker(base.processor.image_processor, base.family, None, ImageLimits())
    store = Path(jobs["store"])
    split = open_split(store, store / "index.arrow", "train", maker.decode)
    config = experiment(train={**jobs["train"], "num_workers": world.size, **own})
    run = Run(base, split, config, world, TrainingData("d"))
    try:
        with short_of_memory(base.model, 2) if short else nullcontext():
            steps = [run.step() for _ in range(3)]
        run.save(save)
    finally:
        run.close()
    losses = [step.loss for step in steps]
    return {"losses": losses, "micro_batch_size": steps[-1].micro_batch_size}


def main(file: Path) -> None:
    """Train with too little memory on rank 1, and with a small micro-batch from the start."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    jobs, folder = json.loads(file.read_text()), file.parent
    world = World(dist.get_rank(), dist.get_world_size())
    short = train(jobs, world, folder / "short", short=world.rank == 1)
    small = train(jobs, world, folder / "small", micro_batch_size=2)
    if world.rank == 0:
        (folder / "found.json").write_text(json.dumps({"short": short, "small": small}))
    dist.destroy_process_group()

"""A worker of `test_packed_workers.py`: packed slots against isolated runs of the same group.

python ranks.py 2 packed_worker.py JOBS.json

JOBS.json holds a model, a prepared split and the backends. For each of them one resident base does
its checks one after the other; rank 0 writes what they found to BACKEND.json beside it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from made import experiment

from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.config.data import ImageLimits
from raytune_vlm.config.model import ModelConfig
from raytune_vlm.models.loading import load_base
from raytune_vlm.packed.host import Host, Mode
from raytune_vlm.packed.planner import measure
from raytune_vlm.packed.slot import Slot
from raytune_vlm.prepare.store import open_split
from raytune_vlm.train.backends import BACKENDS
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

TRAIN = {"max_steps": 8, "warmup_steps": 1, "batch_size": 6, "micro_batch_size": 3}
LONG, LEAVING, COMING = (
    {"lora.rank": 2, "lora.dropout": 0.1, "train.learning_rate": 3e-3},
    {"lora.rank": 4, "lora.dropout": 0.3, "train.batch_size": 4, "train.micro_batch_size": 1},
    {"lora.init": "olora", "train.batch_size": 2, "train.max_grad_norm": 0.01, "seed": 3},
)
"""The first takes three steps, the second two, and in its place the third one."""

Found = tuple[list[float], dict[str, torch.Tensor]]


class Group:
    """This worker's part of all checks with a backend."""

    def __init__(self, jobs: dict[str, Any], backend: str, world: World) -> None:
        self.world, self.folder = world, Path(jobs["folder"]) / backend
        self.base = load_base(ModelConfig(name=jobs["model"]))
        maker = PixelMaker(
            self.base.processor.image_processor, self.base.family, None, ImageLimits()
        )
        store = Path(jobs["store"])
        self.split = open_split(store, store / "index.arrow", "train", maker.decode)
        train = {**TRAIN, "backend": backend, "num_workers": world.size}
        self.plain = experiment(lora={"rank": 2}, train=train)
        BACKENDS[backend].place(self.base, world, self.plain.train)

    def run(self, recipe: dict[str, Any]) -> Run:
        """A run of a recipe, on the base."""
        config = self.plain.with_recipe(recipe)
        return Run(self.base, self.split, config, self.world, TrainingData("d"))

    def slot(self, recipe: dict[str, Any]) -> Slot:
        """The same, parked."""
        return Slot(self.run(recipe), self.world.device)

    def alone(self, recipe: dict[str, Any], steps: int, start: Path | None = None) -> Found:
        """Losses and weights of an isolated run, which may go on from a checkpoint."""
        run = self.run(recipe)
        try:
            if start is not None:
                run.restore(start)
            return [run.step().loss for _ in range(steps)], trained(run)
        finally:
            run.close()

    def packed(self, mode: Mode) -> list[Found]:
        """Losses and weights of the three slots: one comes where another one leaves."""
        host = Host(self.base, mode, self.world)
        losses: list[list[float]] = [[], [], []]
        slots = {0: self.slot(LONG), 1: self.slot(LEAVING)}
        found: dict[int, Found] = {}
        for step in range(3):
            outcomes: list[Any] = host.step(list(slots.values()))
            for number, outcome in zip(slots, outcomes, strict=True):
                losses[number].append(outcome.loss)
            if step == 1:
                with slots.pop(1).mounted() as run:
                    found[1] = losses[1], trained(run)
                    run.save(self.folder / "left")
                    run.audit_end(self.folder / "left")
                    run.close()
                with slots[0].mounted() as run:  # after forward passes without a backward pass
                    run.save(self.folder / mode)
                slots[2] = self.slot(COMING)
        for number, slot in slots.items():
            with slot.mounted() as run:
                found[number] = losses[number], trained(run)
            slot.close()
        assert not host.notes, host.notes
        return [found[number] for number in range(3)]

    def one_rank_without_memory(self) -> dict[str, Any]:
        """Rank 1 cannot pack three slots; what `Host` says on each rank, and the losses."""
        host = Host(self.base, "fast", self.world)
        slots = [self.slot(recipe) for recipe in (LONG, LEAVING, COMING)]

        def fail() -> None:
            raise torch.OutOfMemoryError("of a test")

        with hooked(self.base.model, fail if self.world.rank == 1 else None):
            outcomes: list[Any] = host.step(slots)
        for slot in slots:
            slot.close()
        told = self.world.gather((host.together, host.notes))
        return {"told": told, "losses": [outcome.loss for outcome in outcomes]}

    def everywhere(self) -> str:
        """An error of a slot's own step on every rank: no other slot is begun after it."""
        slots, begun = [self.slot(LONG), self.slot(LEAVING)], []

        def fail() -> None:
            begun.append(1)
            raise RuntimeError("of a test")

        with hooked(self.base.model, fail, times=2):
            try:
                Host(self.base, "exact", self.world).step(slots)
            except RuntimeError as error:
                return f"{error} {len(begun)}"
            finally:
                for slot in slots:
                    slot.close()
        return "nothing"

    def planned(self) -> list[Any]:
        """What every rank's planner measures of one slot and of two."""
        host = Host(self.base, "fast", self.world)
        probes, _ = measure(host, lambda number: self.run({"seed": number}), self.world, 2)
        found: list[Any] = self.world.gather([asdict(probe) for probe in probes])
        return found


@contextmanager
def hooked(model: torch.nn.Module, fail: Any, times: int = 1) -> Iterator[None]:
    """Let `fail` be called where the first passes begin."""
    left = [fail] * times if fail is not None else []
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    hook = embedding.register_forward_pre_hook(lambda *_: left.pop()() if left else None)
    try:
        yield
    finally:
        hook.remove()


def trained(run: Run) -> dict[str, torch.Tensor]:
    """What is trained, by name."""
    return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def distance(found: Found, expected: Found) -> float:
    """The largest relative difference of a loss or of a matrix (Frobenius norms)."""
    (losses, adapter), (expected_losses, expected_adapter) = found, expected
    assert adapter.keys() == expected_adapter.keys() and len(losses) == len(expected_losses)
    of_losses = (abs(x / y - 1) for x, y in zip(losses, expected_losses, strict=True))
    of_weights = (
        float((adapter[name] - weight).norm() / weight.norm().clamp_min(1e-12))
        for name, weight in expected_adapter.items()
    )
    return max(*of_losses, *of_weights)


def checks(group: Group) -> dict[str, Any]:
    """Every check's figures."""
    expected = [
        group.alone(recipe, steps) for recipe, steps in ((LONG, 3), (LEAVING, 2), (COMING, 1))
    ]
    (*_, last), adapter = expected[0]
    found: dict[str, Any] = {"losses": [losses[0] for losses, _ in expected]}
    modes: tuple[Mode, ...] = ("exact", "fast")
    for mode in modes:
        packed = group.packed(mode)
        pairs = zip(packed, expected, strict=True)
        found[mode] = [distance(ours, theirs) for ours, theirs in pairs]
    if group.plain.train.backend == "ddp":
        found["memory"] = group.one_rank_without_memory()
    else:
        continued = group.alone(LONG, 1, start=group.folder / "fast")
        found["continued"] = distance(continued, ([last], adapter))
        found["planned"] = group.planned()
        found["everywhere"] = group.everywhere()
    return found


def main(file: Path) -> None:
    """Do all checks with every backend."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    jobs = json.loads(file.read_text())
    for backend in jobs["backends"]:
        found = checks(Group(jobs, backend, world))
        if world.rank == 0:
            (file.parent / f"{backend}.json").write_text(json.dumps(found))
    dist.destroy_process_group()

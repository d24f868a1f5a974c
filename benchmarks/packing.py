"""Several trials on one base: one after another, in slots, packed, with and without features.

    python benchmarks/packing.py [--slots 8] [--steps 3] [--repetitions 3] [--model-size small]

The trials differ in rank, learning rate and seed, and train on the same prepared samples in the
order that each one's seed gives. Every way does the same steps of all of them, in one process, and
the ways are interleaved; a repetition begins without any features. `alone` is what the isolated
executor does: a trial to its end, then the next one. Given for each: seconds (on CPU those of one
thread, so that what else runs takes none of them), as a multiple of `alone` with pixels, and the
largest relative difference of a loss from `alone` with pixels.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import psutil
import torch
from packed_rows import write_split
from packing_table import now
from train_step import SIZES, experiment, random_base

from raytune_vlm.collate.features import Features
from raytune_vlm.config import ExperimentConfig
from raytune_vlm.models.loading import Base
from raytune_vlm.packed.host import Host
from raytune_vlm.packed.slot import Slot
from raytune_vlm.prepare.store import PreparedSplit
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.step_metrics import StepMetrics
from raytune_vlm.train.world import World

RANKS = (4, 8, 16, 32)
FEATURE_BYTES = 4 * 10**9


@dataclass(frozen=True)
class Way:
    """How the trials are trained."""

    name: str
    packing: Literal["exact", "fast"] | None
    features: bool


WAYS = (
    Way("alone, pixels", None, features=False),
    Way("alone, features", None, features=True),
    Way("slots exact, features", "exact", features=True),
    Way("slots fast, pixels", "fast", features=False),
    Way("slots fast, features", "fast", features=True),
)


def recipes(count: int, rows: int) -> list[ExperimentConfig]:
    """So many different trials of `rows` samples a step."""
    plain = experiment(1)
    return [
        plain.with_recipe(
            {
                "lora.rank": RANKS[number % len(RANKS)],
                "train.learning_rate": 1e-4 * (1 + number),
                "train.batch_size": rows,
                "train.micro_batch_size": rows,
            }
        )
        for number in range(count)
    ]


@dataclass(frozen=True)
class Bench:
    """The base, the samples and the trials."""

    base: Base
    split: PreparedSplit
    trials: list[ExperimentConfig]
    steps: int
    device: str

    def carry_out(self, way: Way) -> tuple[float, list[list[float]]]:
        """Seconds of all steps of all trials, and their losses."""
        features = Features(self.base, self.device, FEATURE_BYTES) if way.features else None
        began = now(self.device)
        if way.packing is None:
            losses = [self._alone(trial, features) for trial in self.trials]
        else:
            losses = self._slots(way.packing, features)
        return now(self.device) - began, losses

    def _run(self, trial: ExperimentConfig, features: Features | None) -> Run:
        world = World(device=self.device)
        return Run(self.base, self.split, trial, world, TrainingData("b"), features=features)

    def _alone(self, trial: ExperimentConfig, features: Features | None) -> list[float]:
        run = self._run(trial, features)
        try:
            return [run.step().loss for _ in range(self.steps)]
        finally:
            run.close()

    def _slots(
        self, packing: Literal["exact", "fast"], features: Features | None
    ) -> list[list[float]]:
        slots = [Slot(self._run(trial, features), self.device) for trial in self.trials]
        host = Host(self.base, packing)
        losses: list[list[float]] = [[] for _ in slots]
        for _ in range(self.steps):
            for found, outcome in zip(losses, host.step(slots), strict=True):
                if not isinstance(outcome, StepMetrics):
                    raise outcome
                found.append(outcome.loss)
        for slot in slots:
            slot.close()
        for note in host.notes:
            click.echo(f"note: {note}")
        return losses


@click.command(context_settings={"show_default": True})
@click.option("--slots", default=8, help="Trials.")
@click.option("--rows", default=2, help="Samples of a step of each.")
@click.option("--steps", default=3, help="Steps of each.")
@click.option("--repetitions", default=3, help="Of every way, interleaved.")
@click.option("--samples", default=24, help="Prepared samples.")
@click.option("--side", default=224, help="Pixels of an image's side.")
@click.option("--model-size", default="small", type=click.Choice(list(SIZES)))
def main(
    slots: int, rows: int, steps: int, repetitions: int, samples: int, side: int, model_size: str
) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        base = random_base(model_size, device)
        split = write_split(base, Path(temporary) / "data", samples, side)
        bench = Bench(base, split, recipes(slots, rows), steps, device)
        bench.carry_out(WAYS[0])  # warm
        seconds: dict[str, list[float]] = {way.name: [] for way in WAYS}
        losses: dict[str, list[list[float]]] = {}
        for _ in range(repetitions):
            for way in WAYS:
                took, losses[way.name] = bench.carry_out(way)
                seconds[way.name].append(took)
        tokens = statistics.mean(split.lengths.tolist()) * rows
    weights = sum(p.numel() for p in base.model.parameters())
    click.echo(
        f"{slots} trials of {steps} steps of {rows} rows (about {tokens:.0f} tokens), a base of "
        f"{weights / 1e6:.1f} M parameters on {device}, load {os.getloadavg()[0]:.1f}, "
        f"{psutil.cpu_count()} CPUs"
    )
    own = statistics.median(seconds[WAYS[0].name])
    for way in WAYS:
        median = statistics.median(seconds[way.name])
        pairs = zip(losses[way.name], losses[WAYS[0].name], strict=True)
        apart = max(
            abs(a - b) / b for mine, plain in pairs for a, b in zip(mine, plain, strict=True)
        )
        click.echo(
            f"{way.name:22} {median:7.2f} s ({min(seconds[way.name]):.2f} to "
            f"{max(seconds[way.name]):.2f}): {own / median:.2f} times as fast, losses within "
            f"{apart:.1e}"
        )


if __name__ == "__main__":
    main()

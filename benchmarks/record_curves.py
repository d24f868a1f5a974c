"""Learning curves of real LoRA trials on the demo's data, recorded once for `schedulers.py`.

    python benchmarks/record_curves.py --work runs/curves [--curves 240] [--minutes 60]
    python benchmarks/record_curves.py --work runs/curves --pack benchmarks/curves/demo.json.gz

Curve number k is a function of k alone: its recipe is drawn from a generator seeded with k, every
fifth one repeats the recipe before it with another seed. A curve is one line of `curves.jsonl` in
the work folder, so the command goes on where it was left, and several may work at once with
`--part 0/2`, `--part 1/2`.

The recipes are those of the demo's search space (rank, learning rate), and beyond it dropout,
schedule, scope and batch size. Every one is trained for 72 steps on one thread and scored by what
it generates at eight budgets, on 32 samples of `select`; at the end also on 64 samples of `report`,
which stand for its true score.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from raytune_vlm.cli import DEMO_EXPERIMENT
from raytune_vlm.collate.pixels import PixelMaker
from raytune_vlm.config import ExperimentConfig
from raytune_vlm.config.loader import load_experiment
from raytune_vlm.demo.data import write_demo_data
from raytune_vlm.errors import TrialDiverged
from raytune_vlm.evaluate.generate import generate
from raytune_vlm.evaluate.metrics import METRICS
from raytune_vlm.models.loading import Base, load_base
from raytune_vlm.monitor import Monitor
from raytune_vlm.prepare.store import PreparedSplit, open_split
from raytune_vlm.records import DataManifest, read_json_lines
from raytune_vlm.references import read_reference
from raytune_vlm.sweep.runner import prepare_only
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

BUDGETS = (8, 9, 12, 18, 24, 36, 48, 72)
NUM_SAMPLES = {"select": 32, "report": 64}
METRIC_NAMES = ("field_f1@donut", "nted@donut")
REPEATED = 5
"""Every fifth curve has the recipe of the one before it, and another seed."""


def recipe_of(number: int) -> dict[str, Any]:
    """The recipe of a curve."""
    own = number - 1 if number % REPEATED == REPEATED - 1 else number
    draw = np.random.default_rng(own)
    low, high = np.log(5e-4), np.log(4e-2)
    return {
        "lora.rank": int(draw.choice([2, 4, 8, 16])),
        "train.learning_rate": float(f"{np.exp(draw.uniform(low, high)):.4g}"),
        "lora.dropout": float(draw.choice([0.0, 0.05, 0.2])),
        "train.schedule": str(draw.choice(["constant", "linear", "cosine", "wsd"])),
        "lora.scope": str(draw.choice(["text", "text+projector", "text+projector+vision"])),
        "train.batch_size": int(draw.choice([2, 4, 8])),
        "seed": number,
    }


class Recorder:
    """The loaded base model and data, and the loop over curves."""

    def __init__(self, work: Path) -> None:
        torch.set_num_threads(1)
        overrides = (
            f"data.root={work / 'data'}",
            f"storage_path={work}",
            "sweep.num_executors=1",
            f"train.max_steps={BUDGETS[-1]}",
            "train.warmup_steps=6",
        )
        self.experiment = load_experiment(DEMO_EXPERIMENT, overrides)
        write_demo_data(work / "data")
        with Monitor() as monitor:
            prepared = prepare_only(self.experiment, monitor=monitor)
        self.manifest: DataManifest = prepared.manifest
        self.base: Base = load_base(self.experiment.model)
        maker = PixelMaker(
            self.base.processor.image_processor,
            self.base.family,
            self.base.image_backend,
            self.experiment.data.image_limits,
        )
        self.index = str(prepared.index_file)
        self.splits: dict[str, PreparedSplit] = {
            name: open_split(self.manifest.store, self.index, name, maker.decode)
            for name in ("train", "select", "report")
        }
        self.rows = {
            name: self.splits[name].fixed_choice(count) for name, count in NUM_SAMPLES.items()
        }

    def record(self, number: int) -> dict[str, Any]:
        """Train one recipe and score it at every budget."""
        began, recipe = time.process_time(), recipe_of(number)
        experiment = self.experiment.with_recipe(recipe)
        data = TrainingData(self.manifest.digest, self.manifest.store, self.index)
        run = Run(self.base, self.splits["train"], experiment, World(), data)
        curve: dict[str, Any] = {"number": number, "recipe": recipe, "select": [], "loss": []}
        tokens: list[int] = []
        scoring = 0.0
        try:
            losses: list[float] = []
            for budget in BUDGETS:
                while run.steps_done < budget:
                    metrics = run.step()
                    losses.append(metrics.loss)
                    tokens.append(metrics.labelled_tokens)
                trained = time.process_time()
                curve["select"].append(self.score(run.model, experiment, "select"))
                scoring += time.process_time() - trained
                curve["loss"].append(round(float(np.mean(losses[-8:])), 4))
            curve["report"] = self.score(run.model, experiment, "report")
        except TrialDiverged as error:
            curve["failed"] = str(error)
        finally:
            run.close()
        curve["labelled_tokens"] = sum(tokens)
        curve["cpu_seconds"] = round(time.process_time() - began, 1)
        curve["scoring_cpu_seconds"] = round(scoring, 1)
        return curve

    def score(self, model: Any, experiment: ExperimentConfig, split: str) -> dict[str, Any]:
        """Per sample and metric: the value times its weight, and the weight, whose sums make the
        score."""
        found = generate(
            model, self.base, self.splits[split], self.rows[split], experiment.evaluation
        )
        assert found is not None
        references = [read_reference(entry.reference) for entry in found]
        scores: dict[str, Any] = {}
        for name in METRIC_NAMES:
            results = METRICS[name].score_all([entry.text for entry in found], references)
            scores[name] = {
                "sum": [round(entry.value * entry.weight, 3) for entry in results],
                "weight": [round(entry.weight, 3) for entry in results],
            }
        return scores


def pack(rows: list[dict[str, Any]], file: Path) -> None:
    """Write the curves as one file, those of the same length with their weights once."""
    rows = sorted(rows, key=lambda row: row["number"])
    plain = {
        "budgets": BUDGETS,
        "num_samples": NUM_SAMPLES,
        "metrics": METRIC_NAMES,
        "curves": rows,
    }
    text = json.dumps(plain, separators=(",", ":"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream, gzip.GzipFile(fileobj=stream, mode="wb", mtime=0) as packed:
        packed.write(text.encode())
    click.echo(f"{len(rows)} curves, {file.stat().st_size} bytes: {file}")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Data and curves.")
@click.option("--curves", default=240, show_default=True, help="How many there shall be.")
@click.option("--part", default="0/1", show_default=True, help="K/N: the curves k with k % N = K.")
@click.option("--minutes", default=600.0, show_default=True, help="Begin no curve after so long.")
@click.option("--pack", "output", type=click.Path(path_type=Path), help="Write this file; no run.")
def main(work: Path, curves: int, part: str, minutes: float, output: Path | None) -> None:
    """Record the curves that are not there yet, or pack those that are."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    file = work / "curves.jsonl"
    if output is not None:
        pack(read_json_lines(file), output)
        return
    own, parts = map(int, part.split("/"))
    there = {row["number"] for row in read_json_lines(file)} if file.exists() else set()
    left = [k for k in range(curves) if k % parts == own and k not in there]
    recorder, end = Recorder(work), time.monotonic() + 60 * minutes
    for number in left:
        if time.monotonic() > end:
            break
        line = json.dumps(recorder.record(number), separators=(",", ":")) + "\n"
        # One write a line, so that several processes may append.
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, line.encode())
        os.close(descriptor)
        click.echo(f"curve {number}: {len(line)} bytes")


if __name__ == "__main__":
    main()

"""Memory of several trials: as slots of one process, and as processes that each hold a base.

    python benchmarks/slot_memory.py [--slots 1,4,8,16] [--processes 2,4] [--model-size small]

Every process is a real one (Linux) that loads the base from files, makes its trials and does a step
of each; the processes of a line are alive together. Given is what would be free without all of them
(libraries, which other processes have too, are left out), after the step and at most until then:
what each has for itself, and once the file of the base's weights, as far as it is mapped. What else
runs on the machine changes nothing of it.
"""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import click
import psutil
import torch
from packed_rows import write_split
from packing import recipes
from packing_table import numbers, stepped
from train_step import SIZES, opened, write_model

from raytune_vlm.config.model import ModelConfig
from raytune_vlm.models.loading import load_base
from raytune_vlm.packed.host import Host
from raytune_vlm.packed.slot import Slot
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.world import World

Packing = Literal["exact", "fast"]


def hold(folder: Path, slots: int, packing: Packing, rows: int) -> None:
    """A process: a base and some trials, a step of each; says so and waits for its end."""
    torch.set_num_threads(1)
    base = load_base(ModelConfig(name=str(folder / "model")))
    split = opened(base, folder / "data")
    held = [
        Slot(Run(base, split, trial, World(), TrainingData("b")), "cpu")
        for trial in recipes(slots, rows)
    ]
    stepped(Host(base, packing).step(held), rows)
    gc.collect()
    click.echo("ready")
    sys.stdin.read()


def owned(
    folder: Path, processes: int, slots: int, packing: Packing, rows: int
) -> tuple[int, int, int]:
    """Bytes that all processes take after a step, and at most; of them those of mapped files."""
    command = [sys.executable, __file__, "--hold", str(folder), "--rows", str(rows)]
    command += ["--slots", str(slots), "--packing", packing]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(processes)]
    try:
        for process in started:
            if "ready" not in process.stdout.readline():
                raise click.ClickException(f"a process with {slots} slots ended before its step")
        found = [own(process.pid, folder) for process in started]
    finally:
        for process in started:
            process.communicate()
    after, most, mapped = zip(*found, strict=True)
    return sum(after) + max(mapped), sum(most) + max(mapped), max(mapped)


def own(pid: int, folder: Path) -> tuple[int, int, int]:
    """Bytes of a process alone, now and at most (sharing as much as now), without what it has
    mapped of files in a folder; those."""
    process = psutil.Process(pid)
    memory = process.memory_full_info()
    files = [entry for entry in process.memory_maps() if entry.path.startswith(str(folder))]
    after = memory.uss - sum(entry.private_clean + entry.private_dirty for entry in files)
    status = Path(f"/proc/{pid}/status").read_text()
    most = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    return after, after + most - memory.rss, sum(entry.rss for entry in files)


def told(what: str, found: tuple[int, int, int]) -> None:
    """Print a line."""
    click.echo(f"{what:16} " + " ".join(f"{entry / 1e6:7.0f}" for entry in found))


@click.command(context_settings={"show_default": True})
@click.option("--slots", default="1,4,8,16", callback=numbers, help="Of one process.")
@click.option("--processes", default="2,4", callback=numbers, help="Of one slot each.")
@click.option("--packing", "packings", multiple=True, default=["exact", "fast"])
@click.option("--rows", default=2, help="Samples of a step of each trial.")
@click.option("--side", default=224, help="Pixels of an image's side.")
@click.option("--model-size", default="small", type=click.Choice(list(SIZES)))
@click.option("--hold", "folder", type=click.Path(path_type=Path), hidden=True)
def main(
    slots: list[int],
    processes: list[int],
    packings: tuple[Packing, ...],
    rows: int,
    side: int,
    model_size: str,
    folder: Path | None,
) -> None:
    """Measure each line by itself and print it."""
    if folder is not None:
        hold(folder, slots[0], packings[0], rows)
        return
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        settings = write_model(place / "model", model_size)
        base = load_base(settings)
        weights = sum(p.nbytes for p in base.model.parameters())
        write_split(base, place / "data", 8, side)
        del base
        click.echo(f"base of {weights / 1e6:.0f} MB; MB after a step, at most, of a mapped file:")
        for packing in packings:
            for count in slots:
                told(f"{count} slots, {packing}", owned(place, 1, count, packing, rows))
        for count in processes:
            told(f"{count} processes", owned(place, count, 1, "exact", rows))


if __name__ == "__main__":
    main()

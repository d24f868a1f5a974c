"""Memory of several trials: as slots of one process, and as processes that each hold a base.

    python benchmarks/slot_memory.py [--slots 1,4,8,16] [--processes 2,4] [--model-size small]

Every process is a real one (Linux) that loads the base from files, makes its trials and does a step
of each; the processes of a line are alive together. Given is the memory of their own: what would be
free without them, so that what they share with others, libraries say, is not counted; after the
step, and at most until then. What else runs on the machine changes nothing of it.
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


def owned(folder: Path, processes: int, slots: int, packing: Packing, rows: int) -> list[int]:
    """Bytes of their own that all processes have after a step, and had at most."""
    command = [sys.executable, __file__, "--hold", str(folder), "--rows", str(rows)]
    command += ["--slots", str(slots), "--packing", packing]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, **pipes) for _ in range(processes)]
    try:
        for process in started:
            if "ready" not in process.stdout.readline():
                raise click.ClickException(f"a process with {slots} slots ended before its step")
        return [sum(part) for part in zip(*(own(p.pid) for p in started), strict=True)]
    finally:
        for process in started:
            process.communicate()


def own(pid: int) -> tuple[int, int]:
    """A process's own bytes now, and at most (of what it shares, as much as now)."""
    memory = psutil.Process(pid).memory_full_info()
    status = Path(f"/proc/{pid}/status").read_text()
    most = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    return memory.uss, most - (memory.rss - memory.uss)


def told(what: str, found: list[int]) -> None:
    """Print a line."""
    click.echo(f"{what:16} {found[0] / 1e6:7.0f} {found[1] / 1e6:7.0f}")


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
        click.echo(f"base of {weights / 1e6:.0f} MB; MB of their own after a step, and at most:")
        for packing in packings:
            for count in slots:
                told(f"{count} slots, {packing}", owned(place, 1, count, packing, rows))
        for count in processes:
            told(f"{count} processes", owned(place, count, 1, "exact", rows))


if __name__ == "__main__":
    main()

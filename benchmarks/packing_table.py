"""The packing factor: a step of N slots packed, against N steps one after another on the same base.

    python benchmarks/packing_table.py --model-size 3b --minutes 8 --output packing_table.jsonl
    python benchmarks/packing_table.py --model-size tiny --tokens 1x16,2x32 --slots 1,4 --ranks 8

A random Qwen2.5-VL of the real class, made on the device (bfloat16 on a GPU), LoRA on its language
model; rows of random tokens without images, all of them labelled. Per cell, in one process and
interleaved: a step of one slot by itself, as the isolated executor does it, and a packed step of N
slots of the same rank; all rows are alike, so N steps alone take N times as long as one. On CPU
seconds are CPU time of one thread: what else runs takes none of it. A line of JSON a cell, with
`--output` also into a file, whose cells are not measured again: a run that its minutes ended goes
on there. A cell that is out of memory ends its row of cells.

The floor of a step is what its device cannot go below: its model FLOPs (`train/flops.py`) at the
rate of a large matrix product, or the bytes that it has to move at the rate of a large copy, both
measured in the same run, whichever is more. Bytes: the frozen weights of the language model in the
forward and in the backward pass, once for all slots; each trained weight and its two moments, read
and written in float32. What a step alone takes above its floor is all that packing can win, so that
the factor is at most N steps alone over the floor of N packed ones.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from packed_rows import indexed, stored
from train_step import SIZES, experiment, random_base

from raytune_vlm.collate.encoded import Encoded
from raytune_vlm.config import ExperimentConfig
from raytune_vlm.errors import TrialInfeasible
from raytune_vlm.models.loading import Base
from raytune_vlm.models.lora import scope_of
from raytune_vlm.packed.host import Host, Outcome
from raytune_vlm.packed.slot import Slot
from raytune_vlm.prepare.store import PreparedSplit, RowWriter, open_split, write_index
from raytune_vlm.train.flops import FlopCounter
from raytune_vlm.train.run import Run, TrainingData
from raytune_vlm.train.step_metrics import StepMetrics
from raytune_vlm.train.world import World

PASSES = 2
"""Times that a step reads the frozen weights: forward, and for the gradients of their inputs."""
UPDATE_BYTES = 6 * 4
"""Of a trained weight: AdamW reads and writes it and its two moments in float32."""
SYMBOLS = 256
"""Tokens that stand for a byte, and for nothing of images."""


@dataclass(frozen=True)
class Machine:
    """The device, and what it does at most."""

    device: str
    name: str
    flops: float
    """FLOP/s of a large matrix product in the dtype of the base."""
    bandwidth: float
    """Bytes a second that a large copy reads and writes."""


@dataclass(frozen=True)
class Cell:
    """What is measured."""

    model: str
    device: str
    recompute: bool
    rank: int
    rows: int
    length: int
    slots: int


@dataclass(frozen=True)
class Work:
    """What a step of one slot has to do at least."""

    flops: float
    shared_bytes: int
    own_bytes: int

    def floor(self, slots: int, machine: Machine) -> float:
        """Seconds of a packed step, at least."""
        moved = self.shared_bytes + slots * self.own_bytes
        return max(slots * self.flops / machine.flops, moved / machine.bandwidth)


def now(device: str) -> float:
    """Seconds, when the device has done what it was given; on CPU those of this process alone."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def best_seconds(work: Callable[[], object], device: str) -> float:
    """The best of some goes, after one that does not count."""
    work()
    found = []
    for _ in range(10):
        began = now(device)
        work()
        found.append(now(device) - began)
    return min(found)


def measured_machine(device: str) -> Machine:
    """Rates of a device; the sizes are large beside its caches, and small beside its memory."""
    on_gpu = device != "cpu"
    side, count = (8192, 2**30) if on_gpu else (1024, 2**25)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    one, other = torch.randn(2, side, side, device=device, dtype=dtype)
    product = best_seconds(lambda: one @ other, device)
    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), device)
    name = torch.cuda.get_device_name(device) if on_gpu else "one CPU thread"
    return Machine(device, name, 2 * side**3 / product, 2 * source.nbytes / copy)


def write_rows(folder: Path, rows: int, length: int) -> PreparedSplit:
    """Text-only samples of random tokens, prepared."""
    noise = np.random.default_rng(0).integers(0, SYMBOLS, (rows, length), dtype=np.int32)
    samples = [Encoded(ids, [(0, length)]) for ids in noise]
    (folder / "shard").mkdir()
    with RowWriter(folder / "shard" / "train.arrow") as writer:
        for number, sample in enumerate(samples):
            writer.add(stored(number, sample, []))
    index = [indexed(number, sample, num_images=0) for number, sample in enumerate(samples)]
    write_index(folder / "index.arrow", index)
    return open_split(folder, folder / "index.arrow", "train")


def stepped(outcomes: list[Outcome], rows: int) -> None:
    """Raise what a step raised, and where it did not fit whole into memory."""
    for outcome in outcomes:
        if not isinstance(outcome, StepMetrics):
            raise outcome
        if outcome.micro_batch_size < rows:
            raise torch.OutOfMemoryError(f"{outcome.micro_batch_size} of {rows} rows at a time")


class Group:
    """The slots of one rank and one size of a step, on a base of their own."""

    def __init__(self, cell: Cell, machine: Machine, folder: Path) -> None:
        self._machine, self._rows, self._length = machine, cell.rows, cell.length
        self._base = random_base(cell.model, machine.device)
        self._split = write_rows(folder, cell.rows, cell.length)
        self._recipe = recipe(cell)
        self._slots: list[Slot] = []

    def measure(self, count: int, repetitions: int) -> dict[str, Any]:
        """Seconds and memory of a number of slots; not fewer than before."""
        while len(self._slots) < count:
            run = Run(
                self._base,
                self._split,
                self._recipe,
                World(device=self._machine.device),
                TrainingData("b"),
            )
            self._slots.append(Slot(run, self._machine.device))
        host = Host(self._base, "fast")
        self._packed(host), self._packed(host)  # with the audit, and without
        alone, packed = [], []
        for number in range(repetitions):
            alone.append(self._alone(self._slots[number % count]))
            packed.append(self._packed(host))
        return {"alone_s": alone, "packed_s": packed, **self._memory(host)}

    def work(self) -> Work:
        """Of the step of a slot."""
        tokens = self._rows * self._length
        with self._slots[0].mounted() as run:
            counter = FlopCounter(run.model, self._base.family)
            counter.close()
            trained = sum(run.trainable.values())
        labelled = int(self._split.num_labelled[: self._rows].sum())
        flops = counter.flops(tokens, tokens * self._length, 0, 0, labelled)
        assert flops is not None
        frozen = text_bytes(self._base)
        return Work(flops, PASSES * frozen, UPDATE_BYTES * trained)

    def _alone(self, slot: Slot) -> float:
        with slot.mounted() as run:
            began = now(self._machine.device)
            metrics = run.step()
            seconds = now(self._machine.device) - began
        stepped([metrics], self._rows)
        return seconds

    def _packed(self, host: Host) -> float:
        began = now(self._machine.device)
        outcomes = host.step(self._slots)
        seconds = now(self._machine.device) - began
        if host.notes:
            out_of_memory = host.notes[0].startswith("out of memory")
            raise (torch.OutOfMemoryError if out_of_memory else RuntimeError)(host.notes[0])
        stepped(outcomes, self._rows)
        return seconds

    def _memory(self, host: Host) -> dict[str, int]:
        """Bytes: of the base, and at most in a packed step; of a GPU only."""
        if self._machine.device == "cpu":
            return {}
        torch.cuda.reset_peak_memory_stats(self._machine.device)
        self._packed(host)
        base = sum(p.nbytes for p in self._base.model.parameters())
        return {"base_bytes": base, "peak_bytes": torch.cuda.max_memory_allocated()}


def recipe(cell: Cell) -> ExperimentConfig:
    """Of all slots of a cell."""
    return experiment(1).with_recipe(
        {
            "lora.rank": cell.rank,
            "train.batch_size": cell.rows,
            "train.micro_batch_size": cell.rows,
            "train.activation_checkpointing.text": cell.recompute,
        }
    )


def text_bytes(base: Base) -> int:
    """Of the linear layers of the language model and of its head."""
    return sum(
        module.weight.nbytes
        for name, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear) and scope_of(name, base.family) in ("text", None)
    )


def judged(cell: Cell, found: dict[str, Any], work: Work, machine: Machine) -> dict[str, Any]:
    """The line of a cell: what was measured, and what follows from it."""
    alone, packed = (statistics.median(found[f"{way}_s"]) for way in ("alone", "packed"))
    return {
        **asdict(cell),
        **found,
        "alone_median_s": alone,
        "packed_median_s": packed,
        "factor": cell.slots * alone / packed,
        "most_factor": cell.slots * alone / work.floor(cell.slots, machine),
        "wasted_alone": 1 - work.floor(1, machine) / alone,
        "alone_tflops": work.flops / alone / 1e12,
        "packed_tflops": cell.slots * work.flops / packed / 1e12,
        "matmul_tflops": machine.flops / 1e12,
        "copy_gb_per_second": machine.bandwidth / 1e9,
        "load": os.getloadavg()[0],
    }


def table(entries: list[dict[str, Any]]) -> str:
    """All cells in Markdown."""
    lines = [
        "| rank | rows x tokens | slots | alone, ms | wasted | packed, ms | factor | at most | "
        "TFLOP/s alone | packed | GB | GB a slot | GB, processes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    alone = {place(entry): entry.get("peak_bytes") for entry in entries if entry["slots"] == 1}
    for entry in entries:
        first = f"| {entry['rank']} | {entry['rows']} x {entry['length']} | {entry['slots']} "
        if "out_of_memory" in entry:
            lines.append(f"{first}| out of memory |{' |' * 9}")
            continue
        lines.append(
            f"{first}| {1e3 * entry['alone_median_s']:.1f} | {entry['wasted_alone']:.0%} "
            f"| {1e3 * entry['packed_median_s']:.1f} | {entry['factor']:.2f} "
            f"| {entry['most_factor']:.3g} | {entry['alone_tflops']:.3g} "
            f"| {entry['packed_tflops']:.3g} {memory_columns(entry, alone.get(place(entry)))}|"
        )
    return "\n".join(lines)


def place(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Of a cell whatever its number of slots."""
    return tuple(entry[name] for name in ("model", "device", "recompute", "rank", "rows", "length"))


def memory_columns(entry: dict[str, Any], alone: int | None) -> str:
    """The most in use, that beyond the base by slot, and what as many processes would take."""
    if "peak_bytes" not in entry:
        return "| | | "
    each = (entry["peak_bytes"] - entry["base_bytes"]) / entry["slots"]
    processes = "" if alone is None else f"{entry['slots'] * alone / 1e9:.1f}"
    return f"| {entry['peak_bytes'] / 1e9:.1f} | {each / 1e9:.2f} | {processes} "


class Sheet:
    """The lines of all cells, also of earlier runs."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        known = file.read_text().splitlines() if file is not None and file.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in known]

    def has(self, cell: Cell) -> bool:
        """Whether a cell was measured."""
        return any(asdict(cell).items() <= entry.items() for entry in self.entries)

    def add(self, entry: dict[str, Any]) -> None:
        """Print and keep a line."""
        self.entries.append(entry)
        click.echo(json.dumps(entry))
        if self._file is not None:
            with self._file.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")


def fill(sheet: Sheet, cells: list[Cell], machine: Machine, repetitions: int, end: float) -> bool:
    """Measure cells that differ in their slots only; False if there is no time left for all."""
    missing = [cell for cell in cells if not sheet.has(cell)]
    if not missing:
        return True
    took = 0.0
    with tempfile.TemporaryDirectory() as folder:
        try:
            group = Group(missing[0], machine, Path(folder))
            while missing:
                began = time.monotonic()
                if began + 2 * took > end:  # twice as many slots
                    return False
                found = group.measure(missing[0].slots, repetitions)
                sheet.add(judged(missing[0], found, group.work(), machine))
                missing.pop(0)
                took = time.monotonic() - began
        except (torch.OutOfMemoryError, TrialInfeasible) as error:
            for cell in missing:
                sheet.add({**asdict(cell), "out_of_memory": str(error).partition("\n")[0]})
    return True


def numbers(context: click.Context, option: click.Parameter, value: str) -> list[int]:
    """An option that is whole numbers with commas between them."""
    return sorted({int(part) for part in value.split(",")})


def sizes(context: click.Context, option: click.Parameter, value: str) -> list[tuple[int, int]]:
    """An option such as `1x64,4x1024`."""
    return [(int(rows), int(length)) for rows, length in (s.split("x") for s in value.split(","))]


@click.command(context_settings={"show_default": True})
@click.option("--model-size", default="tiny", type=click.Choice(list(SIZES)))
@click.option("--tokens", default="1x64,1x256,1x1024,4x1024,8x1024", callback=sizes, help="RxL.")
@click.option("--slots", default="1,2,4,8,16,32", callback=numbers)
@click.option("--ranks", default="16,8,64,128", help="One after another.")
@click.option("--repetitions", default=5)
@click.option("--recompute", is_flag=True, help="train.activation_checkpointing.text, in all ways.")
@click.option("--minutes", default=60.0, help="No cell is begun that would end later.")
@click.option("--output", type=click.Path(path_type=Path), help="Lines of JSON; cells are kept.")
def main(
    model_size: str,
    tokens: list[tuple[int, int]],
    slots: list[int],
    ranks: str,
    repetitions: int,
    recompute: bool,
    minutes: float,
    output: Path | None,
) -> None:
    """Measure all cells that are missing and print the table."""
    end = time.monotonic() + 60 * minutes
    torch.set_num_threads(1)
    machine = measured_machine("cuda:0" if torch.cuda.is_available() else "cpu")
    click.echo(
        f"{machine.name}: {machine.flops / 1e12:.3g} TFLOP/s in a product, "
        f"{machine.bandwidth / 1e9:.3g} GB/s in a copy; torch {torch.__version__}"
    )
    sheet = Sheet(output)
    for rank, (rows, length) in ((int(r), size) for r in ranks.split(",") for size in tokens):
        kind = (model_size, machine.name, recompute, rank, rows, length)
        cells = [Cell(*kind, count) for count in slots]
        if not fill(sheet, cells, machine, repetitions, end) or time.monotonic() > end:
            click.echo("no time left: the same command with the same --output goes on")
            break
        gc.collect()
        if machine.device != "cpu":
            torch.cuda.empty_cache()
    click.echo(table(sheet.entries))


if __name__ == "__main__":
    main()

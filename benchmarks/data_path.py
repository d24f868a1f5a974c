"""CPU time of the data path, per image, of the whole process tree: ours against the usual ways.

    python benchmarks/data_path.py [--images 2000] [--repetitions 3] [--only NAME] [--json FILE]

Every contestant (`data_path_contestants.py`) runs in a process of its own, in turn, so many times.
Measured is from READY (imports, Ray's start, the processor, a warm-up of 64 images) to the last
batch; the CPU time is that of the contestant and of all processes that it started, Ray's daemons
and workers among them (`data_path_cpu.py`). CPU time depends little on what else the machine does,
wall time and `first_batch_s` do.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from data_path_contestants import CONTESTANTS, write_model
from data_path_cpu import TreeCpu
from data_path_data import ROWS_PER_FILE, write_receipts
from data_path_run import Task

WARM_UP_IMAGES = 64
MOST_PER_JPEG = 1.1
PACKAGES = ("ray", "torch", "transformers", "pyarrow", "numpy", "pillow", "simplejpeg")


@dataclass(frozen=True)
class Target:
    """`name` shall take at most `at_most` times what `other` takes."""

    name: str
    other: str
    at_most: float | None
    aim: float | None = None
    measure: str = "cpu_ms_per_image"


TARGETS = (
    Target("streaming", "bare", 1.25, 1.10),
    Target("encoded", "bare", None),
    Target("prepared", "bare", 0.2),
    Target("streaming", "dataloader_hf", 0.3),
    Target("streaming", "map_batches_hf", 0.2),
    Target("first_batch", "read_parquet_default", 0.1, measure="first_batch_s"),
    Target("streaming", "map_batches_hf", None, measure="object_store_mb_per_image"),
)


def run_once(name: str, task: Task, tree: TreeCpu) -> dict[str, Any]:
    """One run of a contestant."""
    task_file, log = task.scratch / "task.json", task.scratch / f"{name}.log"
    task.save(task_file)
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("data_path_run.py")), name, task_file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        line = process.stdout.readline()
        if line == "READY\n":
            tree.wait_until_quiet()
            before = tree.seconds()
            print("GO", file=process.stdin, flush=True)
            line = process.stdout.readline()
            cpu = tree.seconds() - before
            processes = len(tree.processes())
        if not line:
            end = log.read_text()[-3000:]
            raise click.ClickException(f"{name} ended without a result; the end of {log}:\n{end}")
        result: dict[str, Any] = json.loads(line)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the figures are there already
            process.communicate("END\n", timeout=60)
    finally:
        process.kill()
        tree.end_all()
    if "first_batch_s" in result:  # it has read one batch of all that was started
        return result
    if result["images"] != task.num_images:
        raise click.ClickException(f"{name} gave {result['images']} of {task.num_images} images")
    result |= {"cpu_s": cpu, "processes": processes}
    result["cpu_ms_per_image"] = 1000 * cpu / result["images"]
    if "object_store_bytes" in result:
        result["object_store_mb_per_image"] = result["object_store_bytes"] / 1e6 / result["images"]
    if "jpeg_bytes" in result:
        result["object_store_per_jpeg"] = result["object_store_bytes"] / result["jpeg_bytes"]
    return result


def median(runs: list[dict[str, Any]], measure: str) -> float | None:
    """The median of a measure; None where no run has it."""
    values = [run[measure] for run in runs if measure in run]
    return statistics.median(values) if values else None


def ratios(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The targets whose two sides were measured, with the ratio of their medians."""
    found = []
    for target in TARGETS:
        ours = median(runs.get(target.name, []), target.measure)
        others = median(runs.get(target.other, []), target.measure)
        if ours is not None and others:
            ratio = ours / others
            passed = None if target.at_most is None else ratio <= target.at_most
            found.append({**vars(target), "ratio": ratio, "passed": passed})
    return found


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages / 1e9, 1),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def print_table(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Medians, the CPU time with its span, and the ratios."""
    print(f"\n{'contestant':22}{'CPU ms/image':>14}{'(min to max)':>18}{'wall s':>9}", end="")
    print(f"{'first batch s':>15}{'store MB/image':>16}{'runs':>6}")
    for name, results in runs.items():
        values = [run["cpu_ms_per_image"] for run in results if "cpu_ms_per_image" in run]
        span = f"{min(values):.2f} to {max(values):.2f}" if values else ""
        cells = [
            _cell(median(results, measure), width)
            for measure, width in (("wall_s", 9), ("first_batch_s", 15))
        ]
        store = _cell(median(results, "object_store_mb_per_image"), 16)
        cpu = _cell(median(results, "cpu_ms_per_image"), 14)
        print(f"{name:22}{cpu}{span:>18}{''.join(cells)}{store}{len(results):>6}")
    per_jpeg = median(runs.get("streaming", []), "object_store_per_jpeg")
    if per_jpeg is not None:
        mark = "pass" if per_jpeg <= MOST_PER_JPEG else "MISS"
        print(f"streaming, bytes through the object store / JPEG's: {per_jpeg:.3f}, ", end="")
        print(f"at most {MOST_PER_JPEG}: {mark}")
    for row in ratios(runs):
        mark = {True: "pass", False: "MISS", None: "no target"}[row["passed"]]
        asked = "" if row["at_most"] is None else f", at most {row['at_most']}"
        aim = "" if row["aim"] is None else f", aim {row['aim']}"
        print(f"{row['name']} / {row['other']}, {row['measure']}: {row['ratio']:.3f}", end="")
        print(f"{asked}{aim}: {mark}")


def _cell(value: float | None, width: int) -> str:
    return " " * width if value is None else f"{value:>{width}.2f}"


@click.command()
@click.option("--images", default=2000, show_default=True, help="Images that are measured.")
@click.option("--repetitions", default=3, show_default=True, help="Runs of each contestant.")
@click.option("--only", multiple=True, type=click.Choice(list(CONTESTANTS)), help="Run these only.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Keep data here and reuse it.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write all figures here.")
def main(
    images: int, repetitions: int, only: tuple[str, ...], scratch: Path | None, output: Path | None
) -> None:
    """Run the contestants in turn and print medians and ratios."""
    with tempfile.TemporaryDirectory(prefix="raytune_vlm-data-path-") as temporary:
        folder = (scratch or Path(temporary)).resolve()
        (folder / "work").mkdir(parents=True, exist_ok=True)
        # At least two files, for otherwise `read_parquet` has one task only.
        rows = min(ROWS_PER_FILE, -(-images // 2))
        about = write_receipts(folder / f"images-{images}", images, seed=0, rows_per_file=rows)
        write_receipts(folder / "warm-up", WARM_UP_IMAGES, seed=1, rows_per_file=32)
        write_model(folder / "model")
        task = Task(
            parts=folder / f"images-{images}" / "parts",
            warm_up=folder / "warm-up" / "parts",
            model=folder / "model",
            scratch=folder / "work",
            num_images=images,
        )
        print(json.dumps({"machine": machine(), "data": about}, indent=1), flush=True)
        tree = TreeCpu()
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in only or CONTESTANTS}
        for repetition in range(repetitions):
            for name in runs:
                result = run_once(name, task, tree)
                runs[name].append(result)
                print(json.dumps({"repetition": repetition, **result}), flush=True)
    print_table(runs)
    if output is not None:
        figures = {"machine": machine(), "data": about, "runs": runs, "ratios": ratios(runs)}
        output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

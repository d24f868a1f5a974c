"""The files of a sweep folder and of a checkpoint as readers of bytes, see `fuzz_readers`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from sweep_folder_example import build_example

from raytune_vlm.comparisons import Comparison, Comparisons
from raytune_vlm.errors import DataError
from raytune_vlm.records import PairedTest, SweepFolder
from raytune_vlm.report.html import content, render
from raytune_vlm.report.loading import load_view

_TRIAL = "trials/trial_000"
_SCORED = f"{_TRIAL}/evaluations/report/step_000400"
FILES = {
    "experiment.json": "json",
    "result.json": "json",
    "ledger.jsonl": "jsonl",
    "data/manifest.json": "json",
    "data/quarantine.jsonl": "jsonl",
    f"{_TRIAL}/trial.json": "json",
    f"{_TRIAL}/metrics.jsonl": "jsonl",
    f"{_SCORED}/scores.json": "json",
    f"{_SCORED}/controls.json": "json",
    f"{_SCORED}/predictions.parquet": "binary",
}
"""Name in the sweep folder -> kind of input."""


@cache
def example() -> Path:
    """A small finished sweep folder, built once a process."""
    root = Path(mkdtemp(prefix="fuzz-")) / "sweep"
    folder = build_example(root, state="single")
    test = PairedTest("nted@donut", "altered", "plain", -0.2, -0.3, -0.1, 0.01, 40)
    compared = Comparison("blank_image", 40, {"nted@donut": 0.7}, {"nted@donut": 0.5})
    controls = Comparisons([compared], ["a note"])
    (root / _SCORED / "controls.json").write_text(json.dumps(asdict(controls)))
    assert folder.result_file.is_file() and test
    return root


def _report(name: str, data: bytes, folder: Path) -> Iterable[str]:
    """Write the file, read the folder, and draw the page unless the file was refused."""
    root = folder / "sweep"
    (root / name).write_bytes(data)
    view = load_view(root)
    for note in view.notes:
        yield note
    if not any(note.startswith(name) for note in view.notes):
        render(content(view))


def _prepare(folder: Path) -> None:
    shutil.copytree(example(), folder / "sweep")


def _valid(name: str) -> list[bytes]:
    return [(example() / name).read_bytes()]


def targets(make: Callable[..., Any]) -> dict[str, Any]:
    """A `Target` for each file that `report` reads."""
    return {
        f"report {name}": make(
            partial(_report, name), partial(_valid, name), (DataError,), _prepare, kind
        )
        for name, kind in FILES.items()
    }


__all__ = ["SweepFolder", "targets"]
